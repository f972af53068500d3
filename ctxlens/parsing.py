"""Parse what users write: numbers from text, and one sentence for values that pydantic rejects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, cast

from ctxlens.errors import InputError

if TYPE_CHECKING:
    from pydantic import ValidationError

_KEY_ERRORS = {
    "missing": "missing", "extra_forbidden": "unknown", "unexpected_keyword_argument": "unknown",
}  # fmt: skip
"""The words for pydantic's errors about keys in messages."""


def parse_numbers(text: str, kind: Callable[[str], Any], option: str) -> tuple[Any, ...]:
    """Parse numbers that are separated by commas.

    Args:
        text: what the user wrote, such as `500,1000`.
        kind: `int` or `float`.
        option: what the message calls the value, such as `--lengths`.

    Raises:
        InputError: a part between commas is not such a number.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        example = "500,1000" if kind is int else "0.5,0.25"
        raise InputError(
            f"{option} got {text!r}; expected numbers separated by commas, such as {example}."
        ) from None


def parse_spread(text: str, kind: Callable[[str], Any], option: str) -> tuple[Any, ...] | int:
    """Parse numbers as `parse_numbers` does, or `x5` for five evenly spaced values."""
    if text.startswith("x"):
        return parse_numbers(text[1:], int, option)[0]
    return parse_numbers(text, kind, option)


def check_choice(given: str, choices: Iterable[str], what: str) -> None:
    """Raise `InputError` if a word is none of the choices; `what` is its name in the message."""
    choices = tuple(choices)
    if given not in choices:
        raise InputError(f"unknown {what} {given!r}; choose from {', '.join(choices)}.")


def parse_heads(text: str) -> tuple[tuple[int, int], ...] | Literal["all", "retrieval"]:
    """Read the heads given on a command line: `all`, `retrieval`, or pairs such as `1.2,3.0` (layer.head).

    Raises:
        InputError: anything else, naming the part that could not be read.
    """
    text = text.strip()
    if text in ("all", "retrieval"):
        return cast(Literal["all", "retrieval"], text)
    pairs = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\.(\d+)\s*", part)
        if not match:
            raise InputError(
                f"heads {part.strip()!r} cannot be read; give all, retrieval, or pairs such as 1.2,3.0."
            )
        pairs.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(pairs))


def check_part(part: tuple[int, int]) -> None:
    """Raise `InputError` if the number of a job does not fit the number of jobs."""
    number, jobs = part
    if jobs < 1:
        raise InputError(f"the number of parts must be at least 1, got {jobs}.")
    if not 0 <= number < jobs:
        raise InputError(f"the part must be from 0/{jobs} to {jobs - 1}/{jobs}, got {number}/{jobs}.")


def explain_refusal(error: ValidationError, known: Iterable[str] = ()) -> str:
    """Say in one sentence, without its full stop, what is wrong with the first value that pydantic rejected.

    If one of our own validators raised `InputError`, the sentence is its message.

    Args:
        error: pydantic's error.
        known: the keys to list if one is missing or unknown.
    """
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return str(cause).removesuffix(".")
    key = ".".join(map(str, first["loc"]))
    kind = _KEY_ERRORS.get(first["type"])
    if kind is not None:
        return f"{kind} key {key}; expected {', '.join(known)}" if known else f"{kind} key {key}"
    reason = first["msg"][:1].lower() + first["msg"][1:]
    return f"{key} has the value {first['input']!r}: {reason}"


__all__ = ["check_choice", "check_part", "explain_refusal", "parse_heads", "parse_numbers", "parse_spread"]
