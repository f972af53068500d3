"""Turn what data sets call a turn into a message: who speaks, what is said, and whether it is trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ctxlens.chat.data.tools import count_nulls, kind, read_calls, read_schemas, without_nulls
from ctxlens.chat.roles import INDICATOR_KEY, MESSAGE_ROLES, TOOLS_KEY, TRAIN_KEY, Role
from ctxlens.chat.roles.checks import text_of_parts
from ctxlens.errors import InputError

NO_LOSS = "answers that the data exclude from training, kept as context"
"""What is noted about answers with `weight: 0`, `train: false` or a row's `label: false`."""

_CALLING = ("function_call", "tool_call", "tool_calls")
_SPEAKERS = {
    **{name: name for name in MESSAGE_ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "ai", "bot", "bing", "bard", "model", *_CALLING), "assistant"),
    **dict.fromkeys(
        ("observation", "function", "function_response", "ipython", "tool_response", "tool_result"), "tool"
    ),
}
_CONTENTS = ("content", "value", "text")
_FLAGS = ("weight", "train", "training", "trainable")
_PARTLY = ("train_detail", "training_detail")
_REASONING = ("reasoning_content", "reasoning", "thinking")


def read_turns(turns: Sequence[Any], notes: list[str]) -> list[dict[str, Any]]:
    """Turns as messages; bare texts alternate between user and assistant.

    Args:
        turns: Texts, or mappings with the speaker in `role` or `from` and what is said in `content`, `value`
            or `text`.
        notes: What is read in another way than it is written is appended here, in words.

    Raises:
        InputError: A turn is malformed; the message says which one and how.
    """
    return [_read_turn(turn, number, notes) for number, turn in enumerate(turns)]


def _read_turn(turn: Any, number: int, notes: list[str]) -> dict[str, Any]:
    if isinstance(turn, str):
        return {"role": ("user", "assistant")[number % 2], "content": turn}
    if not isinstance(turn, Mapping):
        raise InputError(f"turn {number} is {kind(turn)}, not a mapping or a text")
    where = f"turn {number}"
    message = without_nulls(turn)
    role, speaker = _take_role(message, where)
    calls = _take_calls(message, turn, where, notes)
    content = _take_content(message, turn, where, has_calls=bool(calls) or speaker in _CALLING)
    if speaker in _CALLING and not calls:
        content, calls = _split_call(content, notes)
    if not isinstance(content, str):
        raise InputError(f"{where} has content of {kind(content)}, not text")
    is_trained = _take_training(message, role, where, notes)
    _check_reasoning(message, where)
    _check_mark(message, role, where)
    _take_schemas(message, role, number, notes)
    return {
        "role": role,
        "content": content,
        **message,
        **({"tool_calls": calls} if calls else {}),
        **({} if is_trained else {TRAIN_KEY: False}),
    }


def _take_role(message: dict[str, Any], where: str) -> tuple[str, str]:
    """Take the speaker out of a turn: the role, and the name that the data give it."""
    names = [message.pop(key) for key in ("role", "from") if key in message]
    if not names:
        raise InputError(f"{where} has no role")
    given = next((name for name in names if not isinstance(name, str) or name.strip()), names[0])
    name = given.strip().lower() if isinstance(given, str) else ""
    if name not in _SPEAKERS:
        raise InputError(f"{where} has unknown role {str(given)[:60]!r}")
    return _SPEAKERS[name], name


def _take_content(message: dict[str, Any], turn: Mapping[str, Any], where: str, *, has_calls: bool) -> Any:
    """Take what is said out of a turn; null is an empty text, and text parts become one text."""
    found = next((key for key in _CONTENTS if key in message), None)
    if found is None:
        if not has_calls and not any(key in turn for key in _CONTENTS):
            raise InputError(f"{where} has none of the keys {', '.join(_CONTENTS)}")
        return ""
    content = message.pop(found)
    if found == "content":
        message.pop("value", None)
    if not isinstance(content, (list, tuple)) or (has_calls and _is_calls(content)):
        return content
    try:
        return "".join(text_of_parts(content))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _take_calls(
    message: dict[str, Any], turn: Mapping[str, Any], where: str, notes: list[str]
) -> list[dict[str, Any]]:
    """Take the tool calls out of a turn: `tool_calls`, or the `function_call` of OpenAI's older form."""
    message.pop("tool_calls", None)
    given = turn.get("tool_calls")
    if given is None and isinstance(message.get("function_call"), (Mapping, str)):
        given = message.pop("function_call")
    try:
        calls = read_calls(given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    notes += ["null arguments of tool calls, left out"] * _null_arguments(given)
    return calls


def _null_arguments(calls: Any) -> int:
    found = 0
    for call in calls if isinstance(calls, (list, tuple)) else [calls]:
        inner = call.get("function") if isinstance(call, Mapping) else None
        holder = inner if isinstance(inner, Mapping) else call
        found += count_nulls(holder.get("arguments")) if isinstance(holder, Mapping) else 0
    return found


def _is_calls(content: Any) -> bool:
    return all(isinstance(item, Mapping) and "name" in item for item in content)


def _split_call(content: Any, notes: list[str]) -> tuple[Any, list[dict[str, Any]]]:
    """The calls in a function-call turn; a text that holds none stays the assistant's text."""
    try:
        calls = read_calls(json.loads(content) if isinstance(content, str) else content)
    except (ValueError, RecursionError):  # an InputError is a ValueError
        calls = []
    if calls:
        return "", calls
    if isinstance(content, str) and content.strip():
        notes.append("function-call turns that hold no call in JSON, read as text")
    return content, []


def _take_training(message: dict[str, Any], role: str, where: str, notes: list[str]) -> bool:
    """Take the marks out of a turn that say whether it is trained on; whether it is, true without a mark."""
    given = {key: message.pop(key) for key in _FLAGS if key in message}
    if MESSAGE_ROLES[role] != Role.ASSISTANT:
        if role == "user" and any(given.get(key) is True for key in _FLAGS):
            notes.append("user turns marked to be trained on, kept as context")
        return True
    for key in _PARTLY:
        if key in message:
            raise InputError(
                f"{where} has {key}, but ctxlens trains on whole answers: weight 0 or 1, or train"
            )
    for key, value in given.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise InputError(f"{where} has {key} {str(value)[:40]!r}; expected 0 or 1, false or true")
    return all(given.values())


def _take_schemas(message: dict[str, Any], role: str, number: int, notes: list[str]) -> None:
    """Read the tool schemas that the first turn or a system turn carries; they are the conversation's."""
    if TOOLS_KEY not in message:
        return
    given = message.pop(TOOLS_KEY)
    if number and MESSAGE_ROLES[role] != Role.SYSTEM:
        notes.append("tools of turns other than the first, left out")
    elif schemas := read_schemas(given, f"{TOOLS_KEY} of turn {number}"):
        message[TOOLS_KEY] = list(schemas)


def _check_mark(message: Mapping[str, Any], role: str, where: str) -> None:
    mark = message.get(INDICATOR_KEY, False)
    if not isinstance(mark, (bool, str)):
        raise InputError(f"{where} has {INDICATOR_KEY} of {kind(mark)}, not true, false or a text")
    if mark and role != "user":
        raise InputError(f"{where} ({role}) carries the indicator; only user messages may")


def _check_reasoning(message: Mapping[str, Any], where: str) -> None:
    for key in _REASONING:
        if not isinstance(message.get(key, ""), str):
            raise InputError(f"{where} has {key} of {kind(message[key])}, not text")
