"""How figures, pages and terminal tables name conditions: always by `Condition.name`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ctxlens.chat.condition import Condition
from ctxlens.errors import InputError

_MEANINGS = {
    "plain": "no chat template",
    "template": "with the chat template",
    "assistant": "with the chat template and the context in the assistant's turn",
    "prefix": "the answer starts with the first words of the expected one",
    "indicator": "the question carries the indicator token",
    "steered": "attention to all tokens but the user's is multiplied by α",
}
_MOST_LISTED_HEADS = 4


def condition_name(
    condition: object,
    *,
    indicator: object = False,
    alpha: float | None = 1.0,
    target_share: float | None = None,
    heads: str = "all",
) -> str:
    """The full name of a condition; in needle grids, indicator and steering are columns of their own.

    Files of earlier versions are understood. A condition that ctxlens cannot read (from another tool) keeps
    its own words.

    Args:
        condition: the condition's name, or the column `condition` of a grid.
        indicator: whether the question carries the indicator.
        alpha: factor of the steering; 1 or None: not steered by a factor.
        target_share: share of attention that steering gives to the user's tokens, in place of `alpha`.
        heads: the steered heads.
    """
    try:
        known = Condition.parse(str(condition))
        if indicator:
            known = replace(known, indicator=True)
        if target_share is not None:
            known = replace(known, alpha=None, target_share=target_share, heads=heads)
        elif alpha not in (None, 1.0):
            known = replace(known, alpha=alpha, target_share=None, heads=heads)
        return known.name
    except InputError:
        return f"{condition}{'+indicator' if indicator else ''}"


def steered_name(condition: object, steering: Iterable[Mapping[str, Any]]) -> str:
    """The full name of a condition under steering, as `Steering.describe` records it in a result's `meta`."""
    name = condition_name(condition)
    for one in steering:
        heads = one.get("heads", "all")
        if not isinstance(heads, str):
            heads = "/".join(heads) if len(heads) <= _MOST_LISTED_HEADS else "chosen"
        share = one.get("target_share")
        alpha = one.get("alpha") if share is None else None
        found = condition_name(name, alpha=alpha, target_share=share, heads=heads)
        # Only one steering to the user has a name; several, or steering to other roles, are told apart.
        simple = one.get("roles", ["user"]) == ["user"] and "steered" not in name
        name = found if simple else f"{name}, steered"
    return name


def explain_conditions(names: Iterable[str]) -> str:
    """One sentence on what the words in these names mean, for captions; empty if there are no names."""
    words = {word.partition(":")[0] for name in names for word in name.split("+")}
    meanings = [f"{word} ({meaning})" for word, meaning in _MEANINGS.items() if word in words]
    return f"Conditions: {', '.join(meanings)}." if meanings else ""


__all__ = ["condition_name", "explain_conditions", "steered_name"]
