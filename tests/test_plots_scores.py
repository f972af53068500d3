"""Figures of scores by layer and by length against counts by hand, and the data card on the page."""

import factories
import numpy as np
import pytest

from ctxlens.chat.data import load_conversations
from ctxlens.errors import InputError
from ctxlens.report import plots, write_report
from ctxlens.results import Scores
from ctxlens.runs import Run
from ctxlens.scoring.card import make_card
from ctxlens.scoring.selection import select_turns


def table(by_layer, lengths=None):
    n = len(by_layer[0])
    lengths = [8] * n if lengths is None else lengths
    rows = [
        {
            "conversation": str(k), "turn": 1, "layer": layer, "best_of_mean": 0.0,
            "mean_of_best": by_layer[layer][k], "mean_heads": 0.0, "uniform": 0.5, "response_tokens": 4,
            "context_tokens": lengths[k], "truncated": False,
        }
        for k in range(n)
        for layer in range(len(by_layer))
    ]  # fmt: skip
    return Scores.from_rows(rows, {"model": {"name": "m"}})


ALIKE = [0.9, 0.8, 0.1, 0.2]


def test_disagreement_by_hand():
    # Top halves: {0, 1}, {0, 1}, {2, 3}, {1, 2}.
    scores = table([ALIKE, [0.5, 0.6, 0.1, 0.1], [0.1, 0.2, 0.8, 0.9], [0.2, 0.8, 0.9, 0.1]])
    layers, differing = plots.disagreement(scores, top_share=0.5)
    assert layers == [0, 1, 2, 3]
    expected = [[0, 0, 1, 0.5], [0, 0, 1, 0.5], [1, 1, 0, 0.5], [0.5, 0.5, 0.5, 0]]
    np.testing.assert_allclose(differing, expected)
    figure = plots.layer_disagreement(scores, top_share=0.5)
    np.testing.assert_allclose(figure.data[0].z, expected)
    with pytest.raises(InputError, match=r"top 0\.1 of 4 turns is less than one turn"):
        plots.disagreement(scores)
    with pytest.raises(InputError, match="between 0 and 1, got 1"):
        plots.disagreement(scores, top_share=1.0)


def test_random_layers_differ_by_what_is_left():
    rng = np.random.default_rng(0)
    _, differing = plots.disagreement(table(rng.random((2, 4000)).tolist()))
    assert differing[0, 1] == pytest.approx(0.9, abs=0.03)


def test_thresholds_by_hand():
    rows = plots.threshold_shares(table([ALIKE, [0.6, 0.6, 0.6, 0.61]]))
    assert rows == [(0, [0.5, 0.5, 0.5, 0.25]), (1, [1.0, 0.25, 0.0, 0.0])]


def test_every_layer_of_the_density_holds_all_turns():
    figure = plots.score_density(table([ALIKE, [0.0, 1.0, 0.5, 0.51]]), bins=4)
    np.testing.assert_allclose(figure.data[0].z, [[0.5, 0, 0, 0.5], [0.25, 0, 0.5, 0.25]])
    with pytest.raises(InputError, match="no scores to draw"):
        plots.score_density(Scores(factories.scores().frame.iloc[:0]))


def test_lengths_of_chosen_turns_apart():
    scores = table([ALIKE], [2, 1000, 1000, 4])
    figure = plots.length_histogram(scores, select_turns(scores, beta=0.5, layer=0))
    chosen, others = figure.data
    assert (chosen.name, others.name) == ("selected (2)", "not selected (2)")
    assert sum(chosen.y) == pytest.approx(1)
    places = [2**x for x, y in zip(chosen.x, chosen.y, strict=True) if y]
    assert places == pytest.approx([2, 1000], rel=0.3)
    assert len(plots.length_histogram(scores, column="response_tokens").data) == 1
    with pytest.raises(InputError, match="column must be context_tokens or response_tokens, got 'turn'"):
        plots.length_histogram(scores, column="turn")


def test_lp_gap_is_drawn_over_its_own_range():
    scores = table([ALIKE])
    scores = Scores(scores.frame.assign(lp_gap=[-1.0, 0.5, 3.0, 1.0]), scores.meta)
    selection = select_turns(scores, reduction="lp_gap", beta=0.75)
    for figure in (plots.score_histogram(scores, selection), plots.selection_histogram(selection)):
        assert sum(figure.data[0].y) == 4
        assert figure.layout.xaxis.range == (-1, 3)
        assert "nats" in figure.layout.xaxis.title.text
        assert figure.layout.shapes[0].x0 == 0.75


def test_page_shows_choices_and_card(tmp_path):
    rng = np.random.default_rng(1)
    values = rng.random((2, 30))
    scores = table(values.tolist(), rng.integers(2, 90, 30).tolist())
    source = tmp_path / "data.jsonl"
    nasty = "<script>alert('x')</script>"
    source.write_text(f'{{"prompt": "{nasty}", "completion": "c", "source": "{nasty}"}}\n' * 30)
    selection = select_turns(scores, layer=1, per_length_quantile=0.5)
    run = Run.open(tmp_path / "run", study="select", config={})
    run.save("scores.parquet", scores)
    run.save("selection.parquet", selection)
    run.write_json("card.json", make_card(scores, selection, load_conversations(source)))
    text = write_report([tmp_path / "run"], tmp_path / "report.html").read_text(encoding="utf-8")
    for heading in ("The choice of the layer", "What fixed thresholds would select", "Lengths",
                    "Selected by source", "Selected by context tokens", "Thresholds by length",
                    "Examples to judge the selection by"):  # fmt: skip
        assert heading in text, heading
    assert f"{np.mean(values[1] > 0.5):.1%}" in text
    assert nasty not in text
    assert "&lt;script&gt;alert" in text
