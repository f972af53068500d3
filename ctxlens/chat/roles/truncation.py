"""Cutting a rendered conversation to a window without losing who said what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ctxlens.chat.roles.chat import RenderedChat, Role
from ctxlens.errors import InputError

SIDES = ("left", "right", "middle")
"""Where the context may be cut: its earliest tokens first, its latest, or those in its middle."""


def check_side(truncation: str) -> None:
    """Raise `InputError` if this is none of `SIDES`."""
    if truncation not in SIDES:
        raise InputError(f"Unknown truncation {truncation!r}; expected one of {', '.join(SIDES)}.")


def fit_to_window(
    chat: RenderedChat, max_tokens: int | None, truncate: bool, truncation: str = "left"
) -> RenderedChat:
    """The chat itself if it fits the window, else cut to it or refused.

    The context is what was said, without the final response and the indicators. Of it

    * ``left`` cuts the earliest tokens first;
    * ``right`` cuts the latest tokens before the final user message first (the question stays whole);
      where those are not enough, it goes on from the end of the context;
    * ``middle`` cuts one stretch, so that as much is kept at the start of the context as at its end.

    The template's tokens are never cut. A final response is cut at its end only, and only as far as it
    needs over half of the room.

    Raises:
        InputError: It is too long and may not be cut, or cannot be cut without losing the first answer
            token.
    """
    if max_tokens is None or chat.n_tokens <= max_tokens:
        return chat
    too_long = f"The conversation has {chat.n_tokens} tokens, more than the window of {max_tokens}"
    if not truncate:
        raise InputError(f"{too_long}; shorten it or allow truncation (truncate=True, --truncate).")
    final = len(chat.messages) - 1
    is_response = (chat.turn == final) & (chat.role == Role.ASSISTANT)
    context = np.flatnonzero((chat.turn >= 0) & ~is_response & (chat.role != Role.INDICATOR))
    response = np.flatnonzero(is_response)
    excess = chat.n_tokens - max_tokens
    keep_context = 1
    if len(response) and not chat.open_ended:
        room = max_tokens - (chat.n_tokens - len(context) - len(response))
        keep_context = max(1, room // 2)
    from_context = min(excess, max(0, len(context) - keep_context))
    from_end = excess - from_context
    if from_end and (chat.open_ended or not len(response) or chat.n_tokens - from_end <= response[0]):
        raise InputError(
            f"{too_long}, and the template's own tokens and the answer's place do not fit into it."
        )
    dropped, cuts = _choose(chat, context, from_context, truncation)
    kept = np.ones(chat.n_tokens, dtype=bool)
    kept[dropped] = False
    kept[chat.n_tokens - from_end :] = False
    new_position = np.cumsum(kept) - 1
    if from_end:
        cuts.append(f"the last {from_end} tokens of the response")
    first_of = {turn: int(chat.response_positions(turn)[0]) for turn in chat.response_turns()}
    return replace(
        chat,
        tokens=chat.tokens[kept],
        role=chat.role[kept],
        turn=chat.turn[kept],
        spans=chat.spans[kept],
        stops={turn: int(new_position[at]) for turn, at in chat.stops.items() if kept[at]},
        openings={turn: int(new_position[at]) for turn, at in chat.openings.items() if kept[at]},
        truncated=f"Cut {' and '.join(cuts)} to fit {max_tokens} tokens.",
        beheaded_turns=tuple(turn for turn, first in first_of.items() if not kept[first]),
    )


def _choose(
    chat: RenderedChat, context: np.ndarray, count: int, truncation: str
) -> tuple[np.ndarray, list[str]]:
    """Which `count` of the context's positions to cut, and that in words."""
    if not count:
        return context[:0], []
    if truncation == "left":
        return context[:count], [f"the first {count} of {len(context)} context tokens"]
    if truncation == "middle":
        head = (len(context) - count + 1) // 2
        return context[head : head + count], [f"{count} of {len(context)} context tokens in the middle"]
    question = max(turn for turn, message in enumerate(chat.messages) if message["role"] == "user")
    before, after = context[chat.turn[context] < question], context[chat.turn[context] >= question]
    early, late = min(count, len(before)), max(0, count - len(before))
    cuts = (
        [f"the last {early} of {len(before)} context tokens before the final user message"] if early else []
    )
    if late:
        cuts.append(f"the last {late} of {len(after)} context tokens from the final user message on")
    return np.concatenate([before[len(before) - early :], after[len(after) - late :]]), cuts
