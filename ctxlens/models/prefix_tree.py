"""What conversations have in common at their beginning, and an order in which that is read once.

Conversations that begin alike form a tree. Every one of them is read from where it parts from an earlier
one, whose keys and values are remembered so far; altogether each node of the tree is read once. The order is
such that few depend on one another: at every fork the branch with most conversations is read in one go, the
others hang on it, and so on (which takes at most log2 n rounds).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int64

from ctxlens.chat.roles import RenderedChat

LEAST = 16
"""Fewer tokens than these are not worth being shared."""


@dataclass(frozen=True)
class Branch:
    """One conversation in the order of reading.

    Attributes:
        index: which conversation.
        parent: the conversation that it parts from, or None.
        shared: how many tokens it has in common with it (always fewer than it has).
        round: 0 without a parent, else the parent's round plus 1.
    """

    index: int
    parent: int | None
    shared: int
    round: int


def plan_branches(
    chats: Sequence[RenderedChat], *, limits: Sequence[int] | None = None, least: int = LEAST
) -> list[Branch]:
    """Where each conversation parts from an earlier one, in the order of reading.

    Tokens are the same if id, role and emphasis are: then nothing that steering does can differ either.

    Args:
        chats: conversations.
        limits: how many tokens of each may be shared; by default all but the last, whose logits are wanted.
        least: how many tokens two must have in common to share them.
    """
    keys = [_identify(chat) for chat in chats]
    limits = [len(key) - 1 for key in keys] if limits is None else limits
    order = sorted(range(len(keys)), key=lambda i: keys[i].tolist())
    common = [_count_common(keys[a], keys[b]) for a, b in pairwise(order)]
    found: list[Branch] = []
    # A stretch of neighbours in the order, what it hangs on, how much it shares with that, and its round.
    open_: list[tuple[int, int, int | None, int, int]] = [(0, len(order), None, 0, 0)]
    while open_:
        start, end, parent, shared, round_ = open_.pop()
        if start == end:
            continue
        low, high, hanging = start, end, []
        while high - low > 1:
            fork = min(common[low : high - 1])
            cuts = [low, *(i + 1 for i in range(low, high - 1) if common[i] == fork), high]
            pieces = sorted(pairwise(cuts), key=lambda piece: piece[0] - piece[1])
            low, high = pieces[0]
            hanging += [(*piece, fork) for piece in pieces[1:]]
        owner = order[low]
        own = min(shared, limits[owner])
        if own < least:
            found.append(Branch(owner, None, 0, 0))
        else:
            found.append(Branch(owner, parent, own, round_))
        for first, last, fork in hanging:
            if fork < least:
                open_.append((first, last, None, 0, 0))
            elif fork <= shared:
                open_.append((first, last, parent, fork, round_))
            else:
                open_.append((first, last, owner, fork, round_ + 1))
    return sorted(found, key=lambda branch: (branch.round, branch.index))


def count_read(chats: Sequence[RenderedChat], branches: Sequence[Branch]) -> int:
    """How many tokens are read in all."""
    return sum(chats[branch.index].n_tokens - branch.shared for branch in branches)


def _identify(chat: RenderedChat) -> Int64[np.ndarray, " pos"]:
    marked = 0 if chat.emphasised is None else chat.emphasised.astype(np.int64)
    return (np.asarray(chat.tokens, dtype=np.int64) * 256 + chat.role) * 2 + marked


def _count_common(one: Int64[np.ndarray, " pos"], other: Int64[np.ndarray, " pos2"]) -> int:
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


__all__ = ["LEAST", "Branch", "count_read", "plan_branches"]
