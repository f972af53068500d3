"""Cutting a rendered conversation to a window without losing who said what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ctxlens.errors import InputError
from ctxlens.roles.chat import RenderedChat, Role


def fit_to_window(chat: RenderedChat, max_tokens: int | None, truncate: bool) -> RenderedChat:
    """The chat itself if it fits the window, else cut to it or refused."""
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
    kept = np.ones(chat.n_tokens, dtype=bool)
    kept[context[:from_context]] = False
    kept[chat.n_tokens - from_end :] = False
    new_position = np.cumsum(kept) - 1
    cuts = []
    if from_context:
        cuts.append(f"the first {from_context} of {len(context)} context tokens")
    if from_end:
        cuts.append(f"the last {from_end} tokens of the response")
    return replace(
        chat,
        tokens=chat.tokens[kept],
        role=chat.role[kept],
        turn=chat.turn[kept],
        spans=chat.spans[kept],
        stops={turn: int(new_position[at]) for turn, at in chat.stops.items() if kept[at]},
        truncated=f"Cut {' and '.join(cuts)} to fit {max_tokens} tokens.",
    )
