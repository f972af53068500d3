"""Needle grids compared, drawn and reported: pairs by hand, and what the page says of them."""

import math

import factories
import numpy as np
import pytest

from ctxlens.cli._tables import show_needles
from ctxlens.errors import InputError
from ctxlens.report import write_report
from ctxlens.report.plots.needle import needle_difference, needle_panels, score_range
from ctxlens.results import NeedleGrid
from ctxlens.runs import Run

NAN = float("nan")


def grid_of(recalls, *, model="m", meta=None, **columns):
    """Recalls `[condition][length][case][depth]`; lengths 100, 200, ..., depths 0, 50, ..."""
    rows = []
    for condition, by_length in zip(("plain+prefix", "template+prefix"), recalls, strict=False):
        cell = 0
        for i, by_case in enumerate(by_length):
            for case, by_depth in enumerate(by_case):
                for j, recall in enumerate(by_depth):
                    pattern = factories.needle_rows("base", "plain+prefix", False)[0]
                    rows.append(
                        {
                            **pattern, "model": model, "condition": condition, "cell": cell, "case": case,
                            "context_tokens": 100 * (i + 1), "depth_percent": 50.0 * j, "recall": recall,
                            "memory_recall": NAN, "error": "" if recall == recall else "OSError: gone",
                            **{name: value(recall) for name, value in columns.items()},
                        }
                    )  # fmt: skip
                    cell += 1
    return NeedleGrid.from_rows(rows, meta)


PLAIN, TEMPLATE = {"condition": "plain+prefix"}, {"condition": "template+prefix"}
GRID = grid_of([[[[1, 1], [1, 0]], [[0, 1], [NAN, 1]]], [[[0, 1], [0, 0]], [[0, 0], [0, 0]]]])


def test_conditions_are_compared_by_cell_and_context_or_length():
    pair = GRID.compare(PLAIN, TEMPLATE)
    # Differences: -1 0 | -1 0 | 0 -1 | (left out) -1, in 2 lengths x 2 cases.
    assert (pair.pairs, pair.difference.n) == (7, 4)
    assert pair.difference.estimate == pytest.approx(-4 / 7)
    assert pair.p_value == 2 / 16  # sums -1 -1 -1 -1
    by_length = GRID.compare(PLAIN, TEMPLATE, cluster="length")
    assert (by_length.difference.estimate, by_length.difference.n) == (pair.difference.estimate, 2)
    assert by_length.p_value == 2 / 4
    with pytest.raises(InputError, match="has no column needle_logprob"):
        GRID.compare(PLAIN, TEMPLATE, column="needle_logprob")


def test_means_by_length_and_depth():
    by_length = GRID.by("length", **PLAIN)
    assert by_length["context_tokens"].tolist() == [100, 200]
    assert by_length["mean"].tolist() == pytest.approx([3 / 4, 2 / 3])
    assert by_length["cells"].tolist() == [4, 3]
    by_depth = GRID.by("depth", **PLAIN)
    assert by_depth["mean"].tolist() == pytest.approx([2 / 3, 3 / 4])
    assert not by_depth["low"].isna().any()
    one_context = grid_of([[[[1, 0]]]]).by("length")
    assert one_context["low"].isna().all()


def test_difference_is_drawn_by_cell_in_both_orders():
    first, second = needle_panels(GRID)
    figure = needle_difference(GRID, first, second, "recall")
    z = np.array(figure.data[0].z, dtype=float)
    # [depth][length]: means over the two cases; at length 200, depth 0 only case 0 has both.
    assert z.tolist() == [[-1.0, 0.0], [0.0, -1.0]]
    assert np.array(figure.data[0].customdata).tolist() == [[2, 1], [2, 2]]
    back = np.array(needle_difference(GRID, second, first, "recall").data[0].z, dtype=float)
    assert (back == -z).all()
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-1, 1)


