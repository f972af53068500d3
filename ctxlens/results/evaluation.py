"""Answers of models to the examples of evaluation tasks, by condition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ctxlens.chat.condition import Condition
from ctxlens.errors import InputError
from ctxlens.results.tables import _Table
from ctxlens.stats import Interval, McNemar, PairedComparison, bootstrap_mean, compare_pairs, mcnemar

if TYPE_CHECKING:
    import pandas as pd

Variant = tuple[str, str]
"""A model and a condition."""


@dataclass(frozen=True, repr=False)
class Evaluation(_Table):
    """Answers, one row per model, condition, task and example.

    Columns: `model`; `condition` (`Condition.name`); `task`; `example` (its number in the task; answers of
    several models and conditions to the same example are paired); `filter` (lm-eval's filter of answers);
    `context` (identifies the text that is asked about; examples with the same text are not independent);
    `prompt` (as rendered for the model, before truncation); `response`; `gold`; `truncated` (the prompt was
    truncated to the window); `empty` (the response has no text, or only a label such as `A:`); `cut` (the
    response was cut off at its longest; missing in files of earlier versions); and one column per metric, NaN
    if the task does not have it. `meta` holds `metrics` (by task), `higher_is_better` (by metric) and
    `left_out` (why a model was not asked under a condition).
    """

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "model", "condition", "task", "example", "filter", "context", "prompt", "response", "gold",
        "truncated", "empty",
    )  # fmt: skip
    KNOWN: ClassVar[tuple[str, ...]] = (*COLUMNS, "cut")
    """All columns that are not metrics."""
    FAULTS: ClassVar[tuple[str, ...]] = ("truncated", "empty", "cut")
    """The columns that say what is wrong with an example."""

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read an evaluation that `save` has written.

        Names of conditions as earlier versions spelled them (`vanilla`, `steered:0.95`) are translated, in
        the table and in `meta`.

        Raises:
            InputError: there is no such file, or it is not an evaluation.
        """
        found = super().load(path)
        names = {name: _translate(name) for name in found.frame["condition"].drop_duplicates()}
        frame = found.frame
        if earlier := {name: now for name, now in names.items() if name != now}:
            frame = frame.assign(condition=frame["condition"].replace(earlier))
        return cls(frame, _translate_meta(found.meta))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks in the order of the rows."""
        return tuple(self.frame["task"].drop_duplicates())

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The pairs of model and condition in the order of the rows; differences are from the first pair."""
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
        """Compare two variants on the examples that both have: interval and sign-flip test over contexts."""
        one, other = self._paired(task, metric, first, second)
        return compare_pairs(one.to_numpy(), other.to_numpy(), clusters=self._contexts(one))

    def mcnemar(self, task: str, metric: str, first: Variant, second: Variant) -> McNemar:
        """McNemar's exact test of a metric whose values are 0 and 1; examples count as independent.

        Raises:
            InputError: the metric has other values.
        """
        if not self.is_binary(task, metric):
            raise InputError(f"{metric} of {task} is not only 0 or 1, as McNemar's test needs; use compare.")
        one, other = self._paired(task, metric, first, second)
        return mcnemar(one.to_numpy(), other.to_numpy())

    def rows(self) -> Iterator[tuple[str, str, Variant]]:
        """Every combination of task, metric and variant that has answers."""
        for task in self.tasks:
            found = self._of(task)
            have = set(zip(found["model"], found["condition"], strict=True))
            for metric in self.metrics(task):
                yield from ((task, metric, variant) for variant in self.variants if variant in have)

    def count(self, column: str, task: str, variant: Variant) -> int:
        """The number of rows in which one of `FAULTS` is true; 0 if the file does not say."""
        return int(self._select(task, variant)[column].sum()) if column in self.frame else 0

    def share(self, column: str, task: str, variant: Variant) -> float:
        """The share of rows in which one of `FAULTS` is true; NaN if the variant has no rows."""
        rows = len(self._select(task, variant))
        return self.count(column, task, variant) / rows if rows else float("nan")

    def summary(self) -> list[dict[str, Any]]:
        """Mean and difference from the first variant by task, metric and variant, and counts of faults."""
        found = []
        for task, metric, variant in self.rows():
            counts = {name: self.count(name, task, variant) for name in self.FAULTS}
            pair = self.compare(task, metric, self.variants[0], variant)
            found.append(
                {
                    "task": task, "metric": metric, "model": variant[0], "condition": variant[1],
                    "examples": len(self._select(task, variant)), **counts,
                    "mean": self.mean(task, metric, variant).as_dict(),
                    "difference": {
                        **pair.difference.as_dict(), "p_value": pair.p_value, "pairs": pair.pairs,
                        "reading": pair.reading,
                    },
                }
            )  # fmt: skip
        return found

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


def _translate(name: str) -> str:
    """The current spelling of a condition; text that is not a condition stays unchanged."""
    try:
        return Condition.parse(name).name
    except InputError:
        return name


def _translate_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` with conditions in the current spelling; earlier versions described each by a mapping."""
    found = dict(meta)
    if "conditions" in found:
        names = [one["name"] if isinstance(one, Mapping) else one for one in found["conditions"]]
        found["conditions"] = [_translate(name) for name in names]
    if "left_out" in found:
        found["left_out"] = [{**one, "condition": _translate(one["condition"])} for one in found["left_out"]]
    return found


__all__ = ["Evaluation", "Variant"]
