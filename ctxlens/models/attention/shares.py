"""Role shares: their definition from an attention pattern, and the paper's renormalised form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxlens.chat.roles import Role
from ctxlens.errors import InputError


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


__all__ = ["compute_role_shares", "renormalise_shares", "retrieval_heads"]
