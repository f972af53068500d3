"""Which positions of a conversation are read, and the result made from the shares read there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from ctxlens.chat.roles import N_ROLES, RenderedChat
from ctxlens.errors import InputError
from ctxlens.results import RoleAllocation

Queries = Literal["first_answer", "response_mean", "all"] | str | Sequence[int]
"""Which positions' attention is read."""


def find_queries(chat: RenderedChat, queries: Queries, turn: int | None) -> list[int]:
    """The query positions of a conversation.

    Args:
        chat: the conversation.
        queries: `first_answer` (the position that produces the first answer token), `response_mean` (the
            response's own positions), `all`, or positions.
        turn: the assistant message whose response is read, the last by default.

    Raises:
        InputError: an unknown name, positions that do not exist, or no such response.
    """
    if isinstance(queries, str):
        if queries == "first_answer":
            return [chat.first_answer_position(turn)]
        if queries == "response_mean":
            return [int(p) for p in chat.response_positions(turn)]
        if queries == "all":
            return list(range(len(chat.tokens)))
        raise InputError(
            f"unknown queries {queries!r}; choose first_answer, response_mean, all or a list of positions."
        )
    positions = [int(p) for p in queries]
    bad = [p for p in positions if not 0 <= p < len(chat.tokens)]
    if bad or not positions:
        what = f"query position {bad[0]} does not exist" if bad else "no query positions given"
        raise InputError(f"{what}: the conversation has positions 0 to {len(chat.tokens) - 1}.")
    return positions


def make_allocation(
    chat: RenderedChat,
    shares: Float[np.ndarray, "layer head query role"],
    *,
    layers: Sequence[int],
    positions: Sequence[int],
    queries: Queries,
    index: int = 0,
    meta: Mapping[str, Any] | None = None,
    resting: Float[np.ndarray, "layer head query role"] | None = None,
) -> RoleAllocation:
    """The result made from the shares read at some positions of a conversation.

    Visible tokens are counted up to the query; sliding windows are ignored. `response_mean` averages over the
    positions. Queries are labelled `index:position`. `resting` is the part of the shares that rests on sinks.
    """
    visible = np.eye(N_ROLES, dtype=np.float32)[np.asarray(chat.role, dtype=np.int64)].cumsum(0)
    counts = visible[np.asarray(positions, dtype=np.int64)]
    labels = tuple(f"{index}:{position}" for position in positions)
    kind = "positions"
    if isinstance(queries, str) and queries != "all":
        kind = queries
    if kind == "response_mean":
        shares, counts = shares.mean(2, keepdims=True), counts.mean(0, keepdims=True)
        resting = None if resting is None else resting.mean(2, keepdims=True)
        labels = (f"{index}:{positions[0]}-{positions[-1]}",)
    condition = "template" if chat.templated else "plain"
    return RoleAllocation(
        np.ascontiguousarray(shares),
        counts,
        tuple(layers),
        labels,
        kind,
        {**(meta or {}), "condition": condition},
        None if resting is None else np.ascontiguousarray(resting),
    )


__all__ = ["Queries", "find_queries", "make_allocation"]
