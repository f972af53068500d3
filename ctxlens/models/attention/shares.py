"""Role shares: their definition from an attention pattern, and the paper's renormalised form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from ctxlens.chat.roles import Role
from ctxlens.errors import InputError
from ctxlens.models.attention.fused import mark_roles


def compute_role_shares(
    pattern: Float[Tensor, "batch head query_pos key_pos"],
    role_ids: Int[Tensor, "batch key_pos"],
    n_roles: int,
) -> Float[Tensor, "batch head query_pos role"]:
    """How much of each query's attention goes to keys of each role (paper section 2.2), 0 to 1.

    Args:
        pattern: attention after softmax; masked keys are 0.
        role_ids: role of every key; ids outside 0 to `n_roles` - 1 (-1: padding) count towards no role.
        n_roles: number of roles.

    Returns:
        Shares; they sum to 1 over the roles where every visible key has a role.
    """
    if pattern.shape[-1] != role_ids.shape[-1] or pattern.shape[0] != role_ids.shape[0]:
        raise InputError(
            f"pattern has shape {tuple(pattern.shape)} and role_ids {tuple(role_ids.shape)}; expected "
            "[batch, head, query_pos, key_pos] and [batch, key_pos]."
        )
    one_hot = mark_roles(role_ids, n_roles, pattern.dtype)
    return einsum(pattern, one_hot, "batch head query key, batch key role -> batch head query role")


def renormalise_shares(
    shares: Float[Tensor, "*rows role"],
    dropped: Sequence[Role] = (Role.TEMPLATE, Role.INDICATOR, Role.PAD),
) -> Float[Tensor, "*rows role"]:
    """Shares over the roles that remain when `dropped` are taken out (paper section 2.2).

    This makes shares with and without chat template comparable. The dropped roles get 0. A row all of whose
    attention goes to dropped roles is NaN.
    """
    keep = torch.ones(shares.shape[-1], dtype=shares.dtype, device=shares.device)
    keep[[int(role) for role in dropped]] = 0
    kept = shares * keep
    return kept / kept.sum(-1, keepdim=True)


def retrieval_heads(
    shares: Float[Tensor, "layer head role"], role: Role = Role.USER
) -> Int[Tensor, " layer"]:
    """The head of each layer that gives a role the most attention (paper B.3).

    The paper chooses the heads at the last position of the input *without* chat template, and then follows
    the same heads with it.
    """
    return shares[..., int(role)].argmax(-1)


__all__ = ["compute_role_shares", "renormalise_shares", "retrieval_heads"]
