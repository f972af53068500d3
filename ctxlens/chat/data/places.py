"""Texts within a row and the paths to them, which JSON pointers (RFC 6901) record.

A path is a sequence of keys and indices. In a column that holds its turns as JSON text, it ends with the
position of the text's closing quote there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

Place: TypeAlias = tuple[str | int, ...]

_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def find_texts(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """All texts within a row, each with its path; texts within a column of JSON text too."""
    if isinstance(value, str):
        yield place, value
        for end, text in _json_texts(value):
            yield (*place, end), text
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from find_texts(part, (*place, key))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from find_texts(part, (*place, number))


def _json_texts(value: str) -> Iterator[tuple[int, str]]:
    """The texts within a column of JSON text, each with the position of its closing quote.

    A path into such a column ends with this position.
    """
    if not value.lstrip().startswith("["):
        return
    try:
        json.loads(value)
    except (ValueError, RecursionError):
        return
    for literal in _JSON_STRING.finditer(value):
        yield literal.end() - 1, json.loads(literal.group())


def _escaped(text: str) -> str:
    return json.dumps(text)[1:-1]


def extend_text(value: Any, place: Place, suffix: str) -> Any:
    """A copy of the value with a text at a path extended; whatever is off the path is not copied."""
    if not place:
        return value + suffix
    key, *rest = place
    if isinstance(value, str):
        return value[: int(key)] + _escaped(suffix) + value[int(key) :]
    return _with(value, key, extend_text(value[key], tuple(rest), suffix))


def move_place(row: Any, place: Place, suffix: str) -> Place:
    """The new path of an extended text: in a column of JSON text, its closing quote has moved."""
    value = row
    for key in place[:-1]:
        value = value[key]
    return (*place[:-1], int(place[-1]) + len(_escaped(suffix))) if isinstance(value, str) else place


def shorten_text(value: Any, place: Place, suffix: str) -> Any:
    """A copy of the value with the suffix removed from the text at a path; the inverse of `extend_text`.

    Raises:
        ValueError: there is no such text, or it does not end with the suffix.
    """
    if not place or isinstance(value, str):
        end = int(place[0]) if place else len(value)
        suffix = _escaped(suffix) if place else suffix
        if not isinstance(value, str) or not value[:end].endswith(suffix):
            raise ValueError(suffix)
        return value[: end - len(suffix)] + value[end:]
    key, *rest = place
    return _with(value, key, shorten_text(value[key], tuple(rest), suffix))


def _with(value: Any, key: str | int, part: Any) -> Any:
    """A copy of a mapping or list with another part."""
    if isinstance(value, Mapping):
        return {**value, key: part}
    return [part if number == key else old for number, old in enumerate(value)]


def write_pointer(place: Place) -> str:
    """A path as a JSON pointer."""
    return "".join(f"/{str(key).replace('~', '~0').replace('/', '~1')}" for key in place)


def read_pointer(row: Any, pointer: str) -> Place:
    """The path that a JSON pointer refers to; raises Python's own error if it does not exist."""
    place: list[str | int] = []
    for word in pointer.split("/")[1:]:
        name = word.replace("~1", "/").replace("~0", "~")
        key = name if isinstance(row, Mapping) else int(name)
        place.append(key)
        if not isinstance(row, str):
            row = row[key]
    return tuple(place)


__all__ = [
    "Place",
    "extend_text",
    "find_texts",
    "move_place",
    "read_pointer",
    "shorten_text",
    "write_pointer",
]
