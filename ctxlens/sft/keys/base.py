"""Reads the values of recipe keys as people write them, and refuses the rest in one sentence."""

from __future__ import annotations

import difflib
import json
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Real
from pathlib import PurePath
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from ctxlens.errors import InputError, Problems


class RecipeKeys(BaseModel):
    """Base of the models that hold recipe keys: frozen, and without unknown keys.

    Values may be written as YAML or a command line writes them: `"3"` for a whole number, `yes` for true, or
    `[0, 50]` for the text `0,50`.

    Raises:
        InputError: unknown keys, or values of the wrong kind; the message names all of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        fields, problems = type(self).model_fields, Problems()
        with problems:
            check_known(values, fields, type(self).__name__)
        read = {}
        for key in (key for key in values if key in fields):
            with problems:
                read[key] = read_value(key, values[key], fields[key].annotation)
        problems.report()
        try:
            super().__init__(**read)
        except ValidationError as error:
            raise _as_input_error(error) from None


def _as_input_error(error: ValidationError) -> InputError:
    """Turn pydantic's error into ours; all checks of recipe keys raise `InputError` themselves."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    key = ".".join(map(str, first["loc"]))
    return InputError(f"{key} has the value {first['input']!r}: {first['msg']}.")


def read_value(key: str, value: Any, hint: Any) -> Any:
    """Convert a value to the type of its key.

    Args:
        key: the key, for the message.
        value: the value as Python, YAML or a command line gives it.
        hint: the key's type: `str`, `int`, `float`, `bool` or `dict`, one of these or None, or a `Literal`.

    Raises:
        InputError: the value cannot be read as this type.
    """
    kinds = get_args(hint)
    if get_origin(hint) is Literal:
        if value not in kinds:
            one_of = " or ".join(f'"{choice}"' for choice in kinds)
            raise InputError(f"{key} must be {one_of}, got {value!r}.")
        return value
    if value is None and NoneType in kinds:
        return None
    kind = next(kind for kind in kinds or (hint,) if kind is not NoneType)
    read, expected = _READERS[kind]
    try:
        return read(value)
    except (TypeError, ValueError):
        raise InputError(f"{key} must be {expected}, got {value!r}.") from None


def _read_text(value: Any) -> str:
    parts = value if isinstance(value, list | tuple) else [value]
    if not parts or not all(map(_is_text_or_number, parts)):
        raise TypeError
    return ",".join(map(str, parts))


def _is_text_or_number(value: Any) -> bool:
    return isinstance(value, str | PurePath | Real) and not isinstance(value, bool)


def _read_whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return int(value) if isinstance(value, str) else operator.index(value)


def _read_number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _read_flag(value: Any) -> bool:
    word = str(value).lower()
    if not isinstance(value, bool | str) or word not in _FLAGS:
        raise TypeError
    return _FLAGS[word]


def _read_mapping(value: Any) -> dict[str, Any]:
    read = json.loads(value) if isinstance(value, str) else value
    if not isinstance(read, Mapping) or not all(isinstance(key, str) for key in read):
        raise TypeError
    return dict(read)


_FLAGS = {
    **dict.fromkeys(("true", "t", "yes", "y", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0"), False),
}  # fmt: skip

_READERS: Mapping[type, tuple[Callable[[Any], Any], str]] = {
    str: (_read_text, "text"),
    int: (_read_whole, "a whole number"),
    float: (_read_number, "a number"),
    bool: (_read_flag, "true or false"),
    dict: (_read_mapping, "keys with values"),
}
"""How a value of each type is read, and what the message calls the type."""


def check_known(given: Iterable[str], known: Collection[str], where: str) -> None:
    """Refuse keys that do not exist.

    Args:
        given: the keys.
        known: the keys that exist.
        where: what the message calls the place in which the keys stand.

    Raises:
        InputError: there are unknown keys.
    """
    if unknown := sorted(set(given) - set(known)):
        raise InputError(unknown_keys(unknown, known, where))


def unknown_keys(names: Iterable[str], known: Collection[str], where: str) -> str:
    """The sentence about unknown keys, with the keys that were probably meant."""
    names = list(names)
    close = [match for name in names for match in difflib.get_close_matches(name, known, n=1)]
    hint = (
        f"; did you mean {', '.join(close)}?"
        if close
        else "; see docs/training.md for ctxlens' keys, and TRL's SFTConfig and ModelConfig for the others."
    )
    return f"{where} has unknown keys: {', '.join(names)}{hint}"


__all__ = ["RecipeKeys", "check_known", "read_value", "unknown_keys"]
