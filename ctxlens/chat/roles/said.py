"""What the messages of a conversation say, text by text, and messages whose texts can be followed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ctxlens.chat.roles.chat import INDICATOR_KEY, TRAIN_KEY, Message
from ctxlens.chat.roles.traced import Traced, concat, plain_text

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_SAID_KEYS = ("content", *REASONING_KEYS, "tool_plan")
_SAID_IN_CALLS = ("name", "arguments")

Path = tuple[str | int, ...]


class Field(NamedTuple):
    """One text that somebody said: a message's content, its reasoning, or a string of a tool call."""

    turn: int
    path: Path
    text: str

    @property
    def name(self) -> str:
        """The place in the message in words, such as ``tool_calls.0.function.name``."""
        return ".".join(str(part) for part in self.path)

    @property
    def is_indicator(self) -> bool:
        """Whether ctxlens appended this text as an indicator."""
        return self.path == (INDICATOR_KEY,)

    @property
    def is_function_name(self) -> bool:
        """Whether this text is the name of the function that a tool call asks for."""
        return self.path[0] == "tool_calls" and self.path[-1] == "name"


def trace_messages(
    messages: Sequence[Message], marks: Mapping[int, str]
) -> tuple[list[dict[str, Any]], list[Field]]:
    """Copy messages with texts that can be followed.

    Args:
        messages: The conversation.
        marks: Texts to append to the contents of some messages.

    Returns:
        The messages, in which every text that was said is `Traced` with its index in the list of fields,
        and that list.
    """
    fields: list[Field] = []
    traced: list[dict[str, Any]] = []
    for turn, message in enumerate(messages):

        def say(text: str, path: Path, turn: int = turn) -> str:
            fields.append(Field(turn, path, text))
            return Traced.said(text, len(fields) - 1)

        copied = {
            key: _trace_key(key, value, say)
            for key, value in message.items()
            if value is not None and key not in (INDICATOR_KEY, TRAIN_KEY)
        }
        if turn in marks:
            copied["content"] = _appended(copied["content"], say(marks[turn], (INDICATOR_KEY,)))
        traced.append(copied)
    return traced, fields


def plain_data(value: Any) -> Any:
    """A structure rebuilt from plain Python values, as transformers hands it to templates."""
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain_data(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain_data(dataclasses.asdict(value))
    return f"<{type(value).__name__}>"


def _trace_key(key: str, value: Any, say: Callable[[str, Path], str]) -> Any:
    if key in _SAID_KEYS:
        return _trace_texts(value, (key,), say, only=("text",))
    if key == "tool_calls" and isinstance(value, (list, tuple)):
        return [_trace_call(call, (key, number), say) for number, call in enumerate(value)]
    return plain_data(value)


def _trace_call(call: Any, path: Path, say: Callable[[str, Path], str]) -> Any:
    if not isinstance(call, Mapping):
        return plain_data(call)
    traced = {}
    for key, value in call.items():
        if key == "function" and isinstance(value, Mapping):
            traced[key] = _trace_call(value, (*path, key), say)
        elif key in _SAID_IN_CALLS:
            traced[key] = _trace_texts(value, (*path, key), say)
        else:
            traced[key] = plain_data(value)
    return traced


def _trace_texts(
    value: Any, path: Path, say: Callable[[str, Path], str], only: tuple[str, ...] | None = None
) -> Any:
    """Trace every text in a structure; of mappings, only the values of some keys if `only` names them."""
    if isinstance(value, str):
        return say(plain_text(value), path) if value else ""
    if isinstance(value, Mapping):
        return {
            key: _trace_texts(item, (*path, key), say, only)
            if only is None or key in only
            else plain_data(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = [_trace_texts(item, (*path, number), say, only) for number, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return plain_data(value)


def _appended(content: Any, mark: str) -> Any:
    if isinstance(content, str):
        return concat((content, mark))
    *others, last = content
    return [*others, {**last, "text": concat((last["text"], mark))}]
