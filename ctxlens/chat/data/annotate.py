"""Mark the user messages that carry the indicator; `render(..., indicator="[IND]")` appends it there.

`ctxlens.chat.data.marked_files` writes the marks into a data set's own rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ctxlens.chat.data import Conversation, as_conversations
from ctxlens.chat.data.given_rows import Source
from ctxlens.chat.roles import INDICATOR_KEY
from ctxlens.chat.roles.chat import Message
from ctxlens.errors import InputError


def annotate_messages(
    conversations: Iterable[Conversation] | Source, turns: Collection[tuple[str, int]]
) -> list[Conversation]:
    """Mark the user messages that the selected assistant turns answer.

    Args:
        conversations: the data set, or what `load_conversations` takes.
        turns: pairs of conversation id and index of the assistant message, such as `Selection.turns`.

    Returns:
        The conversations in the given order. A marked user message carries `{"indicator": True}`, which
        `render(..., indicator="[IND]")` turns into the token. Nothing else is changed.

    Raises:
        InputError: a turn is not in the data, is not an assistant message, or answers no user message.
    """
    wanted: dict[str, set[int]] = defaultdict(set)
    for name, turn in turns:
        wanted[name].add(int(turn))
    annotated = []
    for conversation in as_conversations(conversations):
        chosen = wanted.pop(conversation.id, set())
        marked = {_asking(conversation, turn) for turn in chosen}
        messages = tuple(
            {**message, INDICATOR_KEY: True} if index in marked else message
            for index, message in enumerate(conversation.messages)
        )
        annotated.append(replace(conversation, messages=messages) if marked else conversation)
    if wanted:
        missing = next(iter(wanted))
        raise InputError(
            f"{len(wanted)} selected conversations are not in the data set (for example {missing!r}); the "
            "selection belongs to other data."
        )
    return annotated


def _asking(conversation: Conversation, turn: int) -> int:
    """Index of the user message that an assistant turn answers."""
    messages = conversation.messages
    if not 0 <= turn < len(messages) or messages[turn]["role"] != "assistant":
        raise InputError(
            f"turn {turn} of conversation {conversation.id!r} is selected but is not an assistant message; "
            "the selection belongs to other data."
        )
    for index in range(turn - 1, -1, -1):
        if messages[index]["role"] == "user":
            return index
    raise InputError(f"turn {turn} of conversation {conversation.id!r} answers no user message.")


def mark_last_question(messages: Sequence[Message], mark: bool | str = True) -> list[dict[str, Any]]:
    """Copy a conversation with the indicator's mark on its last user message, and on no other.

    Args:
        messages: the conversation; marks that it carries already are dropped.
        mark: `True` for the model's indicator, a text for another token, `False` to only drop marks.

    Raises:
        InputError: there is no user message that could carry the mark.
    """
    copied = [{key: value for key, value in message.items() if key != INDICATOR_KEY} for message in messages]
    if mark:
        asked = [index for index, message in enumerate(copied) if message["role"] == "user"]
        if not asked:
            raise InputError("the conversation has no user message that could carry the indicator.")
        copied[asked[-1]][INDICATOR_KEY] = mark
    return copied


__all__ = ["annotate_messages", "mark_last_question"]
