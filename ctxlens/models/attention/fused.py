"""Attention output, role shares and steering in one fused attention call.

Attention returns `softmax(scale * Q K^T + mask) V`. Three kinds of extra columns, zero elsewhere, turn
that one call into an instrument:

- one-hot role columns in V: the extra output columns *are* the role shares of every query and head,
  so no pattern of size query_pos x key_pos ever exists;
- a column with the key's bias in K and the head's weight in Q: the score becomes
  `scale * q k + weight * bias`, for exactly the chosen heads, under grouped-query attention too.

`compute_attention_pattern` is the explicit definition of the same numbers, for few queries.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctxlens.errors import InputError

BLINDING_BIAS = -1e4
"""What a key bias of minus infinity becomes: finite, so that heads that are not chosen stay exact."""

_WIDTH_MULTIPLE = 8

FEW_QUERIES = 8
"""Up to so many queries (decoding steps) an additive mask is cheaper than columns on the whole cache, and
the heads of a group are worked on as further queries of theirs, so that nothing of the cache is copied."""


def augmented_attention(
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
) -> tuple[Float[Tensor, "batch head query_pos d_value"], Float[Tensor, "batch head query_pos role"] | None]:
    """Scaled dot-product attention that also returns role shares and can be steered.

    Args:
        query: queries; a multiple of `kv_head` heads (grouped-query attention).
        key: keys.
        value: values.
        role_ids: role of every key, 0 to `n_roles` - 1; any other id (-1 by custom) counts to no role.
            None: no shares are wanted, the second result is None.
        n_roles: number of roles.
        key_bias: added to the score of every query of a chosen head with this key, in nats: log(alpha)
            weakens a key by the factor alpha before renormalisation, minus infinity blinds it (its share
            is then below 1e-6). One more axis holds several biases, each with its own `head_select`.
        head_select: weight of the bias by head, `[head]` or `[batch, head, query_pos]`, 1 for chosen heads
            and 0 for others (default: all heads); any real weight scales the bias. With several biases
            the last axis runs over them.
        attn_mask: True (or 0) where a query may attend, False (or a large negative number) where not.
        is_causal: a query sees the keys up to its own position, the last query being aligned with the
            last key (as a cache needs it), on top of `attn_mask`.
        scale: factor on the dot products; default `d_head ** -0.5`.

    Returns:
        The attention output, and the shares in float32: how much of a query's attention goes to keys of
        each role; they sum to 1 over the roles if every visible key has one. A query that `attn_mask`
        leaves no key has shares 0.

    Raises:
        InputError: shapes that do not fit, or a query all of whose visible keys are blinded.
    """
    check_shapes(query, key, value, role_ids, key_bias, attn_mask, is_causal)
    d_head, d_value = query.shape[-1], value.shape[-1]
    factor = d_head**-0.5 if scale is None else scale
    mask, causal_kernel = _combine_masks(attn_mask, is_causal, query.shape[2], key.shape[2], query.device)
    columns = [] if key_bias is None else _bias_columns(query, key_bias, head_select, factor)
    if key_bias is not None and bool(torch.isneginf(key_bias).any()):
        _check_not_all_blinded(query, key_bias, head_select, mask, causal_kernel)

    n_shares = 0 if role_ids is None else n_roles
    if columns or n_shares:
        width = max(d_head + len(columns), d_value + n_shares)
        width = _WIDTH_MULTIPLE * math.ceil(width / _WIDTH_MULTIPLE)
        query, key, value = (F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    for i, (in_query, in_key) in enumerate(columns):
        query[..., d_head + i] = in_query
        key[..., d_head + i] = in_key[:, None]
    if role_ids is not None:
        one_hot = role_ids[..., None] == torch.arange(n_roles, device=role_ids.device)
        value[..., d_value : d_value + n_roles] = one_hot[:, None].to(value.dtype)

    output = _call_kernel(query, key, value, mask, causal_kernel, factor)
    shares = None if role_ids is None else output[..., d_value : d_value + n_roles].float()
    return output[..., :d_value], shares


def _call_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Torch's fused call, with grouped heads in the form that costs least."""
    batch, n_heads, n_queries, _ = query.shape
    groups = n_heads // key.shape[1]
    if groups > 1 and n_queries <= FEW_QUERIES and not is_causal:
        query = query.reshape(batch, key.shape[1], groups * n_queries, query.shape[3])
        if mask is not None and mask.shape[1] == n_heads:
            mask = mask.reshape(mask.shape[0], key.shape[1], groups * n_queries, mask.shape[3])
        elif mask is not None and n_queries > 1:
            mask = mask.repeat(1, 1, groups, 1)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return output.reshape(batch, n_heads, n_queries, output.shape[3])
    if groups > 1 and mask is not None and query.device.type == "cuda":
        # fused kernels take a mask or grouped heads, not both
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=groups > 1
    )


