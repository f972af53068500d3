"""Attention with terms that one fused call cannot express, computed exactly in tiles of queries.

Soft-capped scores (Gemma 2), attention sinks (gpt-oss) and position biases (ALiBi) act between the dot
product and the softmax, which a fused kernel does not expose. Here the pattern is computed explicitly, for a
few queries at a time. Temporaries have size `head x tile x key_pos`, never `head x query_pos x key_pos`. This
holds in training too, where every tile is computed again for its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ctxlens.errors import InputError
from ctxlens.models.attention.fused import (
    append_sink,
    check_shapes,
    compute_score_bias,
    mark_roles,
    refuse_all_blinded,
    score_keys,
    split_biases,
)

TILE = 256
"""How many queries have their pattern in memory at a time."""

TILE_COPIES = 3
"""How many tensors as large as a tile's pattern exist at once: scores, masked scores, and pattern."""


def tiled_attention(
    query: Float[Tensor, "batch head query_pos d_head"],
    key: Float[Tensor, "batch kv_head key_pos d_head"],
    value: Float[Tensor, "batch kv_head key_pos d_value"],
    *,
    role_ids: Int[Tensor, "batch key_pos"] | None,
    n_roles: int,
    key_bias: Float[Tensor, "batch key_pos *biases"] | None = None,
    head_select: Float[Tensor, "..."] | None = None,
    attn_mask: Bool[Tensor, "#batch #head query_pos key_pos"]
    | Float[Tensor, "#batch #head query_pos key_pos"]
    | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | None = None,
    position_bias: Float[Tensor, "#batch #head #query_pos key_pos"] | None = None,
    tile: int = TILE,
) -> tuple[Float[Tensor, "batch head query_pos d_value"], Float[Tensor, "batch head query_pos role"] | None]:
    """Attention output and role shares, as `augmented_attention` gives them, with three more terms.

    The scores are `softcap * tanh((scale * q k + position_bias) / softcap)`. Mask and steering bias are added
    to them, and the softmax runs over the keys and the sink, in float32 or wider.

    Args:
        query: as in `augmented_attention`, like all arguments up to `scale`.
        key: keys.
        value: values.
        role_ids: role of every key. None: no shares are computed, and the second result is None.
        n_roles: number of roles.
        key_bias: what is added to the scores of chosen heads, in nats; minus infinity blinds a key.
        head_select: weight of the bias by head.
        attn_mask: True (or 0) where a query may attend, False (or a large negative number) where not.
        is_causal: a query sees the keys up to its own position; the last query is aligned with the last key.
        scale: factor on the dot products; default `d_head ** -0.5`.
        softcap: bound on the size of a score before masks, > 0.
        sinks: by head, the score of a key that has no value, so that attention to it goes nowhere. Neither
            mask nor steering changes it.
        position_bias: added to the scaled dot products, in nats.
        tile: number of queries whose pattern is in memory at a time.

    Returns:
        The attention output, and the shares in float32. With `sinks` they have one more column, the last:
        the sink's share. The columns sum to 1 if every visible key has a role.

    Raises:
        InputError: shapes that do not fit, a softcap or tile that is not positive, or a query all of whose
            visible keys are blinded (unless it has a sink to attend to).
    """
    check_shapes(query, key, value, role_ids, key_bias, attn_mask, is_causal)
    _check_terms(query, key, softcap, sinks, position_bias, tile)
    wide = torch.promote_types(query.dtype, torch.float32)
    one_hot = select = None
    if role_ids is not None:
        one_hot = rearrange(mark_roles(role_ids, n_roles, wide), "batch key role -> batch 1 key role")
    if key_bias is not None:
        biases, selects = split_biases(query, key_bias, head_select)
        key_bias, select = torch.stack(biases, -1), torch.stack(selects, -1)
    tiles = _Tiles(
        query=query,
        wide_key=key.to(wide),
        value=value,
        one_hot=one_hot,
        key_bias=key_bias,
        select=select,
        refuses_blindness=key_bias is not None and sinks is None and bool(torch.isneginf(key_bias).any()),
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        sinks=sinks,
        position_bias=position_bias,
    )
    learns = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad
        for x in (query, key, value, key_bias, select, attn_mask, sinks, position_bias)
    )
    outputs, shares = [], []
    for start in range(0, query.shape[2], tile):
        stop = min(start + tile, query.shape[2])
        if learns:
            output, share = checkpoint(tiles.attend, start, stop, use_reentrant=False)
        else:
            output, share = tiles.attend(start, stop)
        outputs.append(output)
        shares.append(share)
    return torch.cat(outputs, 2), None if role_ids is None else torch.cat(shares, 2)


