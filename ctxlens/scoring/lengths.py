"""Turns of similar length: bins of lengths, and values compared within them."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int

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


__all__ = ["deviations", "length_bins", "log_odds", "ranks_within"]
