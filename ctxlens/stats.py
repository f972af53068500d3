"""Intervals, paired differences and separations, on SciPy.

Every comparison in ctxlens is paired and carries an interval; the interval is 95 % unless told
otherwise.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, and the number of independent units behind it."""

    estimate: float
    low: float
    high: float
    n: int

    def format(self, digits: int = 2) -> str:
        """The interval as text, for instance `0.41 [0.33, 0.49]`."""
        return f"{self.estimate:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def as_dict(self) -> dict[str, float]:
        """The fields as JSON values."""
        return asdict(self)


def bootstrap_mean(
    values: Collection[Any],
    *,
    clusters: Collection | None = None,
    seed: int = 0,
    n_resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Mean with a percentile bootstrap interval.

    Args:
        values: one value a unit; NaN is left out.
        clusters: a label a unit: whole clusters are drawn instead of units (units of one cluster are
            not independent, for instance the needle cells of one context).
        seed: seed of the resampling.
        n_resamples: number of bootstrap samples.
        level: confidence level.
    """
    values = np.asarray(values, dtype=float)
    keep = ~np.isnan(values)
    values = values[keep]
    if not values.size:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    if clusters is None:
        sums, counts = values, np.ones_like(values)
    else:
        _, index = np.unique(np.asarray(clusters)[keep], return_inverse=True)
        sums = np.bincount(index, weights=values)
        counts = np.bincount(index).astype(float)
    estimate = float(values.mean())
    n = len(sums)
    if n < 2 or np.ptp(values) == 0:
        bound = estimate if n >= 2 else float("nan")
        return Interval(estimate, bound, bound, n)
    from scipy.stats import bootstrap

    result = bootstrap(
        (sums, counts),
        lambda total, count, axis: total.sum(axis=axis) / count.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=n_resamples,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(estimate, float(low), float(high), n)


def paired_difference(
    first: Collection[Any],
    second: Collection[Any],
    *,
    clusters: Collection | None = None,
    seed: int = 0,
    n_resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Mean of `second - first` over the same units, with a percentile bootstrap interval.

    Raises:
        ValueError: the two are not of one length, so that they cannot be pairs.
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.shape != second.shape:
        raise ValueError(f"pairs need two arrays of one shape, got {first.shape} and {second.shape}")
    return bootstrap_mean(second - first, clusters=clusters, seed=seed, n_resamples=n_resamples, level=level)


def t_interval(values: Collection[Any], *, level: float = 0.95) -> Interval:
    """Mean with Student's t interval, for a handful of independent repeats such as seeds."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, float("nan"), float("nan"), len(values))
    from scipy.stats import sem, t

    half = float(t.ppf(0.5 + level / 2, len(values) - 1) * sem(values))
    return Interval(mean, mean - half, mean + half, len(values))


def auroc(positive: Collection[Any], negative: Collection[Any]) -> float:
    """Probability that a positive scores above a negative, ties counted half; NaN where one is empty."""
    positive, negative = np.asarray(positive, dtype=float), np.asarray(negative, dtype=float)
    if not positive.size or not negative.size:
        return float("nan")
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))


def auroc_interval(
    positive: Collection[Any],
    negative: Collection[Any],
    *,
    seed: int = 0,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """`auroc` with a percentile bootstrap interval; `n` is the size of the smaller group."""
    positive, negative = np.asarray(positive, dtype=float), np.asarray(negative, dtype=float)
    estimate, n = auroc(positive, negative), min(len(positive), len(negative))
    if n < 2:
        return Interval(estimate, float("nan"), float("nan"), n)
    from scipy.stats import bootstrap, mannwhitneyu

    result = bootstrap(
        (positive, negative),
        lambda p, q, axis: mannwhitneyu(p, q, axis=axis).statistic / (p.shape[axis] * q.shape[axis]),
        paired=False,
        vectorized=True,
        n_resamples=n_resamples,
        batch=100,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(estimate, float(low), float(high), n)


def otsu_threshold(values: Collection[Any]) -> float:
    """The threshold that splits values into two groups with the least variance inside the groups.

    Otsu's rule (1979) on the values themselves instead of a histogram: the threshold lies halfway
    between the two neighbouring values of the best split. With fewer than two distinct values it is
    that value.
    """
    values = np.sort(np.asarray(values, dtype=float))
    values = values[~np.isnan(values)]
    if not values.size:
        return float("nan")
    if values[0] == values[-1]:
        return float(values[0])
    count = np.arange(1, len(values))
    total = np.cumsum(values)
    below = total[:-1] / count
    above = (total[-1] - total[:-1]) / (len(values) - count)
    between = count * (len(values) - count) * (above - below) ** 2
    between[values[1:] == values[:-1]] = -1.0
    split = int(between.argmax())
    return float((values[split] + values[split + 1]) / 2)
