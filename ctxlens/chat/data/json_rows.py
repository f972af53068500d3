"""Rows of JSON: a list, lines, or values one after another; what is not JSON is named by line and column."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ctxlens.chat.data.opening import DataFile
from ctxlens.errors import InputError

_STARTS = re.compile(r'\s*(\{\s*["}]|\[\s*[\[{"\]])')
_SPACE = re.compile(r"[\s\ufeff]*")  # byte-order marks stand within files that were joined
_SHOWN_CHARACTERS = 24
_TURN_KEYS = ("role", "from")
_TURN_COLUMNS = ("messages", "conversations", "conversation")


def looks_like_json(head: str) -> bool:
    """Whether a text begins like rows of JSON."""
    return _STARTS.match(head) is not None


def read_json(file: DataFile) -> Iterator[Any]:
    """Read the items of a JSON list, JSON lines, or JSON values one after another.

    A document that is a single object is the only row, and so is a list of turns with ``role`` or ``from``,
    which is one conversation. Several values on one line are several rows.

    Raises:
        InputError: the text is not JSON; the message names line and column, and says what stands there.
    """
    source = file.lines()
    lines = ((number, line) for number, line in source if line.strip())
    first = next(lines, None)
    if first is None:
        return
    number, line = first
    values, problem = _read_values(line)
    if problem is not None:  # a document that is spread over lines
        text = line + "".join(line for _, line in source)
        values, problem = _read_values(text)
        if problem is not None:
            raise _not_json(file.name, text, problem, number)
        yield from _rows_of(values)
        return
    second = next(lines, None)
    if second is None:
        is_line = file.suffix in (".jsonl", ".ndjson") and _is_texts(values[0])
        yield from values if is_line else _rows_of(values)
        return
    yield from values
    while second is not None:
        number, line = second
        values, problem = _read_values(line)
        if problem is not None:
            raise _not_json(file.name, line, problem, number)
        yield from values
        second = next(lines, None)


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of turns with a speaker: one conversation, not a list of rows."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, Mapping)
            and any(key in turn for key in _TURN_KEYS)
            and not any(column in turn for column in _TURN_COLUMNS)
            for turn in value
        )
    )


def _rows_of(values: list[Any]) -> Iterator[Any]:
    """The rows of a whole document: its values, or the items of its only one."""
    if len(values) == 1 and isinstance(values[0], list) and not is_conversation(values[0]):
        yield from values[0]
    else:
        yield from values


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _read_values(text: str) -> tuple[list[Any], tuple[int, str] | None]:
    """The JSON values that stand one after another in a text; where and why reading stopped, if it did."""
    values: list[Any] = []
    at = _end_of_space(text, 0)
    decoder = json.JSONDecoder()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            return values, (error.pos, error.msg)
        except RecursionError:
            return values, (at, "nested too deeply to be conversations")
        except ValueError as error:  # a number with more digits than Python converts
            return values, (at, str(error).split(";")[0])
        values.append(value)
        at = _end_of_space(text, at)
    return values, None


def _end_of_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _not_json(name: str, text: str, problem: tuple[int, str], first_number: int) -> InputError:
    at, said = problem
    line = first_number + text.count("\n", 0, at)
    column = at - (text.rfind("\n", 0, at) + 1) + 1
    return InputError(f"{name} is not valid JSON: line {line}, column {column}: {_explain(text, at, said)}.")


def _explain(text: str, at: int, said: str) -> str:
    """What is wrong at a place of a text, in words that say what to do where the cause is known."""
    rest, before = text[at:].lstrip(), text[:at].rstrip()
    shown = ascii(rest[:_SHOWN_CHARACTERS].rstrip())
    if "nested too deeply" in said:
        return said
    if rest.startswith("\0"):
        return (
            "NUL bytes, as a power cut or a full disk leaves them; remove them, and expect rows to be missing"
        )
    if said.startswith("Unterminated string") or not rest:
        return (
            f"the text ends within a value that begins with {shown}"
            if rest
            else "the text ends within a value"
        ) + "; the file was cut off here, or a line break splits the row"
    if rest.startswith(("//", "/*", "#")):
        return f"a comment ({shown}), which JSON does not have; remove it"
    trailing = "trailing comma" in said  # Python 3.13 points at the comma itself, older ones at what follows
    if rest.startswith(",") and not trailing:
        return (
            "a comma after a row, which JSON lines do not have; remove it, or make the rows a list in [ and ]"
        )
    if (rest[:1] in "]}" and before.endswith(",")) or trailing:
        return "a comma after the last item; remove it"
    if rest.startswith("'"):
        return f"{shown} is in single quotes, as Python prints it; write the file with json.dumps"
    if "control character" in said:
        return f"{said}: a line break or tab inside a text must be written as \\n or \\t"
    return f"{said} at {shown}"


__all__ = ["is_conversation", "looks_like_json", "read_json"]
