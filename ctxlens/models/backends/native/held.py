"""Queries and keys of a whole forward pass, from which the attention of any token can be computed later.

A pattern of every layer, head and query of a long text does not fit in memory, and a forward pass per query
takes seconds. Queries and keys of all layers fit: `(n_heads + n_key_value_heads) * d_head` numbers per token
and layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctxlens.models.attention.resting import KeyGroups, RestingShares, SinkReader
from ctxlens.models.attention.shares import compute_role_shares
from ctxlens.models.backends.native.call import Call


@dataclass(frozen=True)
class HeldCall:
    """One layer's attention without its values, and the sinks found in it.

    Attributes:
        call: the call; its values are empty.
        sinks: which keys are attention sinks; None where they were not looked for.
    """

    call: Call
    sinks: Bool[Tensor, "batch key_pos"] | None

    @classmethod
    def of(cls, call: Call, sinks: SinkReader | None) -> HeldCall:
        """Keep a call; its sinks are found now, because the candidates grow from layer to layer."""
        found = None
        if sinks is not None:
            candidates = sinks.finder.candidate_keys().to(call.key.device)
            received = call.attention_to(candidates, sinks.sample.positions.to(call.key.device))
            found = sinks.find(received, candidates)
        empty = call.value.new_empty((*call.value.shape[:-1], 0))
        return cls(replace(call, value=empty), found)


@dataclass(frozen=True)
class HeldAttention:
    """The attention of one conversation, held so that it can be asked about any of its tokens.

    Attributes:
        calls: the layers, from the lowest.
        role_ids: the role of every token.
        next_logits: the logits of the token that follows the text.
    """

    calls: Sequence[HeldCall]
    role_ids: Int[Tensor, "1 pos"]
    next_logits: Float[Tensor, " vocab"]

    @property
    def nbytes(self) -> int:
        """The memory that this takes; tensors that layers share count once."""
        tensors = [x for held in self.calls for x in _tensors(held)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        return sum(storages.values()) + self.next_logits.nbytes

    @torch.no_grad()
    def pattern(self, layers: Sequence[int], queries: Sequence[int]) -> Float[Tensor, "layer head query key"]:
        """The attention pattern of some layers and queries, float32, on the CPU."""
        asked = torch.tensor([list(queries)])
        return torch.stack([self.calls[layer].call.pattern(asked)[0].float().cpu() for layer in layers])

    @torch.no_grad()
    def shares(
        self, queries: Sequence[int]
    ) -> tuple[Float[Tensor, "layer head query role"], Float[Tensor, "layer head query role"] | None]:
        """Role shares of some queries in every layer and head, and the part of them that rests on sinks."""
        found = [self._shares(held, torch.tensor([list(queries)])) for held in self.calls]
        resting = [part.resting[0].cpu() for part in found]
        known = all(held.sinks is not None for held in self.calls)
        return torch.stack([part.shares[0].cpu() for part in found]), torch.stack(resting) if known else None

    def _shares(self, held: HeldCall, queries: Tensor) -> RestingShares:
        pattern = held.call.pattern(queries).float()
        role_ids = self.role_ids.to(pattern.device)
        none = torch.zeros_like(role_ids, dtype=torch.bool)
        groups = KeyGroups.of(role_ids, none if held.sinks is None else held.sinks.to(pattern.device))
        by_group = compute_role_shares(pattern, groups.ids, len(groups.roles))
        learned = 1 - pattern.sum(-1) if "sinks" in held.call.terms else None
        return groups.split(by_group, learned)


def _tensors(held: HeldCall) -> list[Tensor]:
    call = held.call
    given = [call.query, call.key, call.mask, call.bias, call.select, held.sinks, *call.terms.values()]
    return [x for x in given if isinstance(x, Tensor)]


__all__ = ["HeldAttention", "HeldCall"]
