"""Truncate a rendered conversation to a window; every token that stays keeps its label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ctxlens.chat.roles.chat import RenderedChat, Role
from ctxlens.errors import InputError

SIDES = ("left", "right", "middle")
"""Where the context may be cut: at its start, at its end, or in its middle."""


def check_side(truncation: str) -> None:
    """Raise `InputError` if this is not one of `SIDES`."""
    if truncation not in SIDES:
        raise InputError(f"Unknown truncation {truncation!r}; expected one of {', '.join(SIDES)}.")


def fit_to_window(
    chat: RenderedChat, max_tokens: int | None, truncate: bool, truncation: str = "left"
) -> RenderedChat:
    """Return the chat itself if it fits the window; otherwise truncate it, or refuse.

    The context is everything that was said except the final response and the indicators. From it

    * ``left`` cuts the earliest tokens first;
    * ``right`` cuts the latest tokens before the final user message first, so that the question stays
      whole; where those are not enough, it continues from the end of the context;
    * ``middle`` cuts one stretch, so that as much is kept at the start of the context as at its end.

    The template's tokens are never cut. A final response is cut only at its end, and only when it takes
    more than half of the room that the template's tokens leave.

    Raises:
        InputError: The chat is too long and must not be truncated, or it cannot be truncated without
            losing the first answer token.
    """
    if max_tokens is None or chat.n_tokens <= max_tokens:
        return chat
    too_long = f"The conversation has {chat.n_tokens} tokens, more than the window of {max_tokens}"
    if not truncate:
        raise InputError(f"{too_long}; shorten it or allow truncation (truncate=True, --truncate).")
    context, response = _context_and_response(chat)
    from_context, from_end = _shares_of_the_cut(chat, max_tokens, len(context), len(response))
    answer_is_lost = chat.open_ended or not len(response) or chat.n_tokens - from_end <= response[0]
    if from_end and answer_is_lost:
        raise InputError(
            f"{too_long}, and the template's own tokens and the answer's place do not fit into it."
        )
    dropped, cuts = _choose(chat, context, from_context, truncation)
    if from_end:
        cuts.append(f"the last {from_end} tokens of the response")
    kept = np.ones(chat.n_tokens, dtype=bool)
    kept[dropped] = False
    kept[chat.n_tokens - from_end :] = False
    return _keep(chat, kept, f"Cut {' and '.join(cuts)} to fit {max_tokens} tokens.")


def _context_and_response(chat: RenderedChat) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the context, and positions of the final response."""
    is_response = (chat.turn == len(chat.messages) - 1) & (chat.role == Role.ASSISTANT)
    is_context = (chat.turn >= 0) & ~is_response & (chat.role != Role.INDICATOR)
    return np.flatnonzero(is_context), np.flatnonzero(is_response)


def _shares_of_the_cut(
    chat: RenderedChat, max_tokens: int, context_tokens: int, response_tokens: int
) -> tuple[int, int]:
    """How many tokens to cut from the context, and how many from the end of the response."""
    keep_context = 1
    if response_tokens and not chat.open_ended:
        room = max_tokens - (chat.n_tokens - context_tokens - response_tokens)
        keep_context = max(1, room // 2)
    excess = chat.n_tokens - max_tokens
    from_context = min(excess, max(0, context_tokens - keep_context))
    return from_context, excess - from_context


def _keep(chat: RenderedChat, kept: np.ndarray, truncated: str) -> RenderedChat:
    """The chat reduced to the kept positions ``[pos]``."""
    new_position = np.cumsum(kept) - 1

    def moved(positions: Mapping[int, int]) -> dict[int, int]:
        return {turn: int(new_position[at]) for turn, at in positions.items() if kept[at]}

    first_of = {turn: int(chat.response_positions(turn)[0]) for turn in chat.response_turns()}
    return replace(
        chat,
        tokens=chat.tokens[kept],
        role=chat.role[kept],
        turn=chat.turn[kept],
        spans=chat.spans[kept],
        stops=moved(chat.stops),
        openings=moved(chat.openings),
        truncated=truncated,
        beheaded_turns=tuple(turn for turn, first in first_of.items() if not kept[first]),
    )


def _choose(
    chat: RenderedChat, context: np.ndarray, count: int, truncation: str
) -> tuple[np.ndarray, list[str]]:
    """The `count` positions of the context to cut, and a description of them."""
    if not count:
        return context[:0], []
    if truncation == "left":
        return context[:count], [f"the first {count} of {len(context)} context tokens"]
    if truncation == "middle":
        head = (len(context) - count + 1) // 2
        return context[head : head + count], [f"{count} of {len(context)} context tokens in the middle"]
    return _choose_before_the_question(chat, context, count)


def _choose_before_the_question(
    chat: RenderedChat, context: np.ndarray, count: int
) -> tuple[np.ndarray, list[str]]:
    """Cut from the end of what stands before the final user message, then from the end of the rest."""
    question = max(turn for turn, message in enumerate(chat.messages) if message["role"] == "user")
    before, after = context[chat.turn[context] < question], context[chat.turn[context] >= question]
    early, late = min(count, len(before)), max(0, count - len(before))
    cuts = []
    if early:
        cuts.append(f"the last {early} of {len(before)} context tokens before the final user message")
    if late:
        cuts.append(f"the last {late} of {len(after)} context tokens from the final user message on")
    return np.concatenate([before[len(before) - early :], after[len(after) - late :]]), cuts
