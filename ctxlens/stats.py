"""Intervals, paired differences and separations, on SciPy.

Every comparison in ctxlens is paired and carries an interval. The confidence level is 95 % by default.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_DENSITY_POINTS = 10_000
_MOST_GROUPS = 3
_LEAST_IN_GROUP = 10
_LEAST_SHARE = 1e-4
_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, and the number of independent units behind it."""

    estimate: float
    low: float
    high: float
    n: int

    def format(self, digits: int = 2) -> str:
        """The interval as text, for instance `0.41 [0.33, 0.49]`, or that there are too few units for one."""
        if math.isnan(self.low) or math.isnan(self.high):
            return f"{self.estimate:z.{digits}f} (too few for an interval)"
        return f"{self.estimate:z.{digits}f} [{self.low:z.{digits}f}, {self.high:z.{digits}f}]"

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
        values: one value per unit; NaN is skipped.
        clusters: one label per unit. Whole clusters are drawn instead of units, because units of one cluster
            are not independent (for instance the needle cells of one context).
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
        ValueError: the two differ in length, so their values cannot be paired.
    """
    first, second = _as_pairs(first, second)
    return bootstrap_mean(second - first, clusters=clusters, seed=seed, n_resamples=n_resamples, level=level)


def _as_pairs(first: Collection[Any], second: Collection[Any]) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.shape != second.shape:
        raise ValueError(f"pairs need two arrays of the same shape, got {first.shape} and {second.shape}")
    return first, second


@dataclass(frozen=True)
class PairedComparison:
    """Two treatments of the same units.

    Attributes:
        first, second: mean under each treatment, over the units that both have.
        difference: mean of second minus first; its `n` is the number of clusters.
        p_value: two-sided p value of a sign-flip permutation test over clusters; NaN if there is no pair.
        pairs: number of units that both have.
    """

    first: Interval
    second: Interval
    difference: Interval
    p_value: float
    pairs: int

    @property
    def reading(self) -> str:
        """The conclusion: `higher`, `lower`, `no difference shown` or `too few to tell`.

        A difference is reported if the interval excludes zero and p is at most 0.05. With fewer than six
        clusters p cannot be that small, and a bootstrap interval alone is too narrow to be trusted.
        """
        low, high, n = self.difference.low, self.difference.high, self.difference.n
        if math.isnan(low) or low <= 0 <= high:
            return "no difference shown" if n > 1 else "too few to tell"
        if self.p_value > _SIGNIFICANT:
            return "no difference shown" if 2 / 2**n <= _SIGNIFICANT else "too few to tell"
        return "higher" if low > 0 else "lower"


def compare_pairs(
    first: Collection[Any],
    second: Collection[Any],
    *,
    clusters: Collection | None = None,
    seed: int = 0,
    n_resamples: int = 2000,
    level: float = 0.95,
) -> PairedComparison:
    """Compare two treatments unit by unit: intervals, and a test that does not assume a normal distribution.

    The test flips the sign of the differences of whole clusters: if the treatments had the same effect, both
    signs would be equally likely. It is exact for up to 13 clusters and uses 9999 random flips for more. With
    n clusters, no p value is below 2 / 2ⁿ.

    Args:
        first: values under one treatment.
        second: values under the other, in the same order. A unit that is NaN in either is skipped.
        clusters: one label per unit, as for `bootstrap_mean`; by default each unit is its own cluster.
        seed: seed of the resampling.
        n_resamples: number of bootstrap samples.
        level: confidence level.

    Raises:
        ValueError: the two differ in length, so their values cannot be paired.
    """
    first, second = _as_pairs(first, second)
    labels = np.arange(len(first)) if clusters is None else np.asarray(clusters)
    both = ~np.isnan(second - first)
    first, second, labels = first[both], second[both], labels[both]

    def mean(values: np.ndarray) -> Interval:
        return bootstrap_mean(values, clusters=labels, seed=seed, n_resamples=n_resamples, level=level)

    p_value = _flip_signs(second - first, labels, seed)
    return PairedComparison(mean(first), mean(second), mean(second - first), p_value, len(first))


def _flip_signs(differences: np.ndarray, labels: np.ndarray, seed: int) -> float:
    _, index = np.unique(labels, return_inverse=True)
    sums = np.bincount(index, weights=differences)
    if len(sums) < 2:
        return 1.0 if len(sums) else float("nan")
    from scipy.stats import permutation_test

    return float(
        permutation_test(
            (sums,),
            lambda values, axis: values.sum(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=9999,
            rng=np.random.default_rng(seed),
        ).pvalue
    )


@dataclass(frozen=True)
class McNemar:
    """Two treatments of the same units, each right or wrong.

    Attributes:
        only_first: number of units right under the first treatment alone.
        only_second: number of units right under the second treatment alone.
        p_value: two-sided p value of the exact test, whose null hypothesis is that both kinds are equally
            likely; 1 if there is neither.
    """

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Collection[Any], second: Collection[Any]) -> McNemar:
    """McNemar's test, exact, over units that are right (1) or wrong (0) under two treatments.

    Units count as independent. A unit that is NaN in either is skipped.

    Raises:
        ValueError: the two differ in length, or hold values other than 0 and 1.
    """
    first, second = _as_pairs(first, second)
    both = ~(np.isnan(first) | np.isnan(second))
    first, second = first[both], second[both]
    if not np.isin([*first, *second], (0.0, 1.0)).all():
        raise ValueError("McNemar's test needs values of 0 and 1 only")
    from scipy.stats import binomtest

    only_first, only_second = int((first > second).sum()), int((second > first).sum())
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing, 0.5).pvalue) if differing else 1.0
    return McNemar(only_first, only_second, p_value)


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
    """Probability that a positive scores above a negative, ties counting one half; NaN if either is empty."""
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


def mixture_threshold(values: Collection[Any]) -> float:
    """The value above which the highest group of a Gaussian mixture is more likely than all others.

    The mixture (`sklearn.mixture.GaussianMixture`) has one to three groups; the Bayesian information
    criterion decides how many. Turns have up to three kinds: without a context, with a context that the
    answer does not use, and with one that it uses. Values that all lie between 0 and 1, such as shares, are
    compared by their log-odds, in which the groups near 1 are less skewed. A group must hold at least ten
    values, so that a few outliers do not form one. If one group describes the values best, `otsu_threshold`
    splits them in two.
    """
    found = _sample(values)
    if len(np.unique(found)) < 3 or len(found) < _LEAST_IN_GROUP:
        return otsu_threshold(found)
    import warnings

    from scipy.special import expit, logit
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    shares = bool(found[0] >= 0 and found[-1] <= 1)
    points = logit(found.clip(_LEAST_SHARE, 1 - _LEAST_SHARE)) if shares else found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixtures: list[Any] = [
            GaussianMixture(groups, n_init=5, random_state=0).fit(points[:, None])
            for groups in range(1, min(_MOST_GROUPS, len(np.unique(points))) + 1)
        ]
    full = (mixture for mixture in mixtures if mixture.weights_.min() * len(points) >= _LEAST_IN_GROUP)
    best = min(full, key=lambda mixture: mixture.bic(points[:, None]))
    top = int(best.means_.argmax())
    grid = np.linspace(points[0], float(best.means_[top, 0]), 4096)
    others = grid[best.predict_proba(grid[:, None])[:, top] < 0.5]
    if not others.size:
        return otsu_threshold(found)
    return float(expit(others[-1]) if shares else others[-1])


def valley_threshold(values: Collection[Any]) -> float:
    """The value of least density between the rightmost peak of a distribution and the peak to its left.

    The density is a Gaussian kernel estimate (Scott's bandwidth); a peak must stand out by 2 % of the
    greatest density. If there is only one peak, `otsu_threshold` splits the values in two.
    """
    found = _sample(values)
    if len(np.unique(found)) < 3:
        return otsu_threshold(found)
    from scipy.signal import find_peaks
    from scipy.stats import gaussian_kde

    grid = np.linspace(found[0], found[-1], 512)
    density = gaussian_kde(found)(grid)
    peaks, _ = find_peaks(np.pad(density, 1), prominence=0.02 * density.max())
    if len(peaks) < 2:
        return otsu_threshold(found)
    low, high = peaks[-2:] - 1
    return float(grid[low + density[low : high + 1].argmin()])


def _sample(values: Collection[Any]) -> np.ndarray:
    """The sorted values without NaN; a large sample is replaced by `_DENSITY_POINTS` of its quantiles."""
    found = np.sort(np.asarray(values, dtype=float))
    found = found[~np.isnan(found)]
    if len(found) > _DENSITY_POINTS:
        found = np.quantile(found, np.linspace(0, 1, _DENSITY_POINTS))
    return found


def otsu_threshold(values: Collection[Any]) -> float:
    """The threshold that splits values into two groups with the least variance inside them.

    Otsu's rule (1979), exact on the values themselves instead of a histogram: the threshold lies halfway
    between the two neighbouring values of the best split. If all values are equal, it is that value.
    """
    found = np.sort(np.asarray(values, dtype=float))
    found = found[~np.isnan(found)]
    if not found.size:
        return float("nan")
    if found[0] == found[-1]:
        return float(found[0])
    count = np.arange(1, len(found))
    total = np.cumsum(found)
    below = total[:-1] / count
    above = (total[-1] - total[:-1]) / (len(found) - count)
    between = count * (len(found) - count) * (above - below) ** 2
    between[found[1:] == found[:-1]] = -1.0
    split = int(between.argmax())
    return float((found[split] + found[split + 1]) / 2)
