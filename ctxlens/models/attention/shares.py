"""Role shares: their definition from an attention pattern, and what is derived from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxlens.chat.roles import N_ROLES, RenderedChat, Role
from ctxlens.errors import InputError
from ctxlens.results import RoleAllocation

Queries = Literal["first_answer", "response_mean", "all"] | str | Sequence[int]
"""Which positions' attention is read."""


def compute_role_shares(
    pattern: Float[Tensor, "batch head query_pos key_pos"],
    role_ids: Int[Tensor, "batch key_pos"],
    n_roles: int,
) -> Float[Tensor, "batch head query_pos role"]:
    """How much of each query's attention goes to keys of each role (paper section 2.2), 0 to 1.

    Args:
        pattern: attention after softmax; masked keys are 0.
        role_ids: role of every key; ids outside 0 to `n_roles` - 1 (-1: padding) count to no role.
        n_roles: number of roles.

    Returns:
        Shares; they sum to 1 over the roles where every visible key has a role.
    """
    if pattern.shape[-1] != role_ids.shape[-1] or pattern.shape[0] != role_ids.shape[0]:
        raise InputError(
            f"pattern has shape {tuple(pattern.shape)} and role_ids {tuple(role_ids.shape)}; expected "
            "[batch, head, query_pos, key_pos] and [batch, key_pos]."
        )
    one_hot = role_ids[..., None] == torch.arange(n_roles, device=role_ids.device)
    return pattern @ one_hot[:, None].to(pattern.dtype)


def renormalise_shares(
    shares: Float[Tensor, "*rows role"],
    dropped: Sequence[Role] = (Role.TEMPLATE, Role.INDICATOR, Role.PAD),
) -> Float[Tensor, "*rows role"]:
    """Shares over the roles that are left when `dropped` are taken out (paper section 2.2).

    So that with and without chat template compare. A row whose mass lies wholly on dropped roles is NaN.
    """
    keep = torch.ones(shares.shape[-1], dtype=shares.dtype, device=shares.device)
    keep[[int(role) for role in dropped]] = 0
    kept = shares * keep
    return kept / kept.sum(-1, keepdim=True)


def retrieval_heads(
    shares: Float[Tensor, "layer head role"], role: Role = Role.USER
) -> Int[Tensor, " layer"]:
    """The head of each layer with most attention on a role (paper B.3).

    The paper chooses it at the last position of the input *without* template, and follows it with it.
    """
    return shares[..., int(role)].argmax(-1)


def find_queries(chat: RenderedChat, queries: Queries, turn: int | None) -> list[int]:
    """The query positions of a conversation that are meant.

    Args:
        chat: the conversation.
        queries: `first_answer` (the position that produces the first answer token), `response_mean` (the
            response's own positions), `all`, or positions.
        turn: the assistant message that is meant, the last by default.

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
) -> RoleAllocation:
    """The result that goes with the shares read at some positions of a conversation.

    Visible tokens are counted up to the query, sliding windows are not taken into account. `response_mean`
    averages over the positions. Queries are labelled `index:position`.
    """
    visible = np.eye(N_ROLES, dtype=np.float32)[np.asarray(chat.role, dtype=np.int64)].cumsum(0)
    counts = visible[np.asarray(positions, dtype=np.int64)]
    labels = tuple(f"{index}:{position}" for position in positions)
    kind = "positions"
    if isinstance(queries, str) and queries != "all":
        kind = queries
    if kind == "response_mean":
        shares, counts = shares.mean(2, keepdims=True), counts.mean(0, keepdims=True)
        labels = (f"{index}:{positions[0]}-{positions[-1]}",)
    condition = "template" if chat.templated else "plain"
    return RoleAllocation(
        np.ascontiguousarray(shares),
        counts,
        tuple(layers),
        labels,
        kind,
        {**(meta or {}), "condition": condition},
    )


__all__ = [
    "Queries", "compute_role_shares", "find_queries", "make_allocation", "renormalise_shares",
    "retrieval_heads",
]  # fmt: skip
