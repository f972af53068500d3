"""Requests in batches: those that begin alike together, else those of like length, the longest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from ctxlens.chat.roles import RenderedChat

_ALIKE = 0.5
"""Prompts begin alike if they have so much of the shorter one in common."""


def plan_requests(
    chats: Sequence[RenderedChat], sizes: Sequence[int], batch_tokens: int, rows: int | None = None
) -> Iterator[list[int]]:
    """Indices of prompts in batches.

    Args:
        chats: the prompts.
        sizes: how many tokens each takes in a batch.
        batch_tokens: padded size of a batch.
        rows: number of prompts in a batch, in place of `batch_tokens`.
    """
    batch: list[int] = []
    longest = 0
    for index in _order(chats, sizes):
        longest = max(longest, sizes[index])
        full = len(batch) == rows if rows else longest * (len(batch) + 1) > batch_tokens
        if batch and full:
            yield batch
            batch, longest = [], sizes[index]
        batch.append(index)
    if batch:
        yield batch


def _order(chats: Sequence[RenderedChat], sizes: Sequence[int]) -> list[int]:
    """Groups of prompts that begin alike, the one with the longest prompt first."""
    if not chats:
        return []
    keys = [np.asarray(chat.tokens).tolist() for chat in chats]
    order = sorted(range(len(chats)), key=keys.__getitem__)
    groups = [[order[0]]]
    for before, after in pairwise(order):
        common = int(_ALIKE * min(len(keys[before]), len(keys[after])))
        if common and keys[before][:common] == keys[after][:common]:
            groups[-1].append(after)
        else:
            groups.append([after])
    groups.sort(key=lambda group: -max(sizes[index] for index in group))
    return [index for group in groups for index in group]


__all__ = ["plan_requests"]
