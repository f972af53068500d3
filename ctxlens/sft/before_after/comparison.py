"""The table of before and after: every row a paired comparison, with interval, test and reading."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ctxlens.results import Ability, NeedleGrid
from ctxlens.stats import Interval, PairedComparison, compare_pairs

BASE, TRAINED = "base", "trained"
"""What the two models are called in tables and files."""

CONDITIONS = {"plain+prefix": "no template", "template+prefix": "template"}
_COLUMNS = {"recall": "needle recall", "memory_recall": "answered from memory"}
_CLOSED = "closed-book recall"


@dataclass(frozen=True)
class Row:
    """One measure of two treatments of the same texts or questions.

    Attributes:
        measure: what is measured, in words.
        first, second: the two treatments, in words.
        found: their means, the paired difference (second minus first) and its test.
    """

    measure: str
    first: str
    second: str
    found: PairedComparison

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        found = self.found
        return {
            "measure": self.measure, "first": self.first, "second": self.second,
            "first_mean": found.first.as_dict(), "second_mean": found.second.as_dict(),
            "difference": found.difference.as_dict(), "p_value": found.p_value, "pairs": found.pairs,
            "reading": found.reading,
        }  # fmt: skip

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Row:
        """The row that `as_dict` has written; null reads as NaN."""

        def number(value: float | int | None) -> float:
            return math.nan if value is None else float(value)

        def interval(of: Mapping[str, Any]) -> Interval:
            return Interval(number(of["estimate"]), number(of["low"]), number(of["high"]), int(of["n"]))

        first, second, difference = (
            interval(record[key]) for key in ("first_mean", "second_mean", "difference")
        )
        found = PairedComparison(first, second, difference, number(record["p_value"]), record["pairs"])
        return cls(record["measure"], record["first"], record["second"], found)


def models_rows(grid: NeedleGrid, ability: Ability | None) -> list[Row]:
    """The trained model against the one it started from: on every needle, and without any context.

    The base has no indicator: where the trained model is asked with it, the base is asked without.

    Args:
        grid: cells of both models, called `BASE` and `TRAINED`.
        ability: closed-book answers of both, or None.
    """
    rows = []
    for needle, condition in _cases(grid):
        for indicator in _indicators(grid.frame):
            second = f"{CONDITIONS[condition]}{' + indicator' if indicator else ''}"
            rows += _needle_rows(
                grid, needle, (BASE, condition, False), (TRAINED, condition, indicator),
                (f"{BASE}, {CONDITIONS[condition]}", f"{TRAINED}, {second}"),
            )  # fmt: skip
    return [*rows, *(_closed_rows(ability) if ability else ())]


def treatments_rows(grid: NeedleGrid) -> list[Row]:
    """What the template costs each model, and what the indicator gives the trained one."""
    rows: list[Row] = []
    frame = grid.frame
    for needle in dict.fromkeys(frame["needle"]):
        plain, template = CONDITIONS
        if template not in set(frame["condition"]):
            continue
        for model in (BASE, TRAINED):
            names = (f"{model}, no template", f"{model}, template")
            rows += _needle_rows(grid, needle, (model, plain, False), (model, template, False), names)
        if any(_indicators(frame)):
            asked = (TRAINED, template, True)
            for condition, name in ((template, "template"), (plain, "no template")):
                names = (f"{TRAINED}, {name}", f"{TRAINED}, template + indicator")
                rows += _needle_rows(grid, needle, (TRAINED, condition, False), asked, names)
    return [row for row in rows if row.measure.startswith(_COLUMNS["recall"])]


def _cases(grid: NeedleGrid) -> Iterator[tuple[str, str]]:
    frame = grid.frame
    for needle in dict.fromkeys(frame["needle"]):
        for condition in CONDITIONS:
            if condition in set(frame["condition"]):
                yield needle, condition


def _indicators(frame: Any) -> tuple[bool, ...]:
    return (False, True) if frame["indicator"].astype(bool).any() else (False,)


def _needle_rows(
    grid: NeedleGrid,
    needle: str,
    first: tuple[str, str, bool],
    second: tuple[str, str, bool],
    names: tuple[str, str],
) -> Iterator[Row]:
    for column, what in _COLUMNS.items():
        found = grid.compare(_choose(needle, first), _choose(needle, second), column=column)
        if found.pairs:
            yield Row(f"{what}: {needle}", *names, found)


def _choose(needle: str, which: tuple[str, str, bool]) -> Mapping[str, Any]:
    model, condition, indicator = which
    return {"model": model, "condition": condition, "indicator": indicator, "needle": needle}


def _closed_rows(ability: Ability) -> Iterator[Row]:
    frame = ability.frame
    for template in (False, True):
        for indicator in _indicators(frame):
            said = "template" if template else "no template"
            sides = []
            for model, with_indicator in ((BASE, False), (TRAINED, indicator)):
                keep = (frame["of"] == model) & (frame["indicator"] == with_indicator)
                sides.append(frame[keep & (frame["template"] == template)].set_index("question")["recall"])
            both = sides[0].index.intersection(sides[1].index)
            if not both.empty:
                found = compare_pairs(*(side[both].to_numpy() for side in sides))
                more = " + indicator" if indicator else ""
                yield Row(_CLOSED, f"{BASE}, {said}", f"{TRAINED}, {said}{more}", found)


__all__ = ["BASE", "TRAINED", "Row", "models_rows", "treatments_rows"]
