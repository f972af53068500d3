"""Columns that hold their turns as text: JSON, or lists as Python prints them, as CSV files have them."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

_COLUMNS = (
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "completion",
    "response",
    "chosen",
    "history",
)
_ALWAYS_TURNS = ("messages", "conversations", "conversation", "history")
_SPEAKERS = ("role", "from")


def decode_turns(row: Any) -> Any:
    """The row with lists in place of texts that hold a list of turns; other rows are returned as they are.

    A text in a column such as ``prompt`` counts as a list of turns only if every item names its speaker.
    """
    if not isinstance(row, Mapping):
        return row
    found = {name: turns for name in _COLUMNS if (turns := _decode(row.get(name), name)) is not None}
    return {**row, **found} if found else row


def _decode(value: Any, column: str) -> list[Any] | None:
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    turns = _read_list(value.strip())
    if turns is None:
        return None
    named = all(isinstance(turn, Mapping) and any(key in turn for key in _SPEAKERS) for turn in turns)
    return turns if column in _ALWAYS_TURNS or (turns and named) else None


def _read_list(text: str) -> list[Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    return value if isinstance(value, list) else None


__all__ = ["decode_turns"]
