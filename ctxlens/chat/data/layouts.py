"""Turn one row of a data set into messages, for each layout in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ctxlens.chat.data.json_text import decode_turns
from ctxlens.chat.roles import MESSAGE_ROLES
from ctxlens.chat.roles.checks import text_of_parts
from ctxlens.errors import InputError

LAYOUTS: Mapping[str, str] = {
    "messages": "messages (or conversations) of role and content",
    "sharegpt": "conversations of from and value, or of texts that alternate",
    "alpaca": "instruction and output (or response)",
    "prompt-completion": "prompt and completion (or response, chosen)",
}
"""The layouts, and the columns that each needs."""

_TURNS = ("messages", "conversations", "conversation")
_INPUTS = ("input", "context")
_OUTPUTS = ("output", "response")
_COMPLETIONS = ("completion", "response", "chosen")
_SPEAKERS = {
    **{name: name for name in MESSAGE_ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "ipython"), "tool"),
}


class Parsed(NamedTuple):
    """The messages of a row, and the columns they come from."""

    messages: list[dict[str, Any]]
    used: tuple[str, ...]


def detect_layout(rows: Sequence[Any], source: str) -> str:
    """Return the layout of the first row that has one; it counts for the whole data set.

    Raises:
        InputError: No row has one of `LAYOUTS`; the message names the columns found and those expected.
    """
    for row in rows:
        for layout in LAYOUTS:
            if _fits(row, layout):
                return layout
    expected = "; ".join(f"{layout}: {columns}" for layout, columns in LAYOUTS.items())
    raise InputError(f"{source} has no known layout: found {_columns(rows[0])}; expected one of: {expected}.")


def check_layout(layout: str, rows: Sequence[Any], source: str) -> None:
    """Check that a layout exists, and that one of the data set's first rows has its columns.

    Raises:
        InputError: It does not exist, or no row has its columns.
    """
    if layout not in LAYOUTS:
        raise InputError(f"Unknown layout {layout!r}; expected one of {', '.join(LAYOUTS)}.")
    if not any(_fits(row, layout) for row in rows):
        raise InputError(
            f"{source} lacks the layout {layout} ({LAYOUTS[layout]}): found {_columns(rows[0])}."
        )


def _columns(row: Any) -> str:
    return f"columns {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"a row of {_kind(row)}"


def _fits(row: Any, layout: str) -> bool:
    row = decode_turns(row)
    if layout in ("messages", "sharegpt"):
        turns = (
            row if isinstance(row, list) else row.get(_turn_column(row)) if isinstance(row, Mapping) else None
        )
        if not isinstance(turns, (list, tuple)) or not turns:
            return False
        first = turns[0]
        if layout == "messages":
            return isinstance(first, Mapping) and "role" in first
        return isinstance(first, str) or (isinstance(first, Mapping) and "from" in first)
    if not isinstance(row, Mapping):
        return False
    if layout == "alpaca":
        return "instruction" in row and any(name in row for name in _OUTPUTS)
    return "prompt" in row and any(name in row for name in _COMPLETIONS)


def parse_row(row: Any, layout: str) -> Parsed:
    """Return the messages of one row.

    Raises:
        InputError: The row is malformed; the message says how, without naming the row.
    """
    return _PARSERS[layout](decode_turns(row))


def _parse_turns(row: Any) -> Parsed:
    if isinstance(row, (list, tuple)):
        return Parsed(_speakers(row), ())
    if not isinstance(row, Mapping):
        raise InputError(f"expected a mapping or a list of turns, not {_kind(row)}")
    column = _turn_column(row)
    if not isinstance(row.get(column), (list, tuple)):
        raise InputError(f"no list of turns in {column!r}")
    messages = _speakers(row[column])
    used = [column]
    if isinstance(row.get("chosen"), Mapping):
        messages += _speakers([row["chosen"]])
        used.append("chosen")
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.insert(0, {"role": "system", "content": row["system"]})
        used.append("system")
    return Parsed(messages, tuple(used))


def _parse_alpaca(row: Any) -> Parsed:
    if not isinstance(row, Mapping):
        raise InputError(f"expected a mapping, not {_kind(row)}")
    given = _first(row, _INPUTS)
    answer = _first(row, _OUTPUTS)
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": _text(row, "system")})
    for pair in row.get("history") or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise InputError("history must hold pairs of question and answer")
        messages += _speakers(list(pair))
    question = _text(row, "instruction")
    if given and _text(row, given).strip():
        question = f"{question}\n{row[given]}" if question.strip() else row[given]
    messages += [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(row, answer or "output")},
    ]
    return Parsed(messages, ("instruction", "history", "system", *(name for name in (given, answer) if name)))


def _parse_prompt(row: Any) -> Parsed:
    if not isinstance(row, Mapping):
        raise InputError(f"expected a mapping, not {_kind(row)}")
    answer = _first(row, _COMPLETIONS) or "completion"
    messages: list[dict[str, Any]] = []
    for column, role in (("prompt", "user"), (answer, "assistant")):
        if isinstance(row.get(column), (list, tuple)):
            messages += _speakers(row[column])
        else:
            messages.append({"role": role, "content": _text(row, column)})
    return Parsed(messages, ("prompt", answer))


_PARSERS: Mapping[str, Callable[[Any], Parsed]] = {
    "messages": _parse_turns,
    "sharegpt": _parse_turns,
    "alpaca": _parse_alpaca,
    "prompt-completion": _parse_prompt,
}


def _speakers(turns: list[Any] | tuple[Any, ...]) -> list[dict[str, Any]]:
    """Turns with the keys ``role`` and ``content``; bare texts alternate between user and assistant."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        if isinstance(turn, str):
            messages.append({"role": ("user", "assistant")[number % 2], "content": turn})
            continue
        if not isinstance(turn, Mapping):
            raise InputError(f"turn {number} is {_kind(turn)}, not a mapping or a text")
        message = {key: value for key, value in turn.items() if value is not None}
        speaker = message.pop("role", None) or message.pop("from", None)
        if speaker not in _SPEAKERS:
            raise InputError(f"turn {number} has unknown role {speaker!r}")
        content = _content(message, number)
        messages.append({"role": _SPEAKERS[speaker], "content": content, **message})
    return messages


def _content(message: dict[str, Any], number: int) -> str:
    """Take the content out of a turn; text parts become one text."""
    content = message.pop("content", message.pop("value", None))
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, (list, tuple)):
        try:
            return "".join(text_of_parts(content))
        except InputError as error:
            raise InputError(f"turn {number}: {error}") from None
    if not isinstance(content, str):
        raise InputError(f"turn {number} has content of {_kind(content)}, not text")
    return content


def _turn_column(row: Mapping[str, Any]) -> str:
    return next((name for name in _TURNS if name in row), _TURNS[0])


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in row), None)


def _text(row: Mapping[str, Any], column: str) -> str:
    if not isinstance(row.get(column), str):
        raise InputError(f"{column!r} is {_kind(row.get(column))}, not text")
    return row[column]


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
