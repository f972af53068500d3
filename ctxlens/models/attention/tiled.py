"""Attention with terms that one fused call cannot express, exactly, in tiles of queries.

Soft-capped scores (Gemma 2), attention sinks (gpt-oss) and position biases (ALiBi) stand between the dot
product and the softmax, where a fused kernel lets nobody in. Here the pattern is computed explicitly, for
a few queries at a time: temporaries are `head x tile x key_pos`, never `head x query_pos x key_pos`, in
training too, where every tile is computed again for its gradient.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ctxlens.errors import InputError
from ctxlens.models.attention.fused import BLINDING_BIAS, check_shapes, compute_score_bias, split_biases


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
    tile: int = 256,
) -> tuple[Float[Tensor, "batch head query_pos d_value"], Float[Tensor, "batch head query_pos role"] | None]:
    """Attention output and role shares, as `augmented_attention` gives them, with three more terms.

    The scores are `softcap * tanh((scale * q k + position_bias) / softcap)`; mask and steering bias come
    on top of them, and the softmax runs over the keys and the sink, in float32 or wider.

    Args:
        query: as in `augmented_attention`, like all arguments up to `scale`.
        key: keys.
        value: values.
        role_ids: role of every key; None: no shares are wanted, the second result is None.
        n_roles: number of roles.
        key_bias: what is added to the scores of chosen heads, in nats; minus infinity blinds a key.
        head_select: weight of the bias by head.
        attn_mask: True (or 0) where a query may attend, False (or a large negative number) where not.
        is_causal: a query sees the keys up to its own position, aligned at the last key.
        scale: factor on the dot products; default `d_head ** -0.5`.
        softcap: bound on the size of a score before masks, > 0.
        sinks: by head, the score of a key that has no value: attention that goes nowhere. Neither mask
            nor steering touches it.
        position_bias: added to the scaled dot products, in nats.
        tile: number of queries whose pattern is alive at a time.

    Returns:
        The attention output, and the shares in float32. With `sinks` they have one more column, the last:
        the sink's share, so that they still sum to 1 over the columns if every visible key has a role.

    Raises:
        InputError: shapes that do not fit, a softcap or tile that is not positive, or a query all of whose
            visible keys are blinded (unless it has a sink to go to).
    """
    check_shapes(query, key, value, role_ids, key_bias, attn_mask, is_causal)
    _check_terms(query, key, softcap, sinks, position_bias, tile)
    n_queries, n_keys = query.shape[2], key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    wide_keys = key.to(wide).transpose(-1, -2)
    selects = None
    blinding = False
    if key_bias is not None:
        biases, by_bias = split_biases(query, key_bias, head_select)
        key_bias, selects = torch.stack(biases, -1), torch.stack(by_bias, -1)
        blinding = sinks is None and bool(torch.isneginf(key_bias).any())
    one_hot = None
    if role_ids is not None:
        one_hot = (role_ids[..., None] == torch.arange(n_roles, device=role_ids.device)).to(wide)[:, None]

    def attend(start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        last = stop + n_keys - n_queries if is_causal else n_keys
        rows = query[:, :, start:stop]
        scores = _group(rows.to(wide) * factor, key) @ wide_keys[..., :last]
        scores = scores.reshape(*rows.shape[:3], last)
        if position_bias is not None:
            scores = scores + _take_rows(position_bias, start, stop)[..., :last].to(wide)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = None if attn_mask is None else attn_mask[:, :, start:stop, :last]
        if visible is not None and visible.dtype != torch.bool:
            scores, visible = scores + visible.to(wide), None
        if is_causal:
            position = torch.arange(last, device=query.device)
            past = position <= position[-(stop - start) :, None]
            visible = past if visible is None else visible & past
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        if key_bias is not None and selects is not None:
            bias = compute_score_bias(rows, key_bias[:, :last], _take_rows(selects, start, stop))
            if blinding:
                _check_not_all_blinded(scores, bias, start)
            scores = scores + bias.to(wide)
        pattern, in_sink = _softmax(scores, None if sinks is None else sinks.to(wide))
        in_value = pattern.to(value.dtype)
        output = (_group(in_value, key) @ value[:, :, :last]).reshape(*rows.shape[:3], value.shape[-1])
        if one_hot is None:
            return output, None
        shares = pattern @ one_hot[:, :, :last]
        if in_sink is not None:
            shares = torch.cat([shares, in_sink], -1)
        return output, shares.float()

    given = (query, key, value, key_bias, selects, attn_mask, sinks, position_bias)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    outputs, shares = [], []
    for start in range(0, n_queries, tile):
        stop = min(start + tile, n_queries)
        if learns:
            output, share = checkpoint(attend, start, stop, use_reentrant=False)
        else:
            output, share = attend(start, stop)
        outputs.append(output)
        shares.append(share)
    return torch.cat(outputs, 2), None if role_ids is None else torch.cat(shares, 2)


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The pattern, and the sink's share `[batch, head, query, 1]`; a query without any key gets zeros."""
    if sinks is not None:
        sink = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        with_sink = torch.cat([scores, sink], -1).softmax(-1)
        return with_sink[..., :-1], with_sink[..., -1:]
    lost = torch.isneginf(scores.detach().amax(-1, keepdim=True))
    if not bool(lost.any()):
        return scores.softmax(-1), None
    return scores.masked_fill(lost, 0.0).softmax(-1).masked_fill(lost, 0.0), None


def _group(rows: Tensor, key: Tensor) -> Tensor:
    """Rows `[batch, head, query, x]` as `[batch, kv_head, heads of the group x query, x]`."""
    return rows.reshape(rows.shape[0], key.shape[1], -1, rows.shape[3])


def _take_rows(of_queries: Tensor, start: int, stop: int) -> Tensor:
    """The queries of a tile from `[batch, head, query_pos or 1, ...]`."""
    return of_queries if of_queries.shape[2] == 1 else of_queries[:, :, start:stop]


def _check_not_all_blinded(scores: Tensor, bias: Tensor, start: int) -> None:
    seen = scores > torch.finfo(scores.dtype).min / 2
    lost = seen.any(-1) & ~(seen & (bias > BLINDING_BIAS / 2)).any(-1)
    if bool(lost.any()):
        batch, head, row = (int(i) for i in lost.nonzero()[0])
        raise InputError(
            f"every key that batch, head, query {(batch, head, start + row)} can see is blinded, so its "
            "attention has nowhere to go; leave it at least one key, or use a finite bias."
        )


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


__all__ = ["tiled_attention"]