def test_sign_stands_in_squares_that_are_too_small_for_numbers():
    wide = grid_of([[[[1]]] * 15, [[[0]]] * 14 + [[[1]]]])
    first, second = needle_panels(wide)
    trace = needle_difference(wide, first, second, "recall").data[0]
    assert np.array(trace.text).tolist() == [["−"] * 14 + [""]]


def test_scale_of_probabilities_is_what_occurs():
    grid = grid_of([[[[0.5, 1.0]]]], needle_logprob=lambda recall: -2 * recall)
    panels = needle_panels(grid, "needle_logprob")
    assert score_range(panels, "needle_logprob") == (-2, -1)
    assert score_range(panels, "recall") == (0, 1)


def test_scores_failures_and_silence_are_told_apart():
    assert GRID.scores == ("recall",)
    assert len(GRID.failed) == 1
    assert GRID.silent.empty
    silent = grid_of([[[[0, 1]]]], response=lambda recall: "" if recall == 0 else None)
    assert len(silent.silent) == 1
    assert math.isnan(grid_of([[[[NAN]]]]).mean(grid_of([[[[NAN]]]]).recall()).estimate)


def built_grid(built):
    """Two lengths, 100 and 200, with two depths each; what was built is given per cell."""
    grid = grid_of([[[[1, 1]], [[0, 1]]], [[[1, 0]], [[0, 0]]]])
    return NeedleGrid(grid.frame.assign(built_context_tokens=built * 2), grid.meta)


def test_lengths_are_named_by_what_was_built(tmp_path, capsys):
    assert GRID.built_lengths == {100: 100, 200: 200}  # grids that do not say what was built
    grid = built_grid([90, 93, 200, 200])  # mean of 90 and 93: 91.5, rounded to even
    assert grid.built_lengths == {100: 92, 200: 200}
    panel = needle_panels(grid)[0]
    assert (panel.context_tokens, panel.length_labels) == ((100, 200), ["92", "200"])
    trace = needle_difference(grid, *needle_panels(grid), "recall").data[0]
    assert list(trace.x) == ["92", "200"]
    assert list(trace.hovertext[0]) == ["92 (100 requested)", "200"]
    alike = needle_panels(built_grid([95, 95, 95, 95]))[0]
    assert alike.length_labels == ["95 (100 requested)", "95 (200 requested)"]
    page = write_report([save(tmp_path / "run", grid)], tmp_path / "page.html").read_text()
    assert "92 (100 requested) tokens" in page
    show_needles(grid)
    said = " ".join(capsys.readouterr().err.split())
    assert "contexts have 92, 200 tokens on average; 100, 200 were requested" in said


def save(folder, grid):
    run = Run.open(folder, study="needle", config={"seed": 0, "name": folder.name})
    run.save("needle.parquet", grid)
    return folder


def test_page_says_what_is_shown_and_what_is_not(tmp_path):
    noise = [[1, 0], [0, 1]]
    lost = [[0, 0], [0, 0]]
    twelve = [noise] * 12
    same = save(tmp_path / "same", grid_of([twelve, twelve], meta={"cells": "x"}))
    other = save(tmp_path / "other", grid_of([twelve, [lost] * 12], model="n", meta={"cells": "x"}))
    page = write_report([same], tmp_path / "one.html").read_text()
    assert "no difference shown" in page
    assert "Runs side by side" not in page
    page = write_report([same, other], tmp_path / "two.html").read_text()
    assert "Runs side by side" in page
    assert "other: n: template+prefix, minus same: m: template+prefix" in page
    assert ">lower<" in page.replace("\n", "")
    assert "in 24 contexts" in page
    assert "are not paired" not in page
    strange = save(tmp_path / "strange", grid_of([[[[1, NAN]]]], model="s", meta={"cells": "y"}))
    page = write_report([same, strange], tmp_path / "three.html").read_text()
    assert "are not paired" in page
    assert (
        "1 of 2 answers failed and are left out of every mean. The most frequent reason: OSError: gone"
        in page
    )
