"""Role shares separated into what rests on attention sinks and what does not.

One forward pass is enough: the norms of the hidden states are noted at the entry of every layer, the
attention received is estimated from a sample of queries (`ctxlens.models.attention.sinks`), and the shares
are then read by role and by whether a key is a sink.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctxlens.chat.roles import N_ROLES, Role
from ctxlens.models.attention.sinks import QuerySample, SinkFinder, attention_received, sample_queries


class RestingShares(NamedTuple):
    """Role shares, and the part of them that rests on sinks.

    Attributes:
        shares: attention by role, 0 to 1; the last axis sums to 1.
        resting: the part of each share that falls on sinks of this role. The share of the learned sink,
            which is not a token, does not count here.
    """

    shares: Float[Tensor, "*rows role"]
    resting: Float[Tensor, "*rows role"]


def stack_resting(found: RestingShares) -> Float[Tensor, "batch 2 head query role"]:
    """Shares and resting parts of one layer in one tensor on the CPU."""
    return torch.stack(found, dim=1).cpu()


@dataclass(frozen=True)
class KeyGroups:
    """Keys grouped by role and by whether they are sinks. Only groups that occur have a number.

    Attributes:
        ids: the number of every key's group, -1 at padding.
        roles: the role of each group.
        on_sinks: whether each group consists of sinks.
    """

    ids: Int[Tensor, "batch key_pos"]
    roles: Int[Tensor, " group"]
    on_sinks: Bool[Tensor, " group"]

    @classmethod
    def of(cls, role_ids: Int[Tensor, "batch key_pos"], sinks: Bool[Tensor, "batch key_pos"]) -> KeyGroups:
        """The groups of some keys; a role id of -1 marks padding."""
        numbers = torch.where(role_ids < 0, -1, 2 * role_ids + sinks)
        found, ids = numbers.unique(return_inverse=True)
        if bool(found[0] < 0):
            found, ids = found[1:], ids - 1
        return cls(ids, found // 2, found % 2 == 1)

    def split(
        self,
        by_group: Float[Tensor, "batch head query group"],
        in_learned: Float[Tensor, "batch head query"] | None = None,
    ) -> RestingShares:
        """Role shares from the shares of the groups.

        Args:
            by_group: attention to each group.
            in_learned: attention to the learned sink of each head, if the model has one.
        """
        onto_role = torch.nn.functional.one_hot(self.roles, N_ROLES).to(by_group)
        shares = by_group @ onto_role
        if in_learned is not None:
            shares[..., int(Role.SINK)] = in_learned
        return RestingShares(shares, by_group @ (onto_role * self.on_sinks[:, None]))


@dataclass
class SinkReader:
    """Finds the sinks of every layer in one forward pass over right-padded texts.

    Attributes:
        finder: holds the candidates found so far.
        sample: the query positions from which the attention received is estimated.
    """

    finder: SinkFinder
    sample: QuerySample

    @classmethod
    def of_texts(cls, role_ids: Int[Tensor, "batch pos"]) -> SinkReader:
        """The reader for texts whose tokens have these roles; -1 marks padding."""
        is_token = role_ids >= 0
        return cls(SinkFinder(is_token, role_ids == int(Role.BOS)), sample_queries(is_token.sum(-1)))

    def enter(self, hidden: Float[Tensor, "batch pos d_model"]) -> None:
        """Note the hidden states at the entry of the next layer, whether it is read or not."""
        self.finder.enter(hidden)

    def find(
        self,
        pattern: Float[Tensor, "batch head sample column"],
        columns: Int[Tensor, " column"] | None = None,
    ) -> Bool[Tensor, "batch key_pos"]:
        """The sinks of a layer, from the attention pattern of the sampled queries.

        `columns` are the keys of the pattern, by default all; the others count as receiving nothing. Those of
        `SinkFinder.candidate_keys` are enough.
        """
        positions = self.sample.positions.to(pattern.device)
        sample = QuerySample(positions, self.sample.weights.to(pattern.device))
        received = attention_received(pattern, sample, columns)
        if columns is not None:
            received = received.new_zeros(self.finder.is_token.shape).index_copy_(1, columns, received)
        return self.finder.find(received)


__all__ = ["KeyGroups", "RestingShares", "SinkReader", "stack_resting"]
