"""Turns of similar length: bins of lengths, and values compared within them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ctxlens.errors import InputError

_LEAST_SHARE = 1e-6


def length_bins(
    lengths: Int[np.ndarray, " turn"], *, n_bins: int = 10, min_count: int = 20
) -> Int[np.ndarray, " turn"]:
    """Divide lengths into bins of about equal counts.

    Starting from the shortest, a bin takes whole groups of equal lengths until it holds a share of
    `1 / n_bins` of all lengths and at least `min_count`. A remainder of fewer than `min_count` joins the last
    full bin. Equal lengths are never separated.

    Returns:
        The number of the bin of each length, from 0, shortest first.
    """
    values, inverse, counts = np.unique(lengths, return_inverse=True, return_counts=True)
    full = max(min_count, math.ceil(len(lengths) / n_bins))
    bins = np.zeros(len(values), dtype=np.int64)
    number = held = 0
    for at, count in enumerate(counts):
        if held >= full:
            number, held = number + 1, 0
        bins[at] = number
        held += count
    if number and held < min_count:
        bins[bins == number] = number - 1
    return bins[inverse]


def log_odds(share: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """The log-odds of shares from 0 to 1; shares within a millionth of 0 or 1 count as that."""
    clipped = np.clip(share, _LEAST_SHARE, 1 - _LEAST_SHARE)
    return np.log(clipped / (1 - clipped))


def share_of(odds: float) -> float:
    """The share whose log-odds these are."""
    from scipy.special import expit

    return float(expit(odds))


def deviations(
    values: Float[np.ndarray, " turn"], bins: Int[np.ndarray, " turn"]
) -> Float[np.ndarray, " turn"]:
    """Values minus the mean of their bin."""
    found = values.astype(float)
    for number in np.unique(bins):
        inside = bins == number
        found[inside] -= found[inside].mean()
    return found


def ranks_within(
    values: Float[np.ndarray, " turn"], bins: Int[np.ndarray, " turn"]
) -> Float[np.ndarray, " turn"]:
    """The rank of every value among those of its bin, above 0 and at most 1; NaN where the value is NaN."""
    from scipy.stats import rankdata

    found = np.full(len(values), math.nan)
    for number in np.unique(bins):
        inside = (bins == number) & ~np.isnan(values)
        found[inside] = rankdata(values[inside]) / max(1, inside.sum())
    return found


def correct_for_length(
    values: Float[np.ndarray, " turn"], lengths: Int[np.ndarray, " turn"]
) -> tuple[Float[np.ndarray, " turn"], list[dict[str, Any]]]:
    """Values in standard deviations from the mean of turns with similarly long context.

    Where all turns of a bin have the same value, none of them stands out, and all are 0. Turns without a
    value (NaN) do not count and stay without one.

    Args:
        values: log-odds of shares, or another value without bounds.
        lengths: the length of every turn's context; `length_bins` divides them.

    Returns:
        The corrected values, and for every bin `from` and `to` (its shortest and longest context), `turns`,
        `mean` and `deviation` (of the values).

    Raises:
        InputError: all turns are in one bin, or no bin has two different values.
    """
    known = ~np.isnan(values)
    found = np.full(len(values), math.nan)
    numbers = length_bins(lengths[known])
    if not numbers.size or not numbers.max():
        raise InputError(
            f"scores cannot be corrected for length: the context lengths of the {known.sum()} turns make one "
            "bin only, and a bin holds at least 20 turns; score more turns of different lengths, or select "
            "without the correction."
        )
    bins, corrected = [], np.zeros(len(numbers))
    for number in range(numbers.max() + 1):
        inside = numbers == number
        part, long = values[known][inside], lengths[known][inside]
        mean = float(part.mean())
        deviation = float(part.std()) if part.min() < part.max() else 0.0
        if deviation:
            corrected[inside] = (part - mean) / deviation
        size = {"from": int(long.min()), "to": int(long.max()), "turns": int(inside.sum())}
        bins.append({**size, "mean": mean, "deviation": deviation})
    if not any(one["deviation"] for one in bins):
        raise InputError(
            "scores cannot be corrected for length: turns with similarly long context all have the same "
            "score, so that none stands out; choose another layer or reduction."
        )
    found[known] = corrected
    return found, bins


__all__ = [
    "correct_for_length", "deviations", "length_bins", "log_odds", "ranks_within", "share_of",
]  # fmt: skip
