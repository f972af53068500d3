"""Conversations as rectangles of tokens, and the keys that attention sees while a batch is continued."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
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
        prompt_tokens: column from which on tokens are generated ones, by row.
        emphasised: tokens marked by `ctxlens.emphasise`; None: no conversation has any.
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
        """Pad conversations to the longest, on the left (to generate) or on the right (to read)."""
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
"""Generated keys that are made ready at once."""


@dataclass
class RunningKeys:
    """Roles and biases of the keys that an attention layer sees while a batch is read or continued.

    The prompt's columns and those of generated tokens are one sequence, made ready some way ahead; what a
    layer sees is a slice of it.

    Attributes:
        batch: the prompts; what comes after them is the model's own, role assistant.
        steerings: what is steered.
        seen: how many columns have gone into the model so far, those of the current step too.
    """

    batch: TokenBatch
    steerings: tuple[Steering, ...] = ()
    seen: int = 0
    _made: dict[tuple[int, torch.device], tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def keep(self, rows: Int[Tensor, " row"]) -> None:
        """Go on with some of the conversations only."""
        self.batch = self.batch.rows(rows)
        self._made.clear()

    def window(self, n_keys: int) -> slice:
        """Which columns of the sequence a layer with `n_keys` keys sees.

        A layer that keeps fewer keys than were seen (sliding window) keeps the last ones; one that has
        more (static cache) has them in front.
        """
        start = max(0, self.seen - n_keys)
        return slice(start, start + n_keys)

    def roles(
        self, n_keys: int, n_rows: int, device: torch.device | None = None
    ) -> Int[Tensor, "batch key_pos"]:
        """The role of each of `n_keys` keys; `n_rows` may be a multiple of the batch (beams, samples)."""
        return self.whole(n_keys, n_rows, device)[0][:, self.window(n_keys)]

    def bias(
        self, n_keys: int, n_rows: int, device: torch.device | None = None
    ) -> Float[Tensor, "batch key_pos steering"]:
        """The key biases in nats, one column a steering, of each of `n_keys` keys."""
        bias = self.whole(n_keys, n_rows, device)[1]
        assert bias is not None, "without steering there is no bias"
        return bias[:, self.window(n_keys)]

    def whole(
        self, n_keys: int, n_rows: int, device: torch.device | None = None
    ) -> tuple[Int[Tensor, "batch column"], Float[Tensor, "batch column steering"] | None]:
        """Roles and biases of the whole sequence, made once until it must grow."""
        known = self.batch.role_ids
        device = known.device if device is None else device
        needed = max(self.seen, n_keys)
        made = self._made.get((n_rows, device))
        if made is None or made[0].shape[1] < needed:
            more = 0 if needed <= known.shape[1] else needed - known.shape[1] + _ROOM
            made = self._make(more, n_rows, device)
            self._made[n_rows, device] = made
        return made

    def _make(self, more: int, n_rows: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        batch = self.batch
        roles = torch.nn.functional.pad(batch.role_ids, (0, more), value=int(Role.ASSISTANT))
        bias = None
        if self.steerings:
            marked = batch.emphasised
            marked = None if marked is None else torch.nn.functional.pad(marked, (0, more))
            bias = combine_biases(self.steerings, roles, batch.prompt_tokens, marked)
            bias = bias.repeat_interleave(n_rows // len(bias), 0).to(device)
        return roles.repeat_interleave(n_rows // len(roles), 0).to(device), bias


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length whose padded size stays within `batch_tokens`.

    A conversation that is longer than the budget is a batch of its own.
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
    index = queries[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
    return rows.gather(2, index)


__all__ = ["RunningKeys", "TokenBatch", "pad_queries", "plan_batches", "take_queries"]
