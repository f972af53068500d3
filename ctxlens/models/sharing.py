"""Many prompts at once, with each shared prefix read once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ctxlens.chat.roles import RenderedChat
from ctxlens.errors import ModelFailureError
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.batch import TokenBatch, plan_batches
from ctxlens.models.backends.protocol import ROOM, KeyValues, PrefixBackend
from ctxlens.models.prefix_tree import Branch, plan_branches


@dataclass(frozen=True)
class Tolerance:
    """Which prompts are read in one batch.

    Attributes:
        short: prompts with at most this many unread tokens always share a batch.
        alike: others do if the shortest has at least this fraction of the longest one's unread tokens.
        long: above this many unread tokens a prompt is read alone, because a batch would not be faster.
    """

    short: int
    alike: float
    long: float | int


_ON_CPU, _ON_ACCELERATOR = Tolerance(32, 0.75, 512), Tolerance(32, 0.75, math.inf)
_THIN_OUT = 0.75
"""Finished rows are dropped when at most this fraction of the rows is still running."""


RowKeyValues = list[tuple[Float[Tensor, "kv_head _ d_head"], Float[Tensor, "kv_head _ d_head"]]]
"""The cached keys and values of one prompt, one pair per layer."""


Stop = Callable[[Sequence[int]], bool]
"""Takes the new tokens of a row and returns whether the row is finished."""


@dataclass(frozen=True)
class Sharing:
    """Reads prompts in batches, each shared prefix once, and continues them.

    Attributes:
        backend: the model.
        steerings: what is steered.
        pad_id: token id for padding.
        device: where tokens go in.
        batch_tokens: padded tokens in one batch.
    """

    backend: PrefixBackend
    steerings: Sequence[Steering]
    pad_id: int
    device: torch.device
    batch_tokens: int
    _kept: dict[int, RowKeyValues] = field(default_factory=dict)

    def continue_greedily(
        self,
        chats: Sequence[RenderedChat],
        *,
        max_new_tokens: Sequence[int],
        stop_ids: Collection[int],
        stop: Stop | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """Append the most likely next token to every prompt until a stop token or the prompt's limit.

        Args:
            chats: the prompts.
            max_new_tokens: the limit of each prompt.
            stop_ids: tokens that end a row; they are not part of the result.
            stop: takes the new tokens of a row and returns whether it is finished.
            progress: called with the number of prompts done and the total.

        Returns:
            The new tokens of every prompt.

        Raises:
            ModelFailureError: the model's logits are not numbers (NaN).
        """
        written: list[list[int]] = [[] for _ in chats]
        done = 0
        sizes = [chat.n_tokens + new + 1 for chat, new in zip(chats, max_new_tokens, strict=True)]
        for batch in self._join(chats, self._read(chats, plan_branches(chats), sizes), sizes):
            new = self._decode(batch, [max_new_tokens[i] for i in batch.indices], stop_ids, stop)
            for i, tokens in zip(batch.indices, new, strict=True):
                written[i] = tokens
            done += len(batch.indices)
            del batch  # before the next one is read: its cache may be large
            if progress:
                progress(done, len(chats))
        return written

    def read_last(
        self, chats: Sequence[RenderedChat], counts: Sequence[int]
    ) -> Iterator[tuple[int, Float[Tensor, "last vocab"]]]:
        """The next-token logits at the last positions of every conversation.

        Args:
            chats: conversations.
            counts: how many positions of each conversation are wanted. The tokens after the first of these
                positions count as written by the model.

        Yields:
            The index of a conversation and its logits.
        """
        limits = [chat.n_tokens - count for chat, count in zip(chats, counts, strict=True)]
        branches = plan_branches(chats, limits=limits)
        for batch in self._read(chats, branches, [chat.n_tokens for chat in chats], counts):
            for row, index in enumerate(batch.indices):
                yield index, batch.logits[row, -counts[index] :]

    def _read(
        self,
        chats: Sequence[RenderedChat],
        branches: Sequence[Branch],
        sizes: Sequence[int],
        counts: Sequence[int] | None = None,
    ) -> Iterator[_ReadBatch]:
        """Read prompts in batches that stay within the budget, given each prompt's final size.

        Keys and values of a prompt are kept only until the last prompt that shares its prefix has been read.
        """
        waiting: dict[int, list[int]] = defaultdict(list)  # by parent, the prefixes that others will share
        for branch in branches:
            if branch.parent is not None:
                waiting[branch.parent].append(branch.shared)
        for due in _by_round(branches):
            for indices in plan_batches([sizes[branch.index] for branch in due], self.batch_tokens):
                together = [due[i] for i in indices]
                for part in _alike(chats, together, self._tolerance):
                    batch = self._prefill(chats, part, counts)
                    self._keep_prefixes(batch, waiting)
                    yield batch
                    del batch  # before the next one is read: its cache may be large
                self._forget_prefixes(together, waiting)

    def _keep_prefixes(self, batch: _ReadBatch, waiting: Mapping[int, list[int]]) -> None:
        """Keep the prefixes of a batch's prompts that other prompts will share."""
        for row, index in enumerate(batch.indices):
            if index in waiting:
                prefix = batch.take(row, max(waiting[index]))
                alone = len(batch.indices) == 1
                self._kept[index] = prefix if alone else [(k.clone(), v.clone()) for k, v in prefix]

    def _forget_prefixes(self, branches: Sequence[Branch], waiting: dict[int, list[int]]) -> None:
        """Drop the prefixes that no prompt needs any more now that these branches are read."""
        for branch in branches:
            if branch.parent is None:
                continue
            waiting[branch.parent].remove(branch.shared)
            if not waiting[branch.parent]:
                del waiting[branch.parent], self._kept[branch.parent]

    def _join(
        self, chats: Sequence[RenderedChat], batches: Iterable[_ReadBatch], sizes: Sequence[int]
    ) -> Iterator[_ReadBatch]:
        """Merge batches as long as they stay within the budget, so that they are continued together."""
        parts: list[_ReadBatch] = []
        for batch in batches:
            indices = [index for part in (*parts, batch) for index in part.indices]
            if parts and max(sizes[index] for index in indices) * len(indices) > self.batch_tokens:
                yield self._merge(chats, parts)
            parts.append(batch)
            del batch
        if parts:
            yield self._merge(chats, parts)

    def _merge(self, chats: Sequence[RenderedChat], parts: list[_ReadBatch]) -> _ReadBatch:
        """One batch of several, which are taken out of the list, so that their caches can go."""
        if len(parts) == 1:
            return parts.pop()
        indices = [index for part in parts for index in part.indices]
        whole = _place([chats[i] for i in indices], self.pad_id, self.device)
        rows = [part.take(row) for part in parts for row in range(len(part.indices))]
        logits = torch.cat([part.logits[:, -1:] for part in parts])
        columns = whole.tokens.shape[1]
        parts.clear()
        return _ReadBatch(indices, whole, logits, _stack(rows, columns, columns + ROOM))

    def _prefill(
        self, chats: Sequence[RenderedChat], branches: Sequence[Branch], counts: Sequence[int] | None
    ) -> _ReadBatch:
        """Read one batch of prompts after the prefixes that they share.

        Each row reads as many tokens as the row with most unread tokens: where it would have padding, it
        reads some of its prefix again. So no row has padding between its tokens.
        """
        indices = [branch.index for branch in branches]
        last = [1] * len(indices) if counts is None else [counts[index] for index in indices]
        unread = max(chats[branch.index].n_tokens - branch.shared for branch in branches)
        shared = [max(0, chats[index].n_tokens - unread) for index in indices]
        batch = _place([chats[index] for index in indices], self.pad_id, self.device, last)
        past, known = None, max(shared)
        if known:
            rows = [self._recall(branch, n) for branch, n in zip(branches, shared, strict=True)]
            past = _stack(rows, known, batch.tokens.shape[1] + ROOM)
        logits, cached = self.backend.prefill(batch, past, known, self.steerings, max(last))
        return _ReadBatch(indices, batch, logits[:, -max(last) :], cached)

    def _recall(self, branch: Branch, n_tokens: int) -> RowKeyValues:
        """The first tokens of a branch's cached prefix; empty if it needs none."""
        if branch.parent is None or not n_tokens:
            return []
        return [(k[..., :n_tokens, :], v[..., :n_tokens, :]) for k, v in self._kept[branch.parent]]

    @property
    def _tolerance(self) -> Tolerance:
        return _ON_CPU if self.device.type == "cpu" else _ON_ACCELERATOR

    def _decode(
        self, batch: _ReadBatch, limits: Sequence[int], stop_ids: Collection[int], stop: Stop | None
    ) -> list[list[int]]:
        """Continue the prompts of a batch until all are finished."""
        written: list[list[int]] = [[] for _ in limits]
        finished = [limit < 1 for limit in limits]
        rows, logits = list(range(len(limits))), batch.logits[:, -1]
        with self.backend.resume(batch.batch, batch.past, self.steerings) as decode:
            while True:
                chosen = choose(logits)
                left = []
                for at, (row, token) in enumerate(zip(rows, chosen, strict=True)):
                    finished[row] = finished[row] or token in stop_ids
                    if finished[row]:
                        continue
                    written[row].append(token)
                    finished[row] = len(written[row]) >= limits[row] or bool(stop and stop(written[row]))
                    if not finished[row]:
                        left.append(at)
                if not left:
                    return written
                if len(left) <= _THIN_OUT * len(rows):
                    decode.keep(torch.tensor(left, device=self.device))
                    rows, chosen = [rows[at] for at in left], [chosen[at] for at in left]
                logits = decode(torch.tensor(chosen, device=self.device)[:, None])