@dataclass(frozen=True)
class _Tiles:
    """The checked arguments of `tiled_attention`, of which each tile takes its part."""

    query: Tensor
    wide_key: Tensor
    value: Tensor
    one_hot: Tensor | None
    key_bias: Tensor | None
    select: Tensor | None
    refuses_blindness: bool
    attn_mask: Tensor | None
    is_causal: bool
    scale: float
    softcap: float | None
    sinks: Tensor | None
    position_bias: Tensor | None

    def attend(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Output and shares of the queries from `start` to before `stop`."""
        n_keys = self._count_keys(stop)
        scores = self._steer(self._mask(self._score(start, stop, n_keys), start, stop), start, stop)
        pattern, in_sink = _softmax(scores, self.sinks)
        output = _mix_values(pattern.to(self.value.dtype), self.value[:, :, :n_keys])
        if self.one_hot is None:
            return output, None
        shares = pattern @ self.one_hot[:, :, :n_keys]
        if in_sink is not None:
            shares = torch.cat([shares, in_sink], -1)
        return output, shares.float()

    def _count_keys(self, stop: int) -> int:
        """How many keys the queries before `stop` can see at most."""
        n_keys = self.wide_key.shape[2]
        return stop + n_keys - self.query.shape[2] if self.is_causal else n_keys

    def _score(self, start: int, stop: int, n_keys: int) -> Tensor:
        """Scores before masks: scaled dot products, position bias, soft cap."""
        rows = self.query[:, :, start:stop].to(self.wide_key.dtype) * self.scale
        scores = score_keys(rows, self.wide_key[:, :, :n_keys])
        if self.position_bias is not None:
            bias = _take_rows(self.position_bias, start, stop)[..., :n_keys]
            scores = scores + bias.to(scores.dtype)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores

    def _mask(self, scores: Tensor, start: int, stop: int) -> Tensor:
        """Scores with minus infinity at keys that a query does not see."""
        n_keys = scores.shape[-1]
        visible = None if self.attn_mask is None else self.attn_mask[:, :, start:stop, :n_keys]
        if visible is not None and visible.dtype != torch.bool:
            scores, visible = scores + visible.to(scores.dtype), None
        if self.is_causal:
            position = torch.arange(n_keys, device=scores.device)
            past = position <= position[-(stop - start) :, None]
            visible = past if visible is None else visible & past
        return scores if visible is None else scores.masked_fill(~visible, -torch.inf)

    def _steer(self, scores: Tensor, start: int, stop: int) -> Tensor:
        """Scores with the steering's bias."""
        if self.key_bias is None or self.select is None:
            return scores
        rows, select = self.query[:, :, start:stop], _take_rows(self.select, start, stop)
        bias = compute_score_bias(rows, self.key_bias[:, : scores.shape[-1]], select)
        if self.refuses_blindness:
            refuse_all_blinded(scores > torch.finfo(scores.dtype).min / 2, bias, start)
        return scores + bias.to(scores.dtype)


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The pattern, and the sink's share `[batch, head, query, 1]`; a query without any key gets zeros."""
    if sinks is not None:
        with_sink = append_sink(scores, sinks).softmax(-1)
        return with_sink[..., :-1], with_sink[..., -1:]
    lost = torch.isneginf(scores.detach().amax(-1, keepdim=True))
    if not bool(lost.any()):
        return scores.softmax(-1), None
    return scores.masked_fill(lost, 0.0).softmax(-1).masked_fill(lost, 0.0), None


def _mix_values(pattern: Tensor, value: Tensor) -> Tensor:
    """The values weighted by a pattern; the heads of a group share their values."""
    rows = rearrange(
        pattern, "batch (kv_head group) query key -> batch kv_head (group query) key", kv_head=value.shape[1]
    )
    return rearrange(
        rows @ value, "batch kv_head (group query) d -> batch (kv_head group) query d", query=pattern.shape[2]
    )


def _take_rows(of_queries: Tensor, start: int, stop: int) -> Tensor:
    """The queries of a tile from `[batch, head, query_pos or 1, ...]`."""
    return of_queries if of_queries.shape[2] == 1 else of_queries[:, :, start:stop]


def _check_terms(
    query: Tensor,
    key: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    tile: int,
) -> None:
    batch, n_heads, query_pos, _ = query.shape
    if tile < 1:
        raise InputError(f"tile is {tile}; expected the number of queries worked on at a time, at least 1.")
    if softcap is not None and not softcap > 0:
        raise InputError(f"softcap is {softcap}; expected a bound on scores, greater than 0, or None.")
    if sinks is not None and sinks.shape != (n_heads,):
        raise InputError(f"sinks have shape {tuple(sinks.shape)}; expected [head] = [{n_heads}].")
    if position_bias is not None:
        want = (batch, n_heads, query_pos, key.shape[2])
        have = position_bias.shape
        fits = len(have) == 4 and all(h in (1, w) for h, w in zip(have[:3], want[:3], strict=True))
        if not fits or have[3] != want[3]:
            raise InputError(
                f"position_bias has shape {tuple(have)}; expected [batch or 1, head or 1, query_pos or 1, "
                f"key_pos] = {list(want)}."
            )


__all__ = ["TILE", "TILE_COPIES", "tiled_attention"]