def compute_attention_pattern(
    query: Float[Tensor, "batch head query_pos d_head"],
    key: Float[Tensor, "batch kv_head key_pos d_head"],
    *,
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
) -> Float[Tensor, "batch head query_pos key_pos"]:
    """The attention pattern itself, explicitly, in float32 or wider.

    Memory grows with query_pos x key_pos: ask for few queries. Arguments as in `augmented_attention`, and
    `softcap`, `sinks` (whose share is what a row lacks to 1) and `position_bias` as in `tiled_attention`.
    """
    check_shapes(query, key, key, None, key_bias, attn_mask, is_causal)
    wide = torch.promote_types(query.dtype, torch.float32)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    mask, causal = _combine_masks(attn_mask, is_causal, query.shape[2], key.shape[2], query.device)
    if causal:
        mask = _causal_mask(query.shape[2], key.shape[2], query.device)
    grouped = query.to(wide).reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    scores = grouped @ key.to(wide).transpose(-1, -2) * factor
    scores = scores.reshape(*query.shape[:3], key.shape[2])
    if position_bias is not None:
        scores = scores + position_bias.to(wide)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if key_bias is not None:
        scores = scores + compute_score_bias(query, key_bias, head_select).to(wide)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return torch.nan_to_num(scores.softmax(-1))


def compute_score_bias(
    query: Float[Tensor, "batch head query_pos d_head"],
    key_bias: Float[Tensor, "batch key_pos *biases"],
    head_select: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "batch head #query_pos key_pos"]:
    """What `key_bias` and `head_select` add to the scores, as one additive mask (for decoding steps)."""
    biases, selects = split_biases(query, key_bias, head_select)
    total: Tensor | float = 0.0
    for bias, select in zip(biases, selects, strict=True):
        blind = torch.isneginf(bias)
        finite = bias.masked_fill(blind, 0.0)
        total = total + select[..., None] * finite[:, None, None, :]
        total = total + (select != 0)[..., None] * (blind * BLINDING_BIAS)[:, None, None, :]
    assert isinstance(total, Tensor)
    return total