@dataclass(frozen=True)
class _ReadBatch:
    """Prompts that have been read: their indices, their columns, the last logits, and the cache."""

    indices: list[int]
    batch: TokenBatch
    logits: Float[Tensor, "batch last vocab"]
    past: KeyValues

    def take(self, row: int, tokens: int | None = None) -> RowKeyValues:
        """A view of the cached keys and values of one prompt, or of its first tokens, without padding."""
        columns = self.batch.tokens.shape[1]
        first = columns - int(self.batch.attention_mask[row].sum())
        at = slice(first, columns if tokens is None else first + tokens)
        return [(k[row, :, at], v[row, :, at]) for k, v in self.past]


def choose(logits: Float[Tensor, "batch vocab"]) -> list[int]:
    """The most likely token of every row.

    Raises:
        ModelFailureError: a row's logits are not numbers (NaN).
    """
    best, chosen = logits.max(-1)
    if bool(best.isnan().any()):
        raise ModelFailureError("the model's logits are not numbers (NaN).")
    return chosen.tolist()


def _by_round(branches: Sequence[Branch]) -> Iterator[list[Branch]]:
    """The branches of every round, in the order of the rounds."""
    for number in range(max(branch.round for branch in branches) + 1):
        yield [branch for branch in branches if branch.round == number]


