"""What follows from the readings: which one is the best, and when the training stops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ctxlens.errors import InputError

RECALL = "recall_template"
QUANTITIES = (
    RECALL, "recall_plain", "recall_indicator", "user_share_template", "user_share_plain", "closed_book",
)  # fmt: skip
"""What a reading measures. `recall_indicator` exists only for a model that has an indicator."""
PREFIX = "context/"
"""What the names of the quantities begin with in a trainer's log."""
_IN_A_ROW = 2


def has_fallen(readings: Sequence[Mapping[str, Any]], by: float) -> bool:
    """Whether the recall with the template is lost.

    It is lost when two readings in a row lie more than `by` below the first reading. One reading alone may be
    an outlier, because few texts are asked.

    Args:
        readings: all readings, in the order of their steps.
        by: the difference in recall, above 0.
    """
    values = recalls(readings)
    return len(values) > _IN_A_ROW and all(value < values[0] - by for value in values[-_IN_A_ROW:])


def recalls(readings: Sequence[Mapping[str, Any]]) -> list[float]:
    """The recall with the template of the readings that have one."""
    return [value for one in readings if (value := one.get(RECALL)) is not None]


def is_best(value: float | None, others: Sequence[float | None]) -> bool:
    """Whether a value is higher than all others; a missing one never is."""
    if value is None or math.isnan(value):
        return False
    return all(other is None or math.isnan(other) or value > other for other in others)


def find_metric(args: Any) -> str | None:
    """The quantity that `metric_for_best_model` of a trainer's arguments names; None if it is none of ours.

    Raises:
        InputError: it begins like one of our quantities, but there is no such quantity.
    """
    name = (getattr(args, "metric_for_best_model", None) or "").removeprefix("eval_")
    if not name.startswith(PREFIX):
        return None
    return check_quantity(name.removeprefix(PREFIX), "metric_for_best_model")


def check_quantity(name: str, key: str) -> str:
    """The quantity itself; `InputError` if there is none of this name."""
    name = name.removeprefix(PREFIX)
    if name not in QUANTITIES:
        raise InputError(f"{key} names {name!r}, which is not measured; choose from {', '.join(QUANTITIES)}.")
    return name


__all__ = [
    "PREFIX", "QUANTITIES", "RECALL", "check_quantity", "find_metric", "has_fallen", "is_best", "recalls",
]  # fmt: skip
