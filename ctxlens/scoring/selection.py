"""Select context-dependent turns: threshold, layer and reduction are chosen after scoring."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from ctxlens.chat.data import Conversation, as_conversations, fingerprint_conversations
from ctxlens.chat.data.given_rows import Source
from ctxlens.errors import InputError
from ctxlens.results import Scores, Selection
from ctxlens.scoring.lengths import length_bins
from ctxlens.stats import mixture_threshold, otsu_threshold, valley_threshold

if TYPE_CHECKING:
    import pandas as pd

LP_GAP = "lp_gap"
"""The column of `ctxlens.scoring.lp_gap`, which can be chosen like a reduction but has no layer."""

MIDDLE_LAYER = 15 / 22
"""Depth of the paper's layer, 15 of TinyLlama's 22."""


def select_turns(
    scores: Scores,
    *,
    beta: float | str | None = None,
    layer: int | None = None,
    reduction: str = "mean_of_best",
    top_share: float | int | None = None,
    per_length_quantile: float | int | None = None,
) -> Selection:
    """Choose the context-dependent turns, by one of three rules.

    Args:
        scores: scores of a data set.
        beta: the threshold, 0 to 1 (0.6 in the paper), above which a turn is chosen; or the name of a rule
            that estimates the threshold from the scores (`THRESHOLD_RULES`): `"mixture"` (the default if no
            other rule is given), where the highest of up to three groups begins; `"valley"`, below the
            rightmost peak of their density; `"otsu"`, between two groups.
        layer: the layer whose scores decide (see `choose_layer`); not for `lp_gap`.
        reduction: `mean_of_best` (the paper's code), `best_of_mean` (its text), `mean_heads`, or `lp_gap`
            (see `ctxlens.scoring.lp_gap`; a number as `beta` is then in nats per token).
        top_share: choose this share of the turns instead, above 0 and at most 1: those with the highest
            scores, and the earlier ones among equal scores. Turns without a score (`lp_gap` may be NaN) do
            not count and are never chosen.
        per_length_quantile: choose a turn if its score is above this quantile (between 0 and 1) of the
            scores of turns with similarly long context (`length_bins` of `context_tokens`), so that long
            contexts, which attract attention by their length alone, are not preferred.

    Raises:
        InputError: more than one rule is given; a threshold, share or quantile is out of range or selects
            from nothing; the layer or reduction was not scored.
    """
    given = {"beta": beta, "top_share": top_share, "per_length_quantile": per_length_quantile}
    rules = [name for name, value in given.items() if value is not None]
    if len(rules) > 1:
        raise InputError(f"give one rule for what is selected, not {' and '.join(rules)} together.")
    rows = score_rows(scores, layer, reduction)
    score = rows["score"].to_numpy(dtype=float)
    if not len(score):
        raise InputError("there are no scored turns to select from.")
    lengths = rows["context_tokens"].to_numpy()
    if per_length_quantile is not None:
        selected, bins = _above_quantile(score, lengths, per_length_quantile)
        rule = f"score above the {per_length_quantile:g} quantile of turns with as many context tokens"
        meta: dict[str, Any] = {"threshold": None, "rule": rule, "bins": bins}
    else:
        selected, threshold, rule = _select(score, beta, top_share, bounded=reduction != LP_GAP)
        meta = {"threshold": threshold, "rule": rule}
    names = [name for name in ("conversation", "turn", "score", "kind") if name in rows]
    meta |= {
        "layer": layer, "reduction": reduction,
        "turns": len(score), "selected": int(selected.sum()), "model": scores.meta.get("model"),
        "fingerprint": scores.meta.get("fingerprint"),
    }  # fmt: skip
    return Selection(rows[names].assign(selected=selected), meta)


def score_rows(scores: Scores, layer: int | None, reduction: str) -> pd.DataFrame:
    """One row per turn, with the score that decides in the column `score`.

    Raises:
        InputError: the layer or reduction was not scored, or the reduction needs a layer and none is given.
    """
    turns = scores.frame.drop_duplicates(["conversation", "turn"]).reset_index(drop=True)
    if reduction == LP_GAP:
        if LP_GAP not in turns:
            raise InputError("these scores hold no lp_gap; score again with --lp-gap.")
        return turns.assign(score=turns[LP_GAP])
    if layer is None:
        raise InputError(f"the reduction {reduction} needs the layer whose scores decide; see choose_layer.")
    score = scores.layer(layer, reduction).rename("score").reset_index()
    return score.merge(turns, on=["conversation", "turn"], how="left")


def _select(
    score: Float[np.ndarray, " turn"],
    beta: float | str | None,
    top_share: float | int | None,
    *,
    bounded: bool,
) -> tuple[np.ndarray, float, str]:
    """Which turns are selected, the threshold, and the rule in words."""
    if top_share is not None:
        selected = _highest(score, top_share)
        rule = f"the {top_share:.4g} of the turns with the highest scores"
        return selected, float(score[selected].min()), rule
    threshold, rule = _threshold(score, DEFAULT_RULE if beta is None else beta, bounded=bounded)
    return score > threshold, threshold, rule


def _highest(score: np.ndarray, top_share: float | int) -> np.ndarray:
    if not 0 < top_share <= 1:
        raise InputError(f"top_share is a share of the turns, 0 to 1 and above 0, got {top_share}.")
    n_scored = int((~np.isnan(score)).sum())
    count = round(top_share * n_scored)
    if not count:
        raise InputError(f"top_share {top_share:g} of {n_scored} turns is less than one turn; give more.")
    selected = np.zeros(len(score), dtype=bool)
    selected[np.argsort(-score, kind="stable")[:count]] = True
    return selected


def _above_quantile(
    score: np.ndarray, lengths: np.ndarray, quantile: float | int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    if not 0 < quantile < 1:
        raise InputError(f"per_length_quantile must lie between 0 and 1, got {quantile}.")
    selected = np.zeros(len(score), dtype=bool)
    numbers = length_bins(lengths)
    bins = []
    for number in range(numbers.max() + 1):
        inside = numbers == number
        known = score[inside & ~np.isnan(score)]
        threshold = float(np.quantile(known, quantile)) if known.size else math.nan
        selected |= inside & (score > threshold)
        bins.append(
            {
                "from": int(lengths[inside].min()), "to": int(lengths[inside].max()),
                "turns": int(inside.sum()), "threshold": threshold,
                "selected": int((selected & inside).sum()),
            }
        )  # fmt: skip
    return selected, bins


DEFAULT_RULE = "mixture"

THRESHOLD_RULES = {
    "mixture": (
        mixture_threshold,
        "score in the highest of up to three groups (mixture of Gaussians over log-odds)",
    ),
    "valley": (valley_threshold, "score above the valley below the highest peak of the scores' density"),
    "otsu": (
        otsu_threshold,
        "score in the higher of the two groups with the least variance inside them (Otsu)",
    ),
}
"""Rules that estimate the threshold from the scores, each with its wording."""


def check_threshold(beta: float | str) -> None:
    """Raise `InputError` for a threshold that is neither a number from 0 to 1 nor the name of a rule."""
    number = isinstance(beta, int | float) and 0 <= beta <= 1
    if not number and beta not in THRESHOLD_RULES:
        names = " or ".join(f'"{name}"' for name in THRESHOLD_RULES)
        raise InputError(f"the threshold β must be a number from 0 to 1, or {names}, got {beta!r}.")


def _threshold(score: np.ndarray, beta: float | str, *, bounded: bool) -> tuple[float, str]:
    if bounded or isinstance(beta, str) or not math.isfinite(beta):
        check_threshold(beta)
    if isinstance(beta, str):
        find, rule = THRESHOLD_RULES[beta]
        return find(score), rule
    return float(beta), f"score above the given threshold {beta:g}"


def choose_layer(n_layers: int, *, rule: str = "needle", needle_layer: int | None = None) -> int:
    """Choose the layer whose scores decide, by a stated rule.

    Args:
        n_layers: number of layers of the seed model.
        rule: `needle`: the layer whose head copies the needle (`heads.needle_layer` finds it), because
            the score is meant to measure copying; `middle`: the paper's layer, 15 of 22, scaled to this
            depth.
        needle_layer: that layer, for the rule `needle`.

    Raises:
        InputError: the rule is unknown, or the rule `needle` lacks a `needle_layer` in range.
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


def check_scored(scores: Scores, conversations: Iterable[Conversation] | Source) -> str:
    """Raise an error if a data set, or what `load_conversations` takes, is not the one that was scored.

    Returns:
        The fingerprint of the conversations.

    Raises:
        InputError: a scored turn is not in the data or is not an assistant turn, or the fingerprint differs
            from that in the scores.
    """
    data = list(as_conversations(conversations))
    found = fingerprint_conversations(data)
    known = scores.meta.get("fingerprint")
    messages = {conversation.id: conversation.messages for conversation in data}
    turns = scores.frame[["conversation", "turn"]].drop_duplicates()
    for name, turn in zip(turns["conversation"].astype(str), turns["turn"].astype(int), strict=True):
        said = messages.get(name)
        if said is None or not 0 <= turn < len(said) or said[turn]["role"] != "assistant":
            raise InputError(
                f"turn {turn} of conversation {name!r} was scored, but is not in the data set; these scores "
                "belong to other data, or the data were read in another way (split, layout, limit)."
            )
    if known is not None and known != found:
        raise InputError(
            "the conversations are not those that were scored: they have the same ids but other texts; "
            "these scores belong to other data, or to an earlier state of them."
        )
    return found


@dataclass(frozen=True)
class SelectionQuality:
    """A selection compared with the truth.

    Attributes:
        precision: share of the selected turns that are truly context-dependent; NaN if none is selected.
        recall: share of the truly context-dependent turns that are selected; NaN if there is none.
        selected: number of selected turns.
        true: number of truly context-dependent turns among all scored ones.
        both: number of turns that are both selected and true.
        turns: number of all scored turns.
    """

    precision: float
    recall: float
    selected: int
    true: int
    both: int
    turns: int


def selection_quality(selection: Selection, truth: Collection[tuple[str, int]]) -> SelectionQuality:
    """Precision and recall of a selection if the context-dependent turns are known.

    Args:
        selection: the selection.
        truth: the context-dependent turns; turns that were not scored do not count.
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
    "DEFAULT_RULE", "LP_GAP", "THRESHOLD_RULES", "SelectionQuality", "check_scored", "check_threshold",
    "choose_layer", "length_bins", "score_rows", "select_turns", "selection_quality",
]  # fmt: skip
