"""The table of before and after: each row is a paired comparison with interval, test and reading."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ctxlens.chat.condition import Condition, parse_conditions
from ctxlens.results import Ability, NeedleGrid
from ctxlens.stats import Interval, PairedComparison, compare_pairs

BASE, TRAINED = "base", "trained"
"""The names of the two models in tables and files."""

PLAIN, TEMPLATE = parse_conditions("plain+prefix,template+prefix")
"""The conditions of needles; the conditions of closed-book questions are named without the prefix."""
_EARLIER = {
    "no template": "plain", "template": "template",
    "no template + indicator": "plain+indicator", "template + indicator": "template+indicator",
}  # fmt: skip
"""Conditions as evaluations of earlier versions call them, without the prefix of needles."""
_COLUMNS = {"recall": "needle recall", "memory_recall": "answered from memory"}
_CLOSED = "closed-book recall"


@dataclass(frozen=True)
class Row:
    """One measure of two treatments of the same texts or questions.

    A treatment is a model and a condition, such as `trained, template+prefix+indicator`.

    Attributes:
        measure: what is measured, in words.
        first: the first treatment.
        second: the second treatment.
        found: their means, the paired difference (second minus first) and its test.
    """

    measure: str
    first: str
    second: str
    found: PairedComparison

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON values."""
        found = self.found
        return {
            "measure": self.measure, "first": self.first, "second": self.second,
            "first_mean": found.first.as_dict(), "second_mean": found.second.as_dict(),
            "difference": found.difference.as_dict(), "p_value": found.p_value, "pairs": found.pairs,
            "reading": found.reading,
        }  # fmt: skip

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Row:
        """Read a row that `as_dict` has written, also by an earlier version; null is read as NaN."""

        def number(value: float | int | None) -> float:
            return math.nan if value is None else float(value)

        def interval(of: Mapping[str, Any]) -> Interval:
            return Interval(number(of["estimate"]), number(of["low"]), number(of["high"]), int(of["n"]))

        first, second, difference = (
            interval(record[key]) for key in ("first_mean", "second_mean", "difference")
        )
        found = PairedComparison(first, second, difference, number(record["p_value"]), record["pairs"])
        measure = record["measure"]
        first_side, second_side = (_translate(record[key], measure) for key in ("first", "second"))
        return cls(measure, first_side, second_side, found)


def _name(model: str, condition: Condition) -> str:
    return f"{model}, {condition.name}"


def _translate(side: str, measure: str) -> str:
    """A treatment in the one spelling of conditions, whichever version has written it."""
    model, _, said = side.partition(", ")
    if said not in _EARLIER:
        return side
    condition = Condition.parse(_EARLIER[said])
    return _name(model, condition if measure == _CLOSED else replace(condition, prefix=True))


def models_rows(grid: NeedleGrid, ability: Ability | None) -> list[Row]:
    """Compare the trained model with the base: on every needle, and without any context.

    The base has no indicator, so it is asked without one even where the trained model is asked with it.

    Args:
        grid: cells of both models, which are called `BASE` and `TRAINED`.
        ability: closed-book answers of both, or None.
    """
    rows: list[Row] = []
    for needle in dict.fromkeys(grid.frame["needle"]):
        for condition in _asked(grid):
            for indicator in _indicators(grid.frame):
                treated = replace(condition, indicator=indicator)
                rows += _needle_rows(grid, needle, (BASE, condition), (TRAINED, treated))
    return [*rows, *(_closed_rows(ability) if ability else ())]


def treatments_rows(grid: NeedleGrid) -> list[Row]:
    """What the template costs each model, and what the indicator gives the trained one."""
    if TEMPLATE not in _asked(grid):
        return []
    pairs = [((model, PLAIN), (model, TEMPLATE)) for model in (BASE, TRAINED)]
    if any(_indicators(grid.frame)):
        marked = (TRAINED, replace(TEMPLATE, indicator=True))
        pairs += [((TRAINED, TEMPLATE), marked), ((TRAINED, PLAIN), marked)]
    rows = [
        row
        for needle in dict.fromkeys(grid.frame["needle"])
        for first, second in pairs
        for row in _needle_rows(grid, needle, first, second)
    ]
    return [row for row in rows if row.measure.startswith(_COLUMNS["recall"])]


def _asked(grid: NeedleGrid) -> list[Condition]:
    """The conditions that the grid holds, among those of the table."""
    names = set(grid.frame["condition"])
    return [condition for condition in (PLAIN, TEMPLATE) if condition.name in names]


def _indicators(frame: Any) -> tuple[bool, ...]:
    return (False, True) if frame["indicator"].astype(bool).any() else (False,)


def _needle_rows(
    grid: NeedleGrid, needle: str, first: tuple[str, Condition], second: tuple[str, Condition]
) -> Iterator[Row]:
    chosen = [
        {
            "model": model,
            "condition": condition.asking.name,
            "indicator": condition.indicator,
            "needle": needle,
        }
        for model, condition in (first, second)
    ]
    for column, what in _COLUMNS.items():
        found = grid.compare(*chosen, column=column)
        if found.pairs:
            yield Row(f"{what}: {needle}", _name(*first), _name(*second), found)


def _closed_rows(ability: Ability) -> Iterator[Row]:
    frame = ability.frame
    for template in (False, True):
        for indicator in _indicators(frame):
            sides = (
                (BASE, Condition(template=template)),
                (TRAINED, Condition(template=template, indicator=indicator)),
            )
            first, second = (_closed_recall(frame, *side) for side in sides)
            both = first.index.intersection(second.index)
            if not both.empty:
                found = compare_pairs(first[both].to_numpy(), second[both].to_numpy())
                yield Row(_CLOSED, _name(*sides[0]), _name(*sides[1]), found)


def _closed_recall(frame: Any, model: str, condition: Condition) -> Any:
    """Closed-book recall of one treatment, by question."""
    keep = (frame["of"] == model) & (frame["indicator"] == condition.indicator)
    return frame[keep & (frame["template"] == condition.template)].set_index("question")["recall"]


__all__ = ["BASE", "TRAINED", "Row", "models_rows", "treatments_rows"]