def _bias_columns(
    query: Tensor, key_bias: Tensor, head_select: Tensor | None, scale: float
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a query column [batch, head, query_pos] and a key column [batch, key_pos].

    The query's factor is a power of two and, in 16-bit dtypes, bias and weight are split in two each, so
    that rounding leaves about 16 bits of them.
    """
    dtype = query.dtype
    power = 2.0 ** round(math.log2(1 / scale))
    biases, selects = split_biases(query, key_bias, head_select)
    blinding = bool(torch.isneginf(key_bias).any())
    columns = []
    for bias, select in zip(biases, selects, strict=True):
        blind = torch.isneginf(bias)
        wanted = bias.masked_fill(blind, 0.0) / (scale * power)
        high = wanted.to(dtype)
        weight = select * power
        most = weight.to(dtype)
        columns.append((most, high))
        if dtype in (torch.float16, torch.bfloat16):
            columns.append((most, (wanted - high.to(wanted.dtype)).to(dtype)))
            columns.append(((weight - most.to(weight.dtype)).to(dtype), high))
        if blinding:
            chosen = ((select != 0) * power).to(dtype)
            columns.append((chosen, (blind * (BLINDING_BIAS / (scale * power))).to(dtype)))
    return columns


def split_biases(
    query: Tensor, key_bias: Tensor, head_select: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """One [batch, key_pos] bias and one [batch or 1, head, query_pos or 1] weight for each bias."""
    batch, n_heads, query_pos, _ = query.shape
    wide = torch.promote_types(key_bias.dtype, torch.float32)
    several = key_bias.ndim == 3
    biases = list(key_bias.to(wide).unbind(-1)) if several else [key_bias.to(wide)]
    if head_select is None:
        return biases, [torch.ones(1, n_heads, 1, dtype=wide, device=query.device)] * len(biases)
    select = head_select.to(device=query.device, dtype=wide)
    if not several:
        select = select[..., None]
    if select.ndim == 2:
        select = select[None, :, None]
    fits = select.ndim == 4 and all(
        have in (1, want)
        for have, want in zip(select.shape, (batch, n_heads, query_pos, len(biases)), strict=True)
    )
    if not fits or select.shape[1] != n_heads or select.shape[3] != len(biases):
        raise InputError(
            f"head_select has shape {tuple(head_select.shape)}; expected [head] = [{n_heads}] or "
            f"[batch, head, query_pos] = [{batch}, {n_heads}, {query_pos}]"
            + (f", each with {len(biases)} biases last." if several else ".")
        )
    return biases, list(select.unbind(-1))


def _causal_mask(query_pos: int, key_pos: int, device: torch.device) -> Tensor:
    ones = torch.ones(query_pos, key_pos, dtype=torch.bool, device=device)
    return ones.tril(key_pos - query_pos)[None, None]


def _combine_masks(
    attn_mask: Tensor | None, is_causal: bool, query_pos: int, key_pos: int, device: torch.device
) -> tuple[Tensor | None, bool]:
    """The mask for the kernel, and whether the kernel's own causality says the same without one."""
    if not is_causal or query_pos == 1:
        return attn_mask, False
    if attn_mask is None and query_pos == key_pos:
        return None, True
    causal = _causal_mask(query_pos, key_pos, device)
    if attn_mask is None:
        return causal, False
    if attn_mask.dtype == torch.bool:
        return attn_mask & causal, False
    return attn_mask.masked_fill(~causal, torch.finfo(attn_mask.dtype).min), False


def _check_not_all_blinded(
    query: Tensor, key_bias: Tensor, head_select: Tensor | None, mask: Tensor | None, causal: bool
) -> None:
    n_queries, n_keys = query.shape[2], key_bias.shape[1]
    if causal:
        mask = _causal_mask(n_queries, n_keys, query.device)
    if mask is None:
        visible = torch.ones(1, 1, 1, n_keys, dtype=torch.bool, device=query.device)
    else:
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    blinded = compute_score_bias(query, key_bias, head_select) <= BLINDING_BIAS / 2
    left = (visible & ~blinded).any(-1)
    lost = visible.any(-1) & ~left
    if bool(lost.any()):
        where = tuple(int(i) for i in lost.nonzero()[0])
        raise InputError(
            f"every key that batch, head, query {where} can see is blinded, so its attention has nowhere "
            "to go; leave it at least one key, or use a finite bias."
        )


def check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    role_ids: Tensor | None,
    key_bias: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> None:
    """Raise `InputError` where the arguments of an attention call do not fit together."""
    batch, n_heads, query_pos, d_head = query.shape
    kv_batch, n_kv_heads, key_pos, d_key = key.shape
    if (kv_batch, d_key) != (batch, d_head) or value.shape[:3] != key.shape[:3] or n_heads % n_kv_heads:
        raise InputError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit: "
            "expected [batch, head, query_pos, d_head] and twice [batch, kv_head, key_pos, d_head], "
            "head a multiple of kv_head."
        )
    for name, x in (("role_ids", role_ids), ("key_bias", key_bias)):
        if x is not None and x.shape[:2] != (batch, key_pos):
            raise InputError(
                f"{name} has shape {tuple(x.shape)}; expected [batch, key_pos] = [{batch}, {key_pos}]."
            )
    if attn_mask is not None and attn_mask.shape[-2:] != (query_pos, key_pos):
        raise InputError(
            f"attn_mask has shape {tuple(attn_mask.shape)}; expected [..., query_pos, key_pos] = "
            f"[..., {query_pos}, {key_pos}]."
        )
    if is_causal and query_pos > key_pos:
        raise InputError(
            f"causal attention with {query_pos} queries but {key_pos} keys leaves the first queries no key."
        )


__all__ = [
    "BLINDING_BIAS", "FEW_QUERIES", "augmented_attention", "check_shapes", "compute_attention_pattern",
    "compute_score_bias", "split_biases",
]  # fmt: skip