def _alike(
    chats: Sequence[RenderedChat], branches: Sequence[Branch], tolerance: Tolerance
) -> Iterator[list[Branch]]:
    """Split branches into parts with about the same number of unread tokens, each read in one batch."""

    def unread(branch: Branch) -> int:
        return chats[branch.index].n_tokens - branch.shared

    part: list[Branch] = []
    for branch in sorted(branches, key=lambda b: (-unread(b), -b.shared)):
        longest = unread(part[0]) if part else 0
        fits = longest <= tolerance.short or unread(branch) >= tolerance.alike * longest
        if part and not (fits and longest <= tolerance.long):
            yield part
            part = []
        part.append(branch)
    yield part


def _place(
    chats: Sequence[RenderedChat],
    pad_id: int,
    device: torch.device,
    last: Sequence[int] | None = None,
) -> TokenBatch:
    """Pad prompts on the left.

    Args:
        chats: the prompts.
        pad_id: token id for padding.
        device: where tokens go in.
        last: by prompt, how many last positions are wanted (default 1); the tokens after the first of them
            count as the model's own.
    """
    columns = max(chat.n_tokens for chat in chats)
    tokens = np.full((len(chats), columns), pad_id, dtype=np.int64)
    roles = np.full((len(chats), columns), -1, dtype=np.int64)
    marked = np.zeros((len(chats), columns), dtype=bool)
    for row, chat in enumerate(chats):
        at = slice(columns - chat.n_tokens, columns)
        tokens[row, at], roles[row, at] = chat.tokens, chat.role
        if chat.emphasised is not None:
            marked[row, at] = chat.emphasised
    return TokenBatch(
        torch.from_numpy(tokens).to(device),
        torch.from_numpy(roles).to(device),
        torch.from_numpy(roles >= 0).long().to(device),
        torch.tensor([columns + 1 - n for n in last or [1] * len(chats)], device=device),
        torch.from_numpy(marked).to(device) if marked.any() else None,
    )


def _stack(rows: Sequence[RowKeyValues], columns: int, capacity: int) -> KeyValues:
    """Keys and values of several prompts, padded on the left to `columns` and stacked; a row may be empty.

    The columns up to `capacity` stay free.
    """

    def join(layer: int, which: int) -> Tensor:
        known = [row[layer][which] if row else None for row in rows]
        pattern = next(one for one in known if one is not None)
        whole = pattern.new_empty(len(rows), pattern.shape[0], capacity, pattern.shape[-1])
        for at, one in enumerate(known):
            empty = columns - (0 if one is None else one.shape[-2])
            whole[at, :, :empty] = 0
            if one is not None:
                whole[at, :, empty:columns] = one
        return whole

    layers = range(max(len(row) for row in rows))
    return [(join(layer, 0), join(layer, 1)) for layer in layers]


__all__ = ["Sharing", "Stop", "choose"]
