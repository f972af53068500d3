"""The prefixes that conversations share, and an order in which each shared token is read once.

Conversations with common prefixes form a tree. Each conversation is read from the token where it first
differs from an earlier one, whose keys and values are cached up to there. In total each node of the tree is
read once. The order keeps chains of dependent conversations short: at every fork, the branch with the most
conversations continues in the same round, and the others follow in the next one. This takes at most log2(n)
rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int64

from ctxlens.chat.roles import RenderedChat

LEAST = 16
"""Prefixes with fewer tokens than this are not shared, because it would not save time."""


@dataclass(frozen=True)
class Branch:
    """One conversation in the order of reading.

    Attributes:
        index: the index of the conversation.
        parent: the conversation whose prefix it shares, or None.
        shared: the length of the shared prefix in tokens; always less than the conversation's length.
        round: 0 without a parent, else a round after the parent's.
    """

    index: int
    parent: int | None
    shared: int
    round: int


def plan_branches(
    chats: Sequence[RenderedChat], *, limits: Sequence[int] | None = None, least: int = LEAST
) -> list[Branch]:
    """Plan from which token on each conversation is read, in the order of reading.

    Two tokens are equal if their id, role and emphasis are equal. Steering then treats them alike, too.

    Args:
        chats: conversations.
        limits: how many tokens of each conversation may be shared; by default all but the last token, whose
            logits are needed.
        least: the shortest prefix that is shared, in tokens.
    """
    keys = [_identify(chat) for chat in chats]
    limits = [len(key) - 1 for key in keys] if limits is None else limits
    order = sorted(range(len(keys)), key=lambda i: keys[i].tolist())
    common = [_count_common(keys[a], keys[b]) for a, b in pairwise(order)]
    found: list[Branch] = []
    # Each entry is a range of neighbours in the order, their parent, the prefix shared with it, their round.
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
    """How many tokens are read in total."""
    return sum(chats[branch.index].n_tokens - branch.shared for branch in branches)


def _identify(chat: RenderedChat) -> Int64[np.ndarray, " pos"]:
    marked = 0 if chat.emphasised is None else chat.emphasised.astype(np.int64)
    return (np.asarray(chat.tokens, dtype=np.int64) * 256 + chat.role) * 2 + marked


def _count_common(one: Int64[np.ndarray, " pos"], other: Int64[np.ndarray, " pos2"]) -> int:
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


__all__ = ["LEAST", "Branch", "count_read", "plan_branches"]
