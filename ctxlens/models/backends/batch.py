"""Conversations as rectangles of tokens, and the keys that attention sees while a batch runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.models.attention.steering import Steering, combine_biases


@dataclass(frozen=True)
class TokenBatch:
    """Rendered conversations as one rectangle.

    Attributes:
        tokens: token ids; padding holds the pad id.
        role_ids: role of every token, -1 at padding.
        attention_mask: 1 at tokens, 0 at padding.
        prompt_tokens: by row, the column of the first generated token.
        emphasised: tokens marked by `ctxlens.emphasise`; None means that no conversation has any.
    """

    tokens: Int[Tensor, "batch pos"]
    role_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    prompt_tokens: Int[Tensor, " batch"]
    emphasised: Bool[Tensor, "batch pos"] | None = None

    @classmethod
    def from_chats(
        cls,
        chats: Sequence[RenderedChat],
        *,
        pad_id: int,
        side: Literal["left", "right"],
        device: torch.device | str = "cpu",
    ) -> TokenBatch:
        """Pad conversations to the longest one, on the left (to generate) or on the right (to read)."""
        longest = max(len(chat.tokens) for chat in chats)
        tokens = torch.full((len(chats), longest), pad_id, dtype=torch.long)
        role_ids = torch.full((len(chats), longest), -1, dtype=torch.long)
        emphasised = torch.zeros((len(chats), longest), dtype=torch.bool)
        ends = []
        for row, chat in enumerate(chats):
            start = longest - len(chat.tokens) if side == "left" else 0
            end = start + len(chat.tokens)
            tokens[row, start:end] = torch.from_numpy(np.asarray(chat.tokens, dtype=np.int64))
            role_ids[row, start:end] = torch.from_numpy(np.asarray(chat.role, dtype=np.int64))
            if chat.emphasised is not None:
                emphasised[row, start:end] = torch.from_numpy(chat.emphasised)
            ends.append(end)
        marked = emphasised.to(device) if emphasised.any() else None
        mask = (role_ids >= 0).long()
        return cls(
            tokens.to(device), role_ids.to(device), mask.to(device), torch.tensor(ends).to(device), marked
        )

    def rows(self, rows: Int[Tensor, " row"]) -> TokenBatch:
        """Some of the conversations."""
        marked = None if self.emphasised is None else self.emphasised[rows]
        return TokenBatch(
            self.tokens[rows],
            self.role_ids[rows],
            self.attention_mask[rows],
            self.prompt_tokens[rows],
            marked,
        )


_ROOM = 256
"""How many columns for generated keys are prepared at once."""


@dataclass(frozen=True)
class HeadWeights:
    """How strongly the heads of a layer are steered.

    Attributes:
        select: the weight of every steering's bias by head.
        numbers: the same as plain numbers: layers with equal numbers are steered alike.
    """

    select: Float[Tensor, "1 head 1 steering"]
    numbers: tuple[float, ...]


@dataclass(frozen=True)
class KeyColumns:
    """Roles and biases of all columns: those of the prompts, and some that are prepared for generated tokens.

    Attributes:
        roles: the role of every column.
        biases: the key biases in nats; None without steering.
    """

    roles: Int[Tensor, "batch column"]
    biases: Float[Tensor, "batch column steering"] | None
    _score_biases: dict[tuple[tuple[float, ...], torch.dtype], Tensor] = field(default_factory=dict)

    def score_bias(self, weights: HeadWeights, dtype: torch.dtype) -> Float[Tensor, "batch #head 1 column"]:
        """The biases times the weights of a layer's heads, summed over steerings.

        Layers that are steered alike share one tensor. It is made once for these columns: whoever needs more
        columns, or fewer rows, makes new `KeyColumns`.
        """
        key = (weights.numbers, dtype)
        if key not in self._score_biases:
            assert self.biases is not None, "without steering there is no bias"
            by_head = rearrange(weights.select, "1 head 1 steering -> head steering")
            if bool((by_head == by_head[:1]).all()):
                by_head = by_head[:1]
            total = einsum(self.biases, by_head, "batch column steering, head steering -> batch head column")
            self._score_biases[key] = rearrange(total, "batch head column -> batch head 1 column").to(dtype)
        return self._score_biases[key]


@dataclass
class RunningKeys:
    """Roles and biases of the keys that an attention layer sees while a batch is read or continued.

    The columns of the prompts and of the generated tokens form one sequence, which is prepared some way
    ahead. A layer sees a slice of it.

    Attributes:
        batch: the prompts; the tokens after them are the model's own and have the role assistant.
        steerings: what is steered.
        seen: how many columns have gone into the model so far, including those of the current step.
    """

    batch: TokenBatch
    steerings: tuple[Steering, ...] = ()
    seen: int = 0
    _columns: dict[tuple[int, torch.device], KeyColumns] = field(default_factory=dict)

    def keep(self, rows: Int[Tensor, " row"]) -> None:
        """Continue with some of the conversations only."""
        self.batch = self.batch.rows(rows)
        self._columns.clear()

    def window(self, n_keys: int) -> slice:
        """Which columns of the sequence a layer with `n_keys` keys sees.

        A layer that keeps fewer keys than were seen (sliding window) keeps the last ones. A layer that has
        more keys (static cache) has the columns seen in front.
        """
        start = max(0, self.seen - n_keys)
        return slice(start, start + n_keys)

    def roles(
        self, n_keys: int, n_rows: int, device: torch.device | None = None
    ) -> Int[Tensor, "batch key_pos"]:
        """The role of each of `n_keys` keys; `n_rows` may be a multiple of the batch (beams, samples)."""
        return self._prepared(n_keys, n_rows, device).roles[:, self.window(n_keys)]

    def bias(
        self, n_keys: int, n_rows: int, device: torch.device | None = None
    ) -> Float[Tensor, "batch key_pos steering"]:
        """The key biases in nats of each of `n_keys` keys, one column per steering."""
        biases = self._prepared(n_keys, n_rows, device).biases
        assert biases is not None, "without steering there is no bias"
        return biases[:, self.window(n_keys)]

    def score_bias(
        self, weights: HeadWeights, n_keys: int, n_rows: int, dtype: torch.dtype, device: torch.device
    ) -> Float[Tensor, "batch #head 1 key_pos"]:
        """What a layer's head weights make of the biases of `n_keys` keys, as an additive mask."""
        columns = self._prepared(n_keys, n_rows, device)
        return columns.score_bias(weights, dtype)[..., self.window(n_keys)]

    def _prepared(self, n_keys: int, n_rows: int, device: torch.device | None) -> KeyColumns:
        """The columns of the whole sequence, made once until more are needed."""
        known = self.batch.role_ids
        device = known.device if device is None else device
        needed = max(self.seen, n_keys)
        columns = self._columns.get((n_rows, device))
        if columns is None or columns.roles.shape[1] < needed:
            more = 0 if needed <= known.shape[1] else needed - known.shape[1] + _ROOM
            columns = self._columns[n_rows, device] = self._prepare(more, n_rows, device)
        return columns

    def _prepare(self, more: int, n_rows: int, device: torch.device) -> KeyColumns:
        """The columns of the prompts and `more` columns for generated tokens."""
        batch = self.batch
        copies = n_rows // len(batch.role_ids)
        roles = torch.nn.functional.pad(batch.role_ids, (0, more), value=int(Role.ASSISTANT))
        biases = None
        if self.steerings:
            marked = batch.emphasised
            marked = None if marked is None else torch.nn.functional.pad(marked, (0, more))
            biases = combine_biases(self.steerings, roles, batch.prompt_tokens, marked)
            biases = repeat(biases, "row column steering -> (row copy) column steering", copy=copies).to(
                device
            )
        return KeyColumns(repeat(roles, "row column -> (row copy) column", copy=copies).to(device), biases)


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group indices into batches of similar length whose padded size stays within `batch_tokens`.

    A conversation that is longer than the budget gets a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad_queries(
    queries: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> Int[Tensor, "batch query"]:
    """Query positions of several conversations as one rectangle; the padding repeats position 0."""
    longest = max((len(row) for row in queries), default=0)
    return torch.tensor(
        [[*map(int, row), *[0] * (longest - len(row))] for row in queries], dtype=torch.long, device=device
    ).reshape(len(queries), longest)


def take_queries(
    rows: Shaped[Tensor, "batch head query_pos last"], queries: Int[Tensor, "batch query"]
) -> Shaped[Tensor, "batch head query last"]:
    """The chosen query rows of every conversation."""
    index = repeat(queries, "batch query -> batch head query last", head=rows.shape[1], last=rows.shape[3])
    return rows.gather(2, index)


__all__ = [
    "HeadWeights", "KeyColumns", "RunningKeys", "TokenBatch", "pad_queries", "plan_batches", "take_queries",
]  # fmt: skip
