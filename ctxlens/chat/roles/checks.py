"""What a conversation must look like so that it can be rendered; each complaint is one sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ctxlens.chat.roles.chat import MESSAGE_ROLES, Message, Role
from ctxlens.errors import InputError

_SURROGATE = re.compile("[\ud800-\udfff]")
_DEEPEST = 64


def check_messages(messages: Any) -> None:
    """Check that messages are a conversation that can be rendered.

    Raises:
        InputError: It is not a list of mappings with a known ``role`` and a content of text, it is empty, a
            tool call has no known shape, a text is not valid Unicode, or no message is the user's. The
            sentence names the index of the message.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise InputError(f"A conversation must be a list of messages, not {type(messages).__name__}.")
    if not messages:
        raise InputError("The conversation is empty; expected at least one user message.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(
                f"Message {index} must be a mapping with 'role' and 'content', not {type(message).__name__}."
            )
        name = f"Message {index} ({_checked_role(message, index)})"
        check_unicode(message, name)
        _check_content(message, name)
        _check_tool_calls(message.get("tool_calls"), name)
    if not any(message["role"] == "user" for message in messages):
        raise InputError("The conversation has no user turn; expected at least one message with role 'user'.")


def check_unicode(message: Mapping[Any, Any], name: str) -> None:
    """Check that every text in a message can be encoded.

    Raises:
        InputError: A text holds half a surrogate pair, or the message is nested too deeply to be read.
    """
    for key, value in message.items():
        try:
            broken = holds_surrogate(value) or holds_surrogate(key)
        except RecursionError:
            raise InputError(f"{name}: {ascii(key)[1:-1]} is nested too deeply.") from None
        if broken:
            raise InputError(f"{name}: {ascii(key)[1:-1]} holds half a surrogate pair, which is not text.")


def text_of_parts(parts: Sequence[Any]) -> list[str]:
    """The texts of a content in parts.

    Raises:
        InputError: A part is not text; the message names its type.
    """
    texts: list[str] = []
    for number, part in enumerate(parts):
        kind = type(part).__name__
        if isinstance(part, Mapping):
            kind = "text" if part.get("type") is None else ascii(part["type"]).strip("'")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InputError(
                f"content must be text or a list of text parts, but part {number} is of type {kind}"
            )
        texts.append(part["text"])
    return texts


def _checked_role(message: Message, index: int) -> str:
    role = message.get("role")
    if isinstance(role, str) and role in MESSAGE_ROLES:
        return role
    given = f"has unknown role {role!r}" if "role" in message else "has no 'role'"
    raise InputError(f"Message {index} {given}; expected one of {', '.join(MESSAGE_ROLES)}.")


def _check_content(message: Message, name: str) -> None:
    content = message.get("content")
    if isinstance(content, str):
        return
    if content is None and MESSAGE_ROLES[message["role"]] == Role.ASSISTANT and message.get("tool_calls"):
        return
    if not isinstance(content, (list, tuple)):
        given = "is missing" if content is None else f"is {type(content).__name__}"
        raise InputError(f"{name}: content must be text, but it {given}.")
    try:
        text_of_parts(content)
    except InputError as error:
        raise InputError(f"{name}: {error}.") from None


def _check_tool_calls(calls: Any, name: str) -> None:
    if calls is None:
        return
    if not isinstance(calls, (list, tuple)):
        raise InputError(f"{name}: tool_calls must be a list of mappings, not {type(calls).__name__}.")
    for number, call in enumerate(calls):
        if not isinstance(call, Mapping):
            raise InputError(
                f"{name}: tool_calls must hold mappings, but item {number} is {type(call).__name__}."
            )
        function = call if call.get("function") is None else call["function"]
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(
                f"{name}: item {number} of tool_calls has no function with a name; expected "
                '{"function": {"name": ..., "arguments": {...}}}.'
            )


def holds_surrogate(value: Any, depth: int = 0) -> bool:
    """Whether a text in a structure holds half a surrogate pair, which cannot be encoded.

    Raises:
        RecursionError: The structure is nested too deeply to be worked with.
    """
    if isinstance(value, str):
        return not value.isascii() and _SURROGATE.search(value) is not None
    if depth > _DEEPEST:
        raise RecursionError
    if isinstance(value, Mapping):
        return any(holds_surrogate(item, depth + 1) for pair in value.items() for item in pair)
    return isinstance(value, (list, tuple)) and any(holds_surrogate(item, depth + 1) for item in value)
