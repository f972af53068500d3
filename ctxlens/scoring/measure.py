"""How much an assistant turn depends on the user's text: the measure.

The score of a turn (paper section 3.1) is the attention that its response tokens pay to all user tokens
before them, in the head of one layer that pays the most. Two reductions over heads and tokens are in use;
`reduce_turns` computes both. `ctxlens.scoring` computes them for a data set.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctxlens.chat.roles import Role

VALUES = ("best_of_mean", "mean_of_best", "best_head", *(f"share_{role.label}" for role in Role))
"""The values that `reduce_turns` returns for a turn at a layer, in this order."""


def reduce_turns(
    shares: Float[Tensor, "batch head query role"], turn_of: Int[Tensor, "batch query"], n_turns: int
) -> Float[Tensor, "batch turn value"]:
    """Reduce one layer's role shares of response tokens to a few numbers per turn.

    `best_of_mean` is the paper's text: the user share of the head with the largest mean over the turn's
    tokens, and `best_head` is that head. `mean_of_best` is its released code: the mean over tokens of the
    largest user share over heads, which is never smaller. `share_<role>` is the mean over heads and tokens.

    Args:
        shares: role shares of response tokens.
        turn_of: the number of each token's turn; -1 for padding.
        n_turns: number of turns.

    Returns:
        `VALUES` of every turn, shares 0 to 1; all NaN for a turn with attention that is not a number.
    """
    turn_of = turn_of.to(shares.device)
    members = turn_of[:, None] == torch.arange(n_turns, device=shares.device)[:, None]  # batch turn query
    weights = members / members.sum(-1, keepdim=True).clamp_min(1)
    broken = ~shares.isfinite().all(-1).all(1)
    shares = shares.nan_to_num()
    user = shares[..., Role.USER]
    by_head = torch.einsum("bhq,btq->bth", user, weights)
    best = by_head.max(-1)
    mean_of_best = torch.einsum("bq,btq->bt", user.amax(1), weights)
    roles = torch.einsum("bqr,btq->btr", shares.mean(1), weights)
    values = torch.cat([torch.stack([best.values, mean_of_best, best.indices.float()], -1), roles], -1)
    return values.masked_fill((members & broken[:, None]).any(-1)[..., None], torch.nan)


def mean_turns(
    shares: Float[Tensor, "batch head query role"], turn_of: Int[Tensor, "batch query"], n_turns: int
) -> Float[Tensor, "batch turn role"]:
    """The mean of some shares over heads and the tokens of every turn; arguments as in `reduce_turns`."""
    turn_of = turn_of.to(shares.device)
    members = turn_of[:, None] == torch.arange(n_turns, device=shares.device)[:, None]
    weights = members / members.sum(-1, keepdim=True).clamp_min(1)
    return torch.einsum("bqr,btq->btr", shares.mean(1), weights)


def uniform_share(is_user: Bool[np.ndarray, " pos"], positions: np.ndarray) -> float:
    """The user share, 0 to 1, if every response token attended equally to itself and all before it."""
    positions = np.asarray(positions)
    return float((np.cumsum(is_user)[positions] / (positions + 1)).mean())


__all__ = ["VALUES", "mean_turns", "reduce_turns", "uniform_share"]
