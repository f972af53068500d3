"""How well scores rank answers that need their context above others, with intervals over conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ctxlens.stats import Interval

Values = np.ndarray
LENGTH_RATIO = 1.25


def auroc(positive: np.ndarray, score: Values) -> float:
    """Probability that a positive scores above a negative; ties count half."""
    order = np.sort(score[~positive])
    above = np.searchsorted(order, score[positive], side="left")
    equal = np.searchsorted(order, score[positive], side="right") - above
    return float((above + equal / 2).mean() / len(order)) if len(order) and positive.any() else np.nan


def average_precision(positive: np.ndarray, score: Values) -> float:
    """Mean precision over the positives; equal scores are taken together."""
    order = np.argsort(-score, kind="stable")
    hits, ranked = np.cumsum(positive[order]), score[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    precision = hits[ends] / (ends + 1)
    gained = np.diff(hits[ends], prepend=0)
    return float((precision * gained).sum() / hits[-1]) if hits[-1] else np.nan


def auroc_at_equal_length(positive: np.ndarray, score: Values, length: np.ndarray) -> tuple[float, int]:
    """AUROC over the pairs whose prompts differ in length by less than a quarter, and how many there are."""
    won, pairs = 0.0, 0
    others, size = score[~positive], length[~positive]
    for one, own in zip(score[positive], length[positive], strict=True):
        near = (size < own * LENGTH_RATIO) & (own < size * LENGTH_RATIO)
        won += float((one > others[near]).sum() + (one == others[near]).sum() / 2)
        pairs += int(near.sum())
    return (won / pairs if pairs else np.nan), pairs


class EqualLength:
    """AUROCs at equal length of several scores on the same bootstrap samples of answers."""

    def __init__(
        self,
        positive: np.ndarray,
        lengths: Sequence[np.ndarray],
        scores: Mapping[str, Values],
        *,
        n: int = 1000,
    ) -> None:
        """Draw the samples: how often each of them holds every answer. Pairs are alike in all lengths."""
        rng, size = np.random.default_rng(0), len(positive)
        drawn = [np.bincount(rng.integers(0, size, size), minlength=size) for _ in range(n)]
        counts = np.stack([np.ones(size), *drawn])
        self.scores, self.positive = scores, positive
        self.counts = counts[:, positive], counts[:, ~positive]
        self.near = np.ones((positive.sum(), (~positive).sum()))
        for length in lengths:
            own, other = length[positive, None], length[~positive]
            self.near *= (other < own * LENGTH_RATIO) & (own < other * LENGTH_RATIO)
        self.pairs = self._sum(self.near)

    def _sum(self, by_pair: np.ndarray) -> np.ndarray:
        """The sum over pairs, for all answers and for every sample."""
        first, second = self.counts
        return ((first @ by_pair) * second).sum(1)

    def values(self, name: str) -> np.ndarray:
        """The AUROC of one score: of all answers, then of every sample."""
        score = self.scores[name]
        own, other = score[self.positive, None], score[~self.positive]
        return self._sum(((own > other) + (own == other) / 2) * self.near) / self.pairs

    def interval(self, name: str) -> Interval:
        """The AUROC of one score with its 95 % interval."""
        return quantile_interval(self.values(name), len(self.positive))

    def difference(self, first: str, second: str) -> Interval:
        """The AUROC of one score minus that of another, with the paired 95 % interval."""
        return quantile_interval(self.values(first) - self.values(second), len(self.positive))


def quantile_interval(values: np.ndarray, n: int) -> Interval:
    """An estimate, the first value, with the 95 % interval of the samples after it."""
    low, high = _interval(values[1:])
    return Interval(float(values[0]), low, high, n)


@dataclass(frozen=True)
class Ranking:
    """A score's AUROC and average precision, each with the values of the bootstrap samples."""

    auroc: float
    average_precision: float
    aurocs: np.ndarray
    average_precisions: np.ndarray

    def summary(self) -> dict[str, list[float]]:
        """Estimate, 2.5 and 97.5 % quantile of both."""
        return {
            "auroc": [self.auroc, *_interval(self.aurocs)],
            "average_precision": [self.average_precision, *_interval(self.average_precisions)],
        }


def rank(
    scores: Mapping[str, Values], positive: np.ndarray, clusters: np.ndarray, *, seed: int, n: int = 1000
) -> dict[str, Ranking]:
    """Rank by every score, with the same bootstrap samples of whole conversations, so that scores are paired.

    Args:
        scores: values by name, one per answer; a higher value means that the context is needed.
        positive: which answers need it.
        clusters: the conversation of each answer.
        seed: of the bootstrap.
        n: bootstrap samples.
    """
    rng = np.random.default_rng(seed)
    _, of = np.unique(clusters, return_inverse=True)
    members = [np.flatnonzero(of == cluster) for cluster in range(of.max() + 1)]
    samples = [
        np.concatenate([members[k] for k in rng.integers(0, len(members), len(members))]) for _ in range(n)
    ]
    found = {}
    for name, values in scores.items():
        drawn = [(auroc(positive[s], values[s]), average_precision(positive[s], values[s])) for s in samples]
        aurocs, precisions = np.array(drawn).T
        found[name] = Ranking(
            auroc(positive, values), average_precision(positive, values), aurocs, precisions
        )
    return found


def difference(first: Ranking, second: Ranking) -> list[float]:
    """AUROC of the first minus that of the second, with the paired interval."""
    return [first.auroc - second.auroc, *_interval(first.aurocs - second.aurocs)]


def _interval(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.nanquantile(values, (0.025, 0.975))]
