"""Turn one row of a data set into messages, for each layout in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ctxlens.chat.data.json_text import decode_turns
from ctxlens.chat.data.tools import carry_tools, kind, read_schemas
from ctxlens.chat.data.turns import read_turns
from ctxlens.chat.roles import MESSAGE_ROLES, TOOLS_KEY, TRAIN_KEY, Role
from ctxlens.errors import InputError

LAYOUTS: Mapping[str, str] = {
    "messages": "messages (or conversations) of role and content",
    "sharegpt": "conversations of from and value, or of texts that alternate",
    "alpaca": "instruction and output (or response, chosen)",
    "prompt-completion": "prompt and completion (or response, chosen), or chosen as a list of messages",
}
"""The layouts, and the columns that each needs."""

_TURNS = ("messages", "conversations", "conversation")
_INPUTS = ("input", "context")
_OUTPUTS = ("output", "response", "chosen")
_COMPLETIONS = ("completion", "response", "chosen")
_PREFERENCES = ("label", "kto_tag")


class Parsed(NamedTuple):
    """The messages of a row.

    Attributes:
        messages: The messages, before cleaning; the first one carries the tool schemas, if there are any.
        used: The columns that they come from.
        notes: What was read in another way than it is written, in words.
    """

    messages: list[dict[str, Any]]
    used: tuple[str, ...]
    notes: tuple[str, ...] = ()


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
    if not isinstance(row, Mapping):
        return f"a row of {kind(row)}"
    return f"columns {', '.join(map(str, row))}".encode("utf-8", "backslashreplace").decode()


def _fits(row: Any, layout: str) -> bool:
    row = decode_turns(row)
    if layout in ("messages", "sharegpt"):
        return _has_turns(row, "role" if layout == "messages" else "from")
    if not isinstance(row, Mapping):
        return False
    if layout == "alpaca":
        return "instruction" in row and any(name in row for name in _OUTPUTS)
    implied = isinstance(row.get("chosen"), (list, tuple)) and bool(row["chosen"])
    return implied or ("prompt" in row and any(name in row for name in _COMPLETIONS))


def _has_turns(row: Any, speaker: str) -> bool:
    """Whether a row holds turns that name their speakers so; bare texts count as turns of ShareGPT."""
    turns = row.get(_filled(row, _TURNS) or _TURNS[0]) if isinstance(row, Mapping) else row
    if not isinstance(turns, (list, tuple)) or not turns:
        return False
    if isinstance(turns[0], Mapping):
        return turns[0].get(speaker) is not None or (speaker == "from" and speaker in turns[0])
    return speaker == "from" and isinstance(turns[0], str)


def parse_row(row: Any, layout: str) -> Parsed:
    """Return the messages of one row.

    Raises:
        InputError: The row is malformed; the message says how, without naming the row.
    """
    notes: list[str] = []
    try:
        row = decode_turns(row)
        messages, used = _PARSERS[layout](row, notes)
        if not isinstance(row, Mapping):
            return Parsed(carry_tools(messages), tuple(used), tuple(notes))
        tools = read_schemas(row.get(TOOLS_KEY))
        messages = _with_preference(_with_system(messages, row, notes), row)
    except RecursionError:
        raise InputError("the row is nested too deeply to be a conversation") from None
    return Parsed(carry_tools(messages, tools), (*used, "system", TOOLS_KEY), tuple(notes))


def _parse_turns(row: Any, notes: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    if isinstance(row, (list, tuple)):
        return read_turns(row, notes), []
    if not isinstance(row, Mapping):
        raise InputError(f"expected a mapping or a list of turns, not {kind(row)}")
    column = _filled(row, _TURNS) or next((name for name in _TURNS if name in row), _TURNS[0])
    turns = row.get(column)
    if not isinstance(turns, (list, tuple)):
        raise InputError(f"no list of turns in {column!r}")
    messages = read_turns(turns, notes)
    used = [column]
    is_open = not messages or messages[-1]["role"] != "assistant"
    if row.get("chosen") is not None and is_open:
        messages = _joined(messages, _side(row, "chosen", "assistant", notes))
        used.append("chosen")
    return messages, used


def _parse_alpaca(row: Any, notes: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    if not isinstance(row, Mapping):
        raise InputError(f"expected a mapping, not {kind(row)}")
    given, answer = _filled(row, _INPUTS), _filled(row, _OUTPUTS)
    messages: list[dict[str, Any]] = []
    history = row.get("history") or ()
    pairs = history if isinstance(history, (list, tuple)) else [None]
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise InputError("history must hold pairs of question and answer")
        messages += read_turns(["" if text is None else text for text in pair], notes)
    question = _text(row, "instruction")
    if given and _text(row, given).strip():
        question = f"{question}\n{row[given]}" if question.strip() else row[given]
    messages.append({"role": "user", "content": question})
    messages = _joined(messages, _side(row, answer, "assistant", notes)) if answer else messages
    return messages, ["instruction", "history", *(name for name in (given, answer) if name)]


def _parse_prompt(row: Any, notes: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    if not isinstance(row, Mapping):
        raise InputError(f"expected a mapping, not {kind(row)}")
    answer = _filled(row, _COMPLETIONS) or "completion"
    asked = _side(row, "prompt", "user", notes) if row.get("prompt") is not None else []
    return _joined(asked, _side(row, answer, "assistant", notes)), ["prompt", answer]


_PARSERS: Mapping[str, Callable[[Any, list[str]], tuple[list[dict[str, Any]], list[str]]]] = {
    "messages": _parse_turns,
    "sharegpt": _parse_turns,
    "alpaca": _parse_alpaca,
    "prompt-completion": _parse_prompt,
}


def _side(row: Mapping[str, Any], column: str, role: str, notes: list[str]) -> list[dict[str, Any]]:
    """A column of a prompt or an answer: a list of turns, one turn, or a text."""
    value = row.get(column)
    if isinstance(value, Mapping):
        return read_turns([value], notes)
    if isinstance(value, (list, tuple)):
        return read_turns(value, notes)
    return [{"role": role, "content": _text(row, column)}]


def _joined(asked: list[dict[str, Any]], answered: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A prompt and its answer; an answer that begins with the prompt, as in preference data, holds both.

    Each of its messages only has to begin like the prompt's, so that a row stays one conversation when the
    indicator is appended to a question.
    """
    spoken = answered[_leading_system(answered) if asked and asked[0]["role"] == "user" else 0 :]
    repeats = len(spoken) >= len(asked) and all(
        one["role"] == two["role"] and two["content"].strip().startswith(one["content"].strip())
        for one, two in zip(asked, spoken, strict=False)
    )
    return answered if repeats else asked + answered


