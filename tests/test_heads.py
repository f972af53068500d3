"""Head experiments: which heads, controls, sweeps, and the layer that carries the needle."""

import numpy as np
import pytest
from needle_models import CopyingModel

from ctxlens.errors import InputError
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.heads import draw_random_heads, find_retrieval_heads, needle_layer, steering_sweep
from ctxlens.results import RoleAllocation
from ctxlens.runs import Run

CONFIG = NeedleConfig(
    lengths=(60, 120), depths=(0, 100), needles=("known",), conditions=("template+prefix",), max_new_tokens=20
)
HAYSTACK = load_haystack("organism")


@pytest.fixture
def model(organism_tokenizer):
    return CopyingModel(organism_tokenizer, knows="from memory")


@pytest.fixture
def cells(model):
    return build_cells(model, CONFIG, HAYSTACK)


def test_retrieval_heads_are_the_best_of_each_layer(model, cells):
    chats = [model.render_plain([{"role": "user", "content": "a"}])]
    allocation = RoleAllocation.concat(model.read_roles(chats))
    assert find_retrieval_heads(allocation) == ((0, 2), (1, 1))


def test_random_heads_are_others_of_the_same_layers():
    draws = draw_random_heads(((0, 2), (1, 1), (1, 3)), 6, n_draws=5, seed=1)
    assert len(set(draws)) == 5
    for heads in draws:
        assert [layer for layer, _ in heads] == [0, 1, 1]
        assert len(set(heads)) == 3
        assert not set(heads) & {(0, 2), (1, 1), (1, 3)}
    assert draws == draw_random_heads(((0, 2), (1, 1), (1, 3)), 6, n_draws=5, seed=1)
    assert draws != draw_random_heads(((0, 2), (1, 1), (1, 3)), 6, n_draws=5, seed=2)


def test_random_heads_need_other_heads():
    with pytest.raises(InputError, match="layer 0 has 1 heads, too few"):
        draw_random_heads(((0, 0),), 1, n_draws=1)


def test_what_a_crowded_layer_lacks_comes_from_the_nearest_layers():
    heads = ((2, 0), (2, 1), (2, 2), (0, 3))
    for drawn in draw_random_heads(heads, 4, n_draws=5, n_layers=9):
        assert sorted(layer for layer, _ in drawn) in ([0, 1, 1, 2], [0, 1, 2, 3], [0, 2, 3, 3])
        assert len(set(drawn)) == 4
        assert not set(drawn) & set(heads)
    assert draw_random_heads(((0, 2), (1, 1)), 6, n_draws=3, n_layers=2) == draw_random_heads(
        ((0, 2), (1, 1)), 6, n_draws=3
    )
    # Two of the three remaining heads of this model are in the layer below; there is no fourth.
    everything = ((0, 0), (1, 0), (1, 1), (1, 2))
    assert [sorted(drawn) for drawn in draw_random_heads(everything, 3, n_draws=1, n_layers=2)] == [
        [(0, 1), (0, 2)]
    ]


def test_sweep_runs_every_alpha_and_head_set_on_the_same_cells(model, cells, tmp_path):
    run = Run.open(tmp_path, study="steer", config={})
    seen = []

    def side_effect(setting):
        seen.append((setting.heads, setting.draw, len(model.steered)))
        return setting.steering.alpha if setting.steering else 1.0

    grid = steering_sweep(
        model, cells, CONFIG, alphas=(1.0, 0.5, 0.05), n_draws=2, side_effect=side_effect, label="m", out=run,
    )  # fmt: skip
    frame = grid.frame
    # unsteered once, and two alphas for all, retrieval and two random sets
    assert len(frame) == 4 * (1 + 2 * 4)
    assert set(frame["model"]) == {"m"}
    assert grid.where(alpha=1.0).frame["heads"].tolist() == ["none"] * 4
    assert grid.where(heads="all", alpha=0.05).frame["recall"].tolist() == [1.0] * 4
    assert grid.where(heads="all", alpha=0.5).frame["recall"].tolist() == [0.0] * 4
    assert set(grid.where(heads="random").frame["draw"]) == {0, 1}
    assert (frame["side_effect"] == frame["alpha"]).all()
    assert seen[0] == ("none", 0, 0)
    assert all(steered == 1 for _, _, steered in seen[1:])
    chosen = {(s["heads"], s["draw"]): s["chosen"] for s in grid.meta["head_sets"]}
    assert chosen["all", 0] == "all"
    assert tuple(map(tuple, chosen["retrieval", 0])) == ((0, 2), (1, 1))
    assert (tmp_path / "steering.parquet").is_file()


def test_sweep_takes_heads_of_ones_own(model, cells):
    sets = {"first": [(0, 0)], "second": [(1, 2)]}
    grid = steering_sweep(model, cells, CONFIG, alphas=(0.05,), head_sets=sets)
    assert list(dict.fromkeys(grid.frame["heads"])) == ["none", "first", "second"]


def test_sweep_takes_given_retrieval_heads(model, cells):
    grid = steering_sweep(
        model, cells, CONFIG, alphas=(0.05,), head_sets=("retrieval",), retrieval=((0, 0), (1, 2))
    )
    assert grid.meta["head_sets"][0]["chosen"] == ((0, 0), (1, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_sets": ("best",)}, "unknown heads best"),
        ({"head_sets": {"x": [(7, 0)]}}, "head 7.0 does not exist"),
        ({"alphas": (0.0,)}, r"alpha must be in \(0, 1\]"),
    ],
)
def test_bad_sweeps_are_refused(model, cells, options, words):
    with pytest.raises(InputError, match=words):
        steering_sweep(model, cells, CONFIG, **options)
    assert model.batches == []


def test_probe_reads_the_needles_own_tokens(model, cells):
    probe = needle_layer(model, cells, CONFIG)
    assert probe.best == 1
    assert probe.table["needle_share"].tolist() == pytest.approx([0.0, 0.6])
    assert probe.table["head"].tolist() == [0, 0]
    assert probe.shares[1] == pytest.approx([0.6, 0, 0])
    assert probe.table["uniform"].between(0.05, 0.5).all()


def test_probe_is_the_sum_of_the_pattern_over_the_needle(organism_tokenizer):
    from ctxlens.models import load_model

    model = load_model("organism", backend="native")
    cell = build_cells(model, CONFIG, HAYSTACK)[1]
    probe = needle_layer(model, [cell], CONFIG)
    messages = [
        {"role": "user", "content": f"{cell.context.text}\n{cell.needle.question}"},
        {"role": "assistant", "content": cell.needle.sentence},
    ]
    chat = model.render_plain(messages)
    needle = [
        i for i, token in enumerate(chat.token_strings())
        if (chat.spans[i, 0] < chat.text.index(cell.needle.sentence) + len(cell.needle.sentence))
        and chat.spans[i, 1] > chat.text.index(cell.needle.sentence) and token
    ]  # fmt: skip
    assert chat.text[chat.spans[needle[0], 0] : chat.spans[needle[-1], 1]].strip() == cell.needle.sentence
    pattern = model.read_patterns(chat, queries="response_mean")
    expected = pattern[..., needle].sum(-1).mean(-1)
    np.testing.assert_allclose(probe.shares, expected, atol=1e-5)
    assert probe.table["needle_share"].tolist() == pytest.approx(expected.max(1).tolist(), abs=1e-5)
