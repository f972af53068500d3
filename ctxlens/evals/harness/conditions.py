"""Conditions under which a model answers, in words: `plain`, `vanilla`, `indicator`, `steered:0.95`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ctxlens.errors import InputError
from ctxlens.models.attention.steering import Steering, as_heads

HOW = (
    "plain (no chat template), vanilla (template), indicator (template and indicator), steered:ALPHA or "
    "steered:ALPHA:LAYER.HEAD/LAYER.HEAD (template unless plain), joined by + where both apply, such as "
    "indicator+steered:0.5"
)


@dataclass(frozen=True)
class Condition:
    """How a model is asked.

    Attributes:
        name: the words, as in tables.
        template: whether the chat template is applied.
        indicator: whether the last user message carries the model's indicator.
        steering: attention steering, or none.
    """

    name: str
    template: bool = True
    indicator: bool = False
    steering: Steering | None = None


def parse_condition(words: str) -> Condition:
    """A condition from its words.

    Raises:
        InputError: words that mean nothing, or exclude each other.
    """
    name = words.strip()
    parts = [part.strip() for part in name.split("+")]
    steering: Steering | None = None
    for part in parts:
        kind, _, strength = part.partition(":")
        if kind == "steered" and strength and steering is None:
            steering = _parse_steering(strength)
        elif part not in ("plain", "vanilla", "indicator"):
            raise InputError(f"condition {name!r} cannot be read at {part!r}; conditions are {HOW}.")
    if len(set(parts)) < len(parts) or {"plain", "vanilla"} <= set(parts):
        raise InputError(f"condition {name!r} contradicts itself or says a thing twice.")
    return Condition(name, "plain" not in parts, "indicator" in parts, steering)


def parse_conditions(words: str | Sequence[str]) -> tuple[Condition, ...]:
    """Conditions from words, or from one text with commas between them.

    Raises:
        InputError: none, one that cannot be read, or one that is named twice.
    """
    each = words.split(",") if isinstance(words, str) else words
    found = tuple(parse_condition(one) for one in each if one.strip())
    names = [condition.name for condition in found]
    if not found:
        raise InputError(f"no condition is given; conditions are {HOW}.")
    if len(set(names)) < len(names):
        raise InputError(f"a condition is named twice: {', '.join(names)}.")
    return found


def _parse_steering(strength: str) -> Steering:
    alpha, _, heads = strength.partition(":")
    try:
        return Steering(float(alpha), heads=as_heads(heads.replace("/", ",") or "all"))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"steered:{strength} needs a number after the colon, as in steered:0.95.") from None


__all__ = ["HOW", "Condition", "parse_condition", "parse_conditions"]
