"""Numbers written as text: on the command line and in recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ctxlens.errors import InputError


def parse_numbers(text: str, kind: Callable[[str], Any], option: str) -> tuple[Any, ...]:
    """Numbers from a comma-separated option.

    Raises:
        InputError: something between the commas is no such number.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{option} got {text!r}; expected numbers separated by commas, such as 1,2,3."
        ) from None


def parse_spread(text: str, kind: Callable[[str], Any], option: str) -> tuple[Any, ...] | int:
    """Numbers as in `parse_numbers`, or `x5` for five of them, spread evenly."""
    if text.startswith("x"):
        return parse_numbers(text[1:], int, option)[0]
    return parse_numbers(text, kind, option)


__all__ = ["parse_numbers", "parse_spread"]
