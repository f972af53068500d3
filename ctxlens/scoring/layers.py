"""Rules that find the layer whose scores decide, none of which needs to know what the answers depend on."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from ctxlens.errors import InputError
from ctxlens.results import Scores
from ctxlens.scoring.lengths import deviations, length_bins, log_odds, ranks_within
from ctxlens.scoring.selection import LP_GAP, choose_layer

LAYER_RULES: Mapping[str, str] = {
    "middle": "the paper's depth, 15 of 22; of the scored layers, the nearest",
    "needle": "the layer whose best head attends most to a hidden fact",
    "needle-mean": "the layer whose heads together attend most to a hidden fact",
    "residual": "the layer whose scores differ most between turns with similarly long context",
    "gap": "the layer whose scores agree most with lp_gap at similar length of the context",
}
"""Rules for the layer whose scores decide, each with its wording."""

DEFAULT_LAYER_RULE = "middle"
"""The rule of `ctxlens select`; `experiments/score_quality` compares the rules.

`ctxlens score` prepares what the rule needs: with `middle`, the layers up to the paper's depth are scored;
with another rule, all layers; with a rule of `NEEDLE_RULES`, the attention to a hidden fact is read too.
"""

NEEDLE_RULES = ("needle", "needle-mean")
"""The rules that need the attention of every head to a hidden fact."""

NEEDLE_LAYERS = "layer.json"
"""The file in a run folder with the attention to a hidden fact, one entry per layer."""


def find_layer(
    scores: Scores,
    rule: str = DEFAULT_LAYER_RULE,
    *,
    reduction: str = "mean_of_best",
    needle_shares: Float[np.ndarray, "layer head"] | None = None,
) -> int:
    """Find the layer whose scores decide, by a rule that does not know what the answers depend on.

    Args:
        scores: scores of a data set.
        rule: one of `LAYER_RULES`.
        reduction: the score that `residual` and `gap` look at.
        needle_shares: the attention of every head to a hidden fact (`heads.needle_layer(...).shares`), for
            `needle` and `needle-mean`.

    Returns:
        The number of a scored layer.

    Raises:
        InputError: the rule is unknown, or what it needs is missing: a scored layer, `lp_gap`, or
            `needle_shares`.
    """
    if rule not in LAYER_RULES:
        raise InputError(f"the rule for the layer must be one of {', '.join(LAYER_RULES)}, got {rule!r}.")
    scored = sorted(int(layer) for layer in scores.frame["layer"].unique())
    if not scored:
        raise InputError("there are no scored turns, so no layer can be chosen.")
    if rule == "middle":
        middle = choose_layer(scores.meta.get("n_layers", max(scored) + 1), rule="middle")
        return min(scored, key=lambda one: abs(one - middle))
    if rule in NEEDLE_RULES:
        return _found_by_needle(scored, rule, needle_shares)
    turns = scores.frame[scores.frame["layer"] == scored[0]].set_index(["conversation", "turn"])
    lengths = turns["context_tokens"].to_numpy()
    columns = [scores.layer(layer, reduction).reindex(turns.index) for layer in scored]
    by_layer = np.stack([column.to_numpy(dtype=float) for column in columns])
    if rule == "residual":
        return scored[most_varied(by_layer, lengths)]
    if LP_GAP not in turns:
        raise InputError("the rule gap needs lp_gap, which these scores lack; score again with --lp-gap.")
    return scored[most_agreeing(by_layer, turns[LP_GAP].to_numpy(dtype=float), lengths)]


def default_rule(scores: Scores, *, needle_shares: Float[np.ndarray, "layer head"] | None = None) -> str:
    """`DEFAULT_LAYER_RULE`, or `middle` where these scores lack what it needs."""
    try:
        find_layer(scores, DEFAULT_LAYER_RULE, needle_shares=needle_shares)
    except InputError:
        return "middle"
    return DEFAULT_LAYER_RULE


def default_layers(n_layers: int) -> tuple[int, ...]:
    """The layers that are scored by default: those among which `DEFAULT_LAYER_RULE` may choose."""
    if DEFAULT_LAYER_RULE == "middle":
        return tuple(range(choose_layer(n_layers, rule="middle") + 1))
    return tuple(range(n_layers))


def _found_by_needle(
    scored: list[int], rule: str, needle_shares: Float[np.ndarray, "layer head"] | None
) -> int:
    if needle_shares is None:
        raise InputError(
            f"the rule {rule} needs the attention of every head to a hidden fact; score with "
            "--needle-layer, or give needle_shares."
        )
    best = most_attentive(needle_shares, together=rule == "needle-mean")
    if best not in scored:
        raise InputError(
            f"the rule {rule} chooses layer {best}, which was not scored (layers "
            f"{', '.join(map(str, scored))}); score again with --layers all."
        )
    return best


def most_attentive(needle_shares: Float[np.ndarray, "layer head"], *, together: bool = False) -> int:
    """The layer whose best head, or whose heads `together`, attend most to a hidden fact."""
    return int((needle_shares.sum(1) if together else needle_shares.max(1)).argmax())


def most_varied(score: Float[np.ndarray, "layer turn"], lengths: Int[np.ndarray, " turn"]) -> int:
    """The layer whose scores vary most at similar length.

    The variation is the standard deviation of the log-odds, from which the mean of each length bin is
    subtracted.
    """
    bins = length_bins(lengths)
    return int(np.argmax([deviations(log_odds(one), bins).std() for one in score]))


def most_agreeing(
    score: Float[np.ndarray, "layer turn"],
    lp_gap: Float[np.ndarray, " turn"],
    lengths: Int[np.ndarray, " turn"],
) -> int:
    """The layer whose scores agree most with `lp_gap` at similar length.

    The agreement is the correlation of their ranks within each length bin.

    Raises:
        InputError: no layer's scores differ between turns that have an `lp_gap`.
    """
    bins = length_bins(lengths)
    gap = ranks_within(lp_gap, bins)
    agreement = np.array([_correlation(ranks_within(one, bins), gap) for one in score])
    if np.isnan(agreement).all():
        raise InputError("the rule gap found no layer: the scores, or lp_gap, are the same for all turns.")
    return int(np.nanargmax(agreement))


def _correlation(first: Float[np.ndarray, " turn"], second: Float[np.ndarray, " turn"]) -> float:
    both = ~np.isnan(first) & ~np.isnan(second)
    first, second = first[both], second[both]
    if not both.any() or first.min() == first.max() or second.min() == second.max():
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


__all__ = [
    "DEFAULT_LAYER_RULE", "LAYER_RULES", "NEEDLE_LAYERS", "NEEDLE_RULES", "default_layers", "default_rule",
    "find_layer", "most_agreeing", "most_attentive", "most_varied",
]  # fmt: skip
