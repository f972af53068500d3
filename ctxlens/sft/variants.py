"""Variants of training on selected turns: control, dropout, a second indicator, upsampling.

Each takes conversations and returns conversations; `ctxlens.sft.marks` applies those of a recipe.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ctxlens.chat.data import Conversation
from ctxlens.chat.roles import INDICATOR_KEY
from ctxlens.errors import InputError


def answered_messages(conversation: Conversation) -> dict[int, int]:
    """The user messages that an assistant message answers, each with the index of its last answer."""
    answered: dict[int, int] = {}
    asked = None
    for index, message in enumerate(conversation.messages):
        if message["role"] == "user":
            asked = index
        elif message["role"] == "assistant" and asked is not None:
            answered[asked] = index
    return answered


def draw_control(data: Sequence[Conversation], count: int, seed: int) -> set[tuple[str, int]]:
    """Draw `count` answered turns at random, as a control that a selection must outperform.

    Raises:
        InputError: there are fewer answered turns.
    """
    turns = [(one.id, turn) for one in data for turn in answered_messages(one).values()]
    if count > len(turns):
        raise InputError(
            f"{count} turns are selected, but only {len(turns)} turns of the data answer a user."
        )
    drawn = np.random.default_rng([seed, 1]).choice(len(turns), size=count, replace=False)
    return {turns[int(k)] for k in drawn}


def repeat_selected(
    data: Sequence[Conversation], turns: Collection[tuple[str, int]], times: int
) -> list[Conversation]:
    """Repeat every conversation that contains a selected turn `times` times, one after another."""
    chosen = {name for name, _ in turns}
    return [one for one in data for _ in range(times if one.id in chosen else 1)]


def drop_marks(data: Sequence[Conversation], share: float, seed: int) -> list[Conversation]:
    """Remove the mark from a random share of the marked messages, rounded to whole messages."""
    places = [
        (number, index)
        for number, one in enumerate(data)
        for index, message in enumerate(one.messages)
        if message.get(INDICATOR_KEY) is True
    ]
    drawn = np.random.default_rng([seed, 2]).permutation(len(places))[: round(share * len(places))]
    dropped: dict[int, dict[int, str | None]] = defaultdict(dict)
    for number, index in (places[int(k)] for k in drawn):
        dropped[number][index] = None
    return [_marked(one, dropped.get(number, {})) for number, one in enumerate(data)]


def mark_rest(data: Sequence[Conversation], text: str, *, indicator: str) -> list[Conversation]:
    """Mark the answered messages that have neither a mark nor the indicator in their text with `text`."""

    def is_selected(message: Mapping[str, Any]) -> bool:
        return bool(message.get(INDICATOR_KEY)) or indicator in (message.get("content") or "")

    return [
        _marked(one, {at: text for at in answered_messages(one) if not is_selected(one.messages[at])})
        for one in data
    ]


def _marked(conversation: Conversation, marks: Mapping[int, str | None]) -> Conversation:
    """Replace the marks of some messages; None removes a mark."""
    if not marks:
        return conversation
    messages = [
        {key: value for key, value in message.items() if key != INDICATOR_KEY or index not in marks}
        for index, message in enumerate(conversation.messages)
    ]
    for index, mark in marks.items():
        if mark is not None:
            messages[index][INDICATOR_KEY] = mark
    return replace(conversation, messages=tuple(messages))


__all__ = ["answered_messages", "draw_control", "drop_marks", "mark_rest", "repeat_selected"]
