"""Training steps in names of checkpoints: `checkpoint-500`, `global_step2000`, `repo@step1000`, `epoch-3`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_STEP = re.compile(
    r"(?<![a-z])(global[-_]?step|step|checkpoint|ckpt|iteration|iter|epoch)s?[-_=]?(\d+(?:\.\d+)?)(k|m)?"
    r"(?![a-z0-9])",
    re.IGNORECASE,
)
_FACTORS = {"": 1, "k": 1000, "m": 1_000_000}


@dataclass(frozen=True)
class Step:
    """How far a checkpoint was trained.

    Attributes:
        number: the number.
        unit: `step` or `epoch`.
    """

    number: float
    unit: str


def find_step(name: str) -> Step | None:
    """The step that a name states, the last one if there are several; steps come before epochs.

    None if the name states none.
    """
    found = [
        Step(float(number) * _FACTORS[factor.lower()], "epoch" if word.lower() == "epoch" else "step")
        for word, number, factor in _STEP.findall(name)
    ]
    steps = [one for one in found if one.unit == "step"]
    return (steps or found or [None])[-1]


def steps_of(names: Sequence[str]) -> list[Step] | None:
    """The steps of all names; None if one has none, if two are equal, or if their units differ."""
    found = [step for name in names if (step := find_step(name)) is not None]
    if len(found) < len(names) or len({one.unit for one in found}) > 1:
        return None
    return found if len({one.number for one in found}) == len(found) else None


def order_checkpoints(names: Sequence[str]) -> list[str]:
    """The names by step; in the given order if their steps cannot be compared, see `steps_of`."""
    steps = steps_of(names)
    if steps is None:
        return list(names)
    return [name for _, name in sorted(zip((one.number for one in steps), names, strict=True))]


__all__ = ["Step", "find_step", "order_checkpoints", "steps_of"]
