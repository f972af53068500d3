"""One layer's attention in one forward pass: its output, its role shares, its pattern."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctxlens.chat.roles import N_ROLES
from ctxlens.models.attention.fused import (
    augmented_attention,
    compute_attention_pattern,
    compute_score_bias,
)
from ctxlens.models.attention.resting import KeyGroups, RestingShares, SinkReader
from ctxlens.models.attention.shares import compute_role_shares
from ctxlens.models.attention.sinks import SAMPLE_TILE_NUMBERS
from ctxlens.models.attention.steering import weigh_targets
from ctxlens.models.attention.tiled import tiled_attention
from ctxlens.models.backends.batch import take_queries
from ctxlens.models.backends.native.attending import Attending, add_to_mask

_ROWS_APART = 32
"""If at most one query in this many is wanted, its shares are computed separately from the output, which was
measured to cost the same or less."""

_APART_TILE = 64
"""The tile for queries whose shares are computed separately."""

_MODEL_ROLES = N_ROLES - 1
"""The roles that keys can have; the last role is the sink's, which has no key."""


@dataclass
class Call:
    """One layer's attention in one forward pass, with its model's own terms and how it is steered.

    Attributes:
        query, key, value: as in `augmented_attention`.
        mask: the attention mask; None where causality, or nothing, masks.
        causal: whether causality masks, in place of a mask.
        scale: factor on the dot products.
        terms: arguments of `tiled_attention` that one fused call cannot express.
        bias: the steering's bias by key.
        select: the weight of the bias by head and query.
    """

    query: Float[Tensor, "batch head query_pos d_head"]
    key: Float[Tensor, "batch kv_head key_pos d_head"]
    value: Float[Tensor, "batch kv_head key_pos d_value"]
    mask: Tensor | None
    causal: bool
    scale: float | None
    terms: dict[str, Any]
    bias: Float[Tensor, "batch key_pos steering"] | None = None
    select: Float[Tensor, "... steering"] | None = None

    def without_unwritten_keys(self) -> Call:
        """The same call without the keys of a static cache that are not written yet."""
        n = self.query.shape[2]
        if not self.causal or self.key.shape[2] <= n:
            return self
        terms = dict(self.terms)
        if "position_bias" in terms:
            terms["position_bias"] = terms["position_bias"][..., :n]
        return replace(self, key=self.key[:, :, :n], value=self.value[:, :, :n], terms=terms)

    def steer_by_ready_mask(self, attending: Attending, layer: int) -> Call:
        """The same call, steered by an additive mask that layers and steps share."""
        mask = attending.step_mask(layer, self.query, self.key.shape[2], self.mask)
        return Call(self.query, self.key, self.value, mask, self.causal, self.scale, self.terms)

    def steer_by_mask(self, attending: Attending, layer: int) -> Call:
        """The same call, steered by an additive mask of its own."""
        bias, select = self._weigh(attending, layer, explicitly=True)
        added = compute_score_bias(self.query, bias, select).to(self.query.dtype)
        return replace(self, mask=added if self.mask is None else add_to_mask(added, self.mask))

    def steer_by_columns(self, attending: Attending, layer: int) -> Call:
        """The same call, steered by columns of Q and K."""
        bias, select = self._weigh(attending, layer, explicitly=False)
        return replace(self, bias=bias, select=select)

    def _weigh(self, attending: Attending, layer: int, *, explicitly: bool) -> tuple[Tensor, Tensor]:
        """The biases, and their weights by head and query with which target shares are reached."""
        keys = attending.keys
        bias = keys.bias(self.key.shape[2], self.query.shape[0], self.query.device)
        read_shares = partial(self._spread, bias, explicitly=explicitly)
        select = attending.weights(layer, self.query).select
        return bias, weigh_targets(keys.steerings, bias, select, read_shares)

    def _spread(self, bias: Tensor, kinds: Tensor, weights: Tensor, *, explicitly: bool) -> Tensor:
        """How attention spreads over two kinds of keys under some weights of the biases."""
        biased = {"key_bias": bias, "head_select": weights, **self._masking()}
        if explicitly:
            return compute_role_shares(compute_attention_pattern(self.query, self.key, **biased), kinds, 2)
        run = tiled_attention if self.terms else augmented_attention
        shares = run(self.query, self.key, self.value[..., :0], role_ids=kinds, n_roles=2, **biased)[1]
        assert shares is not None
        return shares

    def output(self) -> Float[Tensor, "batch head query_pos d_value"]:
        """The attention output."""
        return self._run(self.query, self.key, self.value)[0]

    def read(
        self,
        role_ids: Int[Tensor, "batch key_pos"],
        queries: Int[Tensor, "batch query"] | None,
        *,
        exact: bool,
        n_groups: int = _MODEL_ROLES,
    ) -> tuple[Float[Tensor, "batch head query_pos d_value"], Float[Tensor, "batch head query role"]]:
        """The output, and the shares of all roles for some queries (all by default).

        Keys may also be grouped in another way, into `n_groups` groups. The last share is the learned sink's.
        """
        n_keys = self.key.shape[2]
        if queries is not None and queries.shape[1] * _ROWS_APART <= n_keys and not self.terms:
            queries = queries.to(self.query.device)
            output, shares = self.output(), self._read_apart(role_ids, queries, n_groups)
        else:
            output, shares = self._read_all(role_ids, n_groups, exact=exact)
            if queries is not None:
                shares = take_queries(shares, queries.to(shares.device))
        if "sinks" not in self.terms:
            shares = torch.nn.functional.pad(shares, (0, 1))
        return output, shares

    def read_resting(
        self,
        role_ids: Int[Tensor, "batch key_pos"],
        queries: Int[Tensor, "batch query"] | None,
        sinks: SinkReader,
        *,
        exact: bool,
    ) -> tuple[Float[Tensor, "batch head query_pos d_value"], RestingShares]:
        """The output, and the shares of some queries, with the part of them that rests on sinks."""
        candidates = sinks.finder.candidate_keys().to(self.key.device)
        received = self.attention_to(candidates, sinks.sample.positions.to(self.key.device))
        found = sinks.find(received, candidates)
        groups = KeyGroups.of(role_ids, found)
        output, shares = self.read(groups.ids, queries, exact=exact, n_groups=len(groups.roles))
        shares = shares.float()
        return output, groups.split(shares[..., :-1], shares[..., -1])

    def _read_all(self, role_ids: Tensor, n_groups: int, *, exact: bool) -> tuple[Tensor, Tensor]:
        """Output and shares of every query, in one call unless 16-bit shares are wanted in float32."""
        if exact and not self.terms and self.query.dtype != torch.float32:
            output = self.output()
            wide = [x.float() for x in (self.query, self.key, self.value[..., :0])]
            _, shares = self._run(*wide, role_ids=role_ids, n_roles=n_groups)
        else:
            output, shares = self._run(self.query, self.key, self.value, role_ids=role_ids, n_roles=n_groups)
        assert shares is not None
        return output, shares

    def _read_apart(self, role_ids: Tensor, queries: Tensor, n_groups: int) -> Tensor:
        """The shares of few queries, computed separately from the output, in float32 or wider."""
        query, given = self._rows(queries)
        wanted = {"role_ids": role_ids, "n_roles": n_groups, "key_bias": self.bias, "scale": self.scale}
        nothing = self.value[..., :0]
        _, shares = tiled_attention(query, self.key, nothing, **wanted, **given, tile=_APART_TILE)
        assert shares is not None
        return shares

    def pattern(
        self, queries: Int[Tensor, "batch query"] | None, columns: Int[Tensor, " column"] | None = None
    ) -> Float[Tensor, "batch head query_pos column"]:
        """The pattern of some queries and keys (all by default), masked as the kernel masks it."""
        if queries is None:
            queries = repeat(
                torch.arange(self.query.shape[2]), "query -> batch query", batch=self.query.shape[0]
            )
        query, given = self._rows(queries.to(self.query.device))
        given |= {"key_bias": self.bias, "scale": self.scale, "columns": columns}
        return compute_attention_pattern(query, self.key, **given)

    def attention_to(
        self, columns: Int[Tensor, " column"], queries: Int[Tensor, "batch query"]
    ) -> Float[Tensor, "batch head query column"]:
        """The attention of some queries to few keys, a few queries at a time, in the memory of caches."""
        per_query = self.query.shape[0] * self.query.shape[1] * self.key.shape[2]
        parts = queries.split(max(1, SAMPLE_TILE_NUMBERS // per_query), dim=1)
        return torch.cat([self.pattern(part, columns) for part in parts], dim=2)

    def _rows(self, queries: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Some queries, and the parts of mask, head weights and terms that belong to them."""
        given = {"head_select": self.select, "attn_mask": self.mask, **self.terms}
        for name, x in given.items():
            if isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] > 1:
                given[name] = take_queries(x.expand(len(self.query), -1, -1, -1), queries)
        if self.mask is None and self.causal:
            given["attn_mask"] = self._causal_rows(queries)
        return take_queries(self.query, queries), given

    def _causal_rows(self, queries: Tensor) -> Bool[Tensor, "batch 1 query key_pos"]:
        """The causal mask of some queries."""
        position = torch.arange(self.key.shape[2], device=queries.device)
        last = queries + self.key.shape[2] - self.query.shape[2]
        return rearrange(position <= last[..., None], "batch query key -> batch 1 query key")

    def _masking(self) -> dict[str, Any]:
        return {"attn_mask": self.mask, "is_causal": self.causal, "scale": self.scale, **self.terms}

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, role_ids: Tensor | None = None, n_roles: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """The fused or the tiled call, for queries, keys and values of any dtype."""
        run = tiled_attention if self.terms else augmented_attention
        rest = self._masking()
        if self.mask is not None and self.mask.is_floating_point():
            rest["attn_mask"] = self.mask.to(query.dtype)
        return run(
            query,
            key,
            value,
            role_ids=role_ids,
            n_roles=n_roles,
            key_bias=self.bias,
            head_select=self.select,
            **rest,
        )


__all__ = ["Call"]
