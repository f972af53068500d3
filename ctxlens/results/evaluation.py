"""Answers of models to the examples of evaluation tasks, by condition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ctxlens.errors import InputError
from ctxlens.results.tables import _Table
from ctxlens.stats import Interval, McNemar, PairedComparison, bootstrap_mean, compare_pairs, mcnemar

if TYPE_CHECKING:
    import pandas as pd

Variant = tuple[str, str]
"""A model and a condition."""


@dataclass(frozen=True)
class Evaluation(_Table):
    """Answers, one row a model, condition, task and example.

    Columns: `model`, `condition`, `task`; `example` (its number in the task: the same of other models and
    conditions is a pair); `filter` (lm-eval's filter of answers); `context` (a fingerprint of the text asked
    about: examples with one text are no independent units); `prompt` as the model got it before it was
    cut; `response`; `gold`; `truncated` (the prompt was cut to the window); `empty` (nothing was answered);
    and a column a metric, NaN where the task has none such. `meta` holds `metrics` (by task),
    `higher_is_better` (by metric), `left_out` (why a model was not asked under a condition).
    """

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "model", "condition", "task", "example", "filter", "context", "prompt", "response", "gold",
        "truncated", "empty",
    )  # fmt: skip

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in their order."""
        return tuple(self.frame["task"].drop_duplicates())

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The models and conditions, in their order; differences are from the first."""
        pairs = self.frame[["model", "condition"]].drop_duplicates()
        return tuple(zip(pairs["model"], pairs["condition"], strict=True))

    def metrics(self, task: str) -> tuple[str, ...]:
        """The metrics of a task.

        Raises:
            InputError: there is no such task.
        """
        if task not in self.meta["metrics"]:
            raise InputError(f"the evaluation has no task {task}; it has {', '.join(self.tasks)}.")
        return tuple(self.meta["metrics"][task])

    def is_binary(self, task: str, metric: str) -> bool:
        """Whether every value of a metric is 0 or 1."""
        values = self._of(task)[metric].dropna()
        return bool(values.isin((0.0, 1.0)).all()) and len(values) > 0

    def mean(self, task: str, metric: str, variant: Variant) -> Interval:
        """Mean of a metric with its 95 % interval over contexts."""
        values = self._values(task, metric, variant)
        return bootstrap_mean(values.to_numpy(), clusters=self._contexts(values))

    def compare(self, task: str, metric: str, first: Variant, second: Variant) -> PairedComparison:
        """Two variants on the examples that both have, with interval and sign-flip test over contexts."""
        one, other = self._paired(task, metric, first, second)
        return compare_pairs(one.to_numpy(), other.to_numpy(), clusters=self._contexts(one))

    def mcnemar(self, task: str, metric: str, first: Variant, second: Variant) -> McNemar:
        """McNemar's exact test of a metric of 0 and 1; examples count as independent.

        Raises:
            InputError: the metric has other values.
        """
        if not self.is_binary(task, metric):
            raise InputError(f"{metric} of {task} is not only 0 or 1, which McNemar's test needs.")
        one, other = self._paired(task, metric, first, second)
        return mcnemar(one.to_numpy(), other.to_numpy())

    def rows(self) -> Iterator[tuple[str, str, Variant]]:
        """Every task, metric and variant that there are answers for."""
        for task in self.tasks:
            found = self._of(task)
            have = set(zip(found["model"], found["condition"], strict=True))
            for metric in self.metrics(task):
                yield from ((task, metric, variant) for variant in self.variants if variant in have)

    def count(self, column: str, task: str, variant: Variant) -> int:
        """In how many rows `truncated` or `empty` is true."""
        return int(self._select(task, variant)[column].sum())

    def _of(self, task: str) -> pd.DataFrame:
        return self.frame[self.frame["task"] == task]

    def _select(self, task: str, variant: Variant) -> pd.DataFrame:
        of_task = self._of(task)
        return of_task[(of_task["model"] == variant[0]) & (of_task["condition"] == variant[1])]

    def _values(self, task: str, metric: str, variant: Variant) -> pd.Series:
        if metric not in self.metrics(task):
            raise InputError(f"{task} has no metric {metric}; it has {', '.join(self.metrics(task))}.")
        found = self._select(task, variant)
        keys = ["example", "filter", "context"]
        return found.set_index(keys)[metric]

    def _paired(self, task: str, metric: str, first: Variant, second: Variant) -> tuple[pd.Series, pd.Series]:
        one, other = (self._values(task, metric, variant) for variant in (first, second))
        both = one.index.intersection(other.index)
        return one[both], other[both]

    @staticmethod
    def _contexts(values: pd.Series) -> np.ndarray:
        return values.index.get_level_values("context").to_numpy()


__all__ = ["Evaluation", "Variant"]
