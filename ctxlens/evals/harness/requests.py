"""Requests in batches: prompts with a common beginning together, then by length, the longest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from ctxlens.chat.roles import RenderedChat

_ALIKE = 0.5
"""Prompts begin alike if their common beginning is at least this part of the shorter one."""


def plan_requests(
    chats: Sequence[RenderedChat], sizes: Sequence[int], batch_tokens: int, rows: int | None = None
) -> Iterator[list[int]]:
    """Divide prompts into batches.

    Args:
        chats: the prompts.
        sizes: number of tokens that each prompt needs in a batch.
        batch_tokens: upper bound on the padded tokens of a batch; a longer prompt is a batch by itself.
        rows: number of prompts in a batch, instead of `batch_tokens`.

    Yields:
        The indices of a batch's prompts.
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
    """Indices by groups of prompts that begin alike, the group with the longest prompt first."""
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
