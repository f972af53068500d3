"""Tables of a model of 36 layers with 32 heads, at 80 columns, and what they say of few texts."""

import numpy as np
import pytest
from evaluation_cases import evaluation

from ctxlens.chat.roles import Role
from ctxlens.results import HeadMap, RoleAllocation

LAYERS, HEADS = 36, 32


def allocation(condition, n_texts=12, user=0.4):
    """Everyone but the template gets the same in every layer; the user's share is known."""
    shares = np.zeros((LAYERS, HEADS, n_texts, len(RoleAllocation.roles)), np.float32)
    shares[..., Role.BOS], shares[..., Role.USER] = 0.1, user
    shares[..., Role.TEMPLATE] = 0.9 - user
    counts = np.ones((n_texts, len(RoleAllocation.roles)), np.float32)
    texts = tuple(f"chat {i}" for i in range(n_texts))
    meta = {"model": "wide", "condition": condition}
    return RoleAllocation(shares, counts, tuple(range(LAYERS)), texts, "first_answer", meta, shares * 0)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def printed(capsys, print_it, *given):
    """The lines of a table; the sentence below it is wrapped on a terminal only."""
    print_it(*given)
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert max(len(line) for line in lines if not line.endswith(".")) <= 80
    return lines


def rows_of(lines, label):
    return [line.split() for line in lines if line.split()[:1] == [label]]


def test_allocate_has_a_row_per_layer_a_row_of_means_and_all_roles(capsys):
    from ctxlens.cli._tables import show_allocation

    lines = printed(capsys, show_allocation, allocation("plain", user=0.6), allocation("template", user=0.2))
    assert all(len(rows_of(lines, str(layer))) == 2 for layer in range(LAYERS))
    first, roles = rows_of(lines, "mean")
    assert first[1:3] == ["0.600", "0.200"]
    heading = next(line.split() for line in lines if "bos" in line.split())
    assert {"bos", "sink", "user", "template"} <= set(heading)
    assert dict(zip(heading[1:], roles[1:], strict=True))["user"] == "0.200"


def test_steer_has_a_row_of_means(capsys):
    from ctxlens.cli._tables import show_shares

    lines = printed(capsys, show_shares, allocation("template", user=0.2), allocation("template", user=0.7))
    assert rows_of(lines, "mean") == [["mean", "0.200", "0.700", "0.200", "0.700"]]
    assert len(rows_of(lines, "35")) == 1


def test_the_sentence_says_the_change_and_that_there_are_too_few_texts():
    from ctxlens.cli._outcomes import say_allocations

    few = say_allocations("With the template", allocation("plain", 3, 0.6), allocation("template", 3, 0.2))
    assert "falls by 0.40 (3 texts: too few for an interval) on average" in few
    same = say_allocations("With the template", allocation("plain", 12, 0.6), allocation("template", 12))
    assert "0.20 (12 texts alike)" in same
    assert "[" not in same


@pytest.mark.parametrize(("n_texts", "said"), [(1, "(1 text)"), (4, "(4 texts)"), (12, "[")])
def test_heads_of_few_texts_have_no_interval(n_texts, said, capsys):
    from ctxlens.cli._heads_tables import _show_map

    effects = np.random.default_rng(0).normal(size=(24, LAYERS, HEADS)).astype(np.float32)
    found = HeadMap(effects, np.arange(24) % n_texts, "gradient", {"quantity": "nats per token"})
    lines = printed(capsys, _show_map, found)
    assert all(said in line for line in lines[2:])
    assert "nan" not in " ".join(lines)


def test_one_map_has_one_first_head():
    from ctxlens.cli._outcomes import say_heads

    effects = np.zeros((2, LAYERS, HEADS), np.float32)
    effects[:, 35, 31] = 0.25
    found = HeadMap(effects, np.arange(2), "gradient", {})
    assert say_heads([found]) == "The first head is 35.31 by gradient (+0.250)."
    assert say_heads([found, found]).startswith("The first heads are 35.31")


def test_an_evaluation_says_what_it_shows(capsys):
    from ctxlens.cli._tables import say_evaluation, show_evaluation

    # of four examples from two texts, base answers three rightly with template and two with steering
    said = say_evaluation(evaluation())
    assert said == (
        "In quiz the contains with base, template+steered:0.5 differs from that with base, template by "
        "-0.25 (2 texts: too few for an interval): no difference shown."
    )
    lines = printed(capsys, show_evaluation, evaluation())
    assert lines[-1] == said
    alone = say_evaluation(evaluation(right={("base", "template"): (1, 1, 1, 0)}))
    assert alone == (
        "The mean contains in quiz with base, template is 0.75 (2 texts: too few for an interval)."
    )


def test_scores_of_36_layers_are_read_at_80_columns(tmp_path, capsys):
    from ctxlens.cli._tables import show_scores
    from ctxlens.results import Scores

    rows = [
        {
            "conversation": f"c{i}", "turn": 1, "layer": layer, "best_of_mean": i / 20,
            "mean_of_best": i / 20, "mean_heads": i / 20, "uniform": 0.5,
            "response_tokens": 14, "context_tokens": 120, "truncated": False,
        }
        for i in range(21) for layer in range(LAYERS)
    ]  # fmt: skip
    meta = {
        "layers": list(range(LAYERS)), "conversations": 21, "skipped": [], "truncated": 0, "max_tokens": 512,
        "data": {"layout": "messages", "rows_left_out": 0, "turns_dropped": {}},
    }  # fmt: skip
    path = tmp_path / "scores.parquet"
    Scores.from_rows(rows, meta).write(path)
    lines = printed(capsys, show_scores, path, meta, [])
    assert rows_of(lines, "35")[0][1:4] == rows_of(lines, "mean")[0][1:4] == ["0.10", "0.50", "0.90"]
