"""The line before a measurement: how much there is to do, and about how long it takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ctxlens.cli._screen import describe_seconds, is_quiet, note

if TYPE_CHECKING:
    from ctxlens.chat.roles import RenderedChat
    from ctxlens.models import Model

_SHORTEST, _LONGEST, _WRITTEN = 16, 128, 5
_SHARE = 20
"""A timing reads at most one part in this many of all tokens, so that it costs little of what it tells."""


def tell_plan(
    model: Model,
    what: str,
    tokens: int,
    read: Callable[[Sequence[RenderedChat]], object],
    *,
    written: int = 0,
) -> None:
    """Print what is to be done and about how long it takes, from a short timing on this machine.

    Nothing is timed or printed where remarks are left out, or in other processes than the first.

    Args:
        model: the model.
        what: the units of the work, such as `12 conversations`.
        tokens: number of tokens that are read, over all passes.
        read: what is done with a prompt of one user message, such as `model.read_roles`.
        written: upper bound on the tokens that are written, over all answers.
    """
    if is_quiet() or os.environ.get("RANK", "0") != "0":
        return
    seconds = _time_reading(model, tokens, read)
    if written:
        seconds += written * _time_writing(model)
    most = "at most " if written else "about "
    answers = f", at most {written:,} to write" if written else ""
    on = f"{model.device.type} {model.identity['dtype']}"
    note(f"plan: {what}, {tokens:,} tokens{answers}, {most}{describe_seconds(seconds)} on {on}")


def tell_plan_later(model: Model, what: str) -> None:
    """Print what is to be done where a timing would cost more than it tells; the first batch then tells."""
    if not is_quiet() and os.environ.get("RANK", "0") == "0":
        on = f"{model.device.type} {model.identity['dtype']}"
        note(f"plan: {what} on {on}; the time left is shown after the first batch")


def _time_reading(model: Model, tokens: int, read: Callable[[Sequence[RenderedChat]], object]) -> float:
    """Seconds to read this many tokens. The first call is slower and does not count."""
    prompt = _prompt(model, min(_LONGEST, max(_SHORTEST, tokens // _SHARE), model.n_ctx // 2))
    read([_prompt(model, 4)])
    return _seconds(lambda: read([prompt])) / prompt.n_tokens * tokens


def _time_writing(model: Model) -> float:
    """Seconds to write one token."""
    prompt = _prompt(model, _SHORTEST)
    reading = _seconds(lambda: model.generate([prompt], max_new_tokens=1))
    both = _seconds(lambda: model.generate([prompt], max_new_tokens=1 + _WRITTEN))
    return max(0.0, both - reading) / _WRITTEN


def _prompt(model: Model, n_words: int) -> RenderedChat:
    """A prompt of about this many tokens, without template."""
    words = " ".join(
        (
            ["the", "harbour", "is", "open", "and", "the", "boats", "are", "out", "on", "the", "sea", "today"]
            * n_words
        )[:n_words]
    )
    return model.render_plain([{"role": "user", "content": words}], add_generation_prompt=True)


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


__all__ = ["tell_plan", "tell_plan_later"]