def _leading_system(messages: Sequence[Mapping[str, Any]]) -> int:
    return int(bool(messages) and MESSAGE_ROLES[messages[0]["role"]] == Role.SYSTEM)


def _with_system(
    messages: list[dict[str, Any]], row: Mapping[str, Any], notes: list[str]
) -> list[dict[str, Any]]:
    """The messages with the text of the column `system` first, unless they begin with a system turn."""
    system = _text(row, "system")
    if not system.strip():
        return messages
    if not _leading_system(messages):
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() and messages[0]["content"].strip() != system.strip():
        notes.append("system columns that differ from the conversation's own system turn, which is kept")
    return messages if messages[0]["content"].strip() else [{**messages[0], "content": system}, *messages[1:]]


def _with_preference(messages: list[dict[str, Any]], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages with their last answer kept from training if the row's `label` (KTO) is false."""
    if not any(row.get(name) is False for name in _PREFERENCES):
        return messages
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return [
        {**message, TRAIN_KEY: False} if index in answers[-1:] else message
        for index, message in enumerate(messages)
    ]


def _filled(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of these columns that holds something, else the first that exists."""
    found = [name for name in names if name in row]
    return next((name for name in found if row[name] is not None), found[0] if found else None)


def _text(row: Mapping[str, Any], column: str) -> str:
    """The text in a column; null, an absent column and a missing value of pandas (NaN) are empty texts."""
    value = row.get(column)
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if not isinstance(value, str):
        raise InputError(f"{column!r} is {kind(value)}, not text")
    return value
