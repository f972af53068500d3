"""Which turns to call context-dependent: threshold, layer and reduction, chosen after scoring."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from ctxlens.errors import InputError
from ctxlens.results import Scores, Selection
from ctxlens.stats import otsu_threshold, valley_threshold

MIDDLE_LAYER = 15 / 22
"""Depth of the paper's layer, 15 of TinyLlama's 22."""


def select_turns(
    scores: Scores,
    *,
    beta: float | str = "valley",
    layer: int,
    reduction: str = "mean_of_best",
    top_share: float | None = None,
) -> Selection:
    """Choose the context-dependent turns.

    Args:
        scores: scores of a data set.
        beta: a turn is chosen if its score is above this, 0 to 1 (the paper's is 0.6); `"valley"` takes the
            threshold from the scores: the valley below the highest peak of their density (turns that use the
            context score alike, whatever the others do); `"otsu"` splits them into two groups.
        layer: the layer whose scores decide (see `choose_layer`).
        reduction: `mean_of_best` (the paper's code), `best_of_mean` (its text) or `mean_heads`.
        top_share: choose this share of the turns instead, those with the highest scores, 0 to 1.

    Raises:
        InputError: a threshold or share outside its range; a layer or reduction that was not scored.
    """
    values = scores.layer(layer, reduction)
    score = values.to_numpy(dtype=float)
    if top_share is not None:
        if not 0 <= top_share <= 1:
            raise InputError(f"top_share is a share of the turns, 0 to 1, got {top_share}.")
        order = np.argsort(-score, kind="stable")[: round(top_share * len(score))]
        selected = np.zeros(len(score), dtype=bool)
        selected[order] = True
        threshold = float(score[order].min()) if len(order) else math.inf
        rule = f"the {top_share:g} of the turns with the highest scores"
    else:
        threshold, rule = _threshold(score, beta)
        selected = score > threshold
    frame = values.rename("score").reset_index()
    frame["selected"] = selected
    if "kind" in scores.frame.columns:
        frame["kind"] = scores.frame.loc[scores.frame["layer"] == layer, "kind"].to_numpy()
    meta = {
        "threshold": threshold, "rule": rule, "layer": layer, "reduction": reduction,
        "turns": len(score), "selected": int(selected.sum()), "model": scores.meta.get("model"),
    }  # fmt: skip
    return Selection(frame, meta)


THRESHOLD_RULES = {
    "valley": (valley_threshold, "score above the valley below the highest peak of the scores' density"),
    "otsu": (
        otsu_threshold,
        "score in the higher of the two groups with the least variance inside them (Otsu)",
    ),
}
"""Rules that take the threshold from the scores, each with its wording."""


def check_threshold(beta: float | str) -> None:
    """Refuse a threshold that is neither a number from 0 to 1 nor the name of a rule, with `InputError`."""
    number = isinstance(beta, int | float) and 0 <= beta <= 1
    if not number and beta not in THRESHOLD_RULES:
        names = " or ".join(f'"{name}"' for name in THRESHOLD_RULES)
        raise InputError(f"the threshold β must be a number from 0 to 1, or {names}, got {beta!r}.")


def _threshold(score: np.ndarray, beta: float | str) -> tuple[float, str]:
    check_threshold(beta)
    if isinstance(beta, str):
        find, rule = THRESHOLD_RULES[beta]
        return find(score), rule
    return float(beta), f"score above the given threshold {beta:g}"


def choose_layer(n_layers: int, *, rule: str = "needle", needle_layer: int | None = None) -> int:
    """The layer whose scores decide, by a stated rule.

    Args:
        n_layers: layers of the seed model.
        rule: `needle`: the layer whose head copies the needle (`heads.needle_layer` finds it), because
            the score shall see copying; `middle`: the paper's, 15 of 22, scaled to this depth.
        needle_layer: that layer, for the rule `needle`.

    Raises:
        InputError: an unknown rule, or no `needle_layer` in range for the rule `needle`.
    """
    if rule == "middle":
        return min(round(MIDDLE_LAYER * n_layers), n_layers - 1)
    if rule != "needle":
        raise InputError(f'the rule for the layer must be "needle" or "middle", got {rule!r}.')
    if needle_layer is None or not 0 <= needle_layer < n_layers:
        raise InputError(
            f'the rule "needle" needs needle_layer from 0 to {n_layers - 1}, got {needle_layer}.'
        )
    return needle_layer


@dataclass(frozen=True)
class SelectionQuality:
    """A selection held against the truth.

    Attributes:
        precision: share of the selected turns that are truly context-dependent; NaN if none is selected.
        recall: share of the truly context-dependent turns that are selected; NaN if there is none.
        selected: number of selected turns.
        true: number of truly context-dependent turns among all scored ones.
        both: number of turns that are both.
        turns: number of turns in all.
    """

    precision: float
    recall: float
    selected: int
    true: int
    both: int
    turns: int


def selection_quality(selection: Selection, truth: Collection[tuple[str, int]]) -> SelectionQuality:
    """Precision and recall of a selection where the context-dependent turns are known.

    Args:
        selection: the selection.
        truth: the turns that are context-dependent; those that were not scored do not count.
    """
    frame = selection.frame
    known = set(truth)
    true = np.array(
        [
            turn in known
            for turn in zip(frame["conversation"].astype(str), frame["turn"].astype(int), strict=True)
        ],
        dtype=bool,
    )
    selected = frame["selected"].to_numpy(dtype=bool)
    both = int((true & selected).sum())
    return SelectionQuality(
        precision=both / int(selected.sum()) if selected.any() else math.nan,
        recall=both / int(true.sum()) if true.any() else math.nan,
        selected=int(selected.sum()),
        true=int(true.sum()),
        both=both,
        turns=len(frame),
    )


__all__ = [
    "THRESHOLD_RULES", "SelectionQuality", "check_threshold", "choose_layer", "select_turns",
    "selection_quality",
]  # fmt: skip
