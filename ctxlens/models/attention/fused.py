"""Attention output, role shares and steering in one fused attention call.

Attention returns `softmax(scale * Q K^T + mask) V`. Extra columns turn that one call into an instrument:

- V gets one column per role, 1 at the keys of that role and 0 elsewhere. The output's extra columns *are*
  the role shares of every query and head, so that no pattern of size query_pos x key_pos ever exists.
- K gets a column with each key's bias, and Q a column with each head's weight. The score becomes
  `scale * q k + weight * bias`, for exactly the chosen heads, also under grouped-query attention.

`compute_attention_pattern` is the explicit definition of the same numbers. Use it for few queries.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctxlens.errors import InputError

BLINDING_BIAS = -1e4
"""Stands for a key bias of minus infinity. It is finite, so that heads that are not chosen stay exact."""

WIDTH_MULTIPLE = 8
"""Fused kernels want heads whose width is a multiple of this."""

FEW_QUERIES = 8
"""Largest number of queries (decoding steps) that counts as few. For few queries an additive mask costs less
than columns on the whole cache, and the heads of a group are treated as further queries of one head, so that
nothing in the cache is copied."""

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


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

    ```python
    import torch
    import ctxlens as cl

    query, key, value = torch.zeros(3, 1, 2, 4, 8)  # 1 sequence, 2 heads, 4 positions, heads of size 8
    role_ids = torch.tensor([[0, 1, 1, 2]])
    output, shares = cl.augmented_attention(query, key, value, role_ids=role_ids, n_roles=3)
    assert shares[0, 0, 3].tolist() == [0.25, 0.5, 0.25]  # equal scores: every key gets a quarter
    ```

    Args:
        query: queries; the number of heads is a multiple of `kv_head` (grouped-query attention).
        key: keys.
        value: values.
        role_ids: role of every key, 0 to `n_roles` - 1. A key with any other id (-1 by convention) counts
            towards no role. None: no shares are computed, and the second result is None.
        n_roles: number of roles.
        key_bias: added to the score of every query of a chosen head with this key, in nats. log(alpha)
            weakens a key by the factor alpha before renormalisation; minus infinity blinds it (its share
            is then below 1e-6). One more axis holds several biases, each with its own `head_select`.
        head_select: weight of the bias by head, `[head]` or `[batch, head, query_pos]`: 1 for chosen heads
            and 0 for others (default: all heads). Any real weight scales the bias. With several biases
            the last axis runs over them.
        attn_mask: True (or 0) where a query may attend, False (or a large negative number) where not.
        is_causal: a query sees the keys up to its own position, on top of `attn_mask`. The last query is
            aligned with the last key, as a cache needs it.
        scale: factor on the dot products; default `d_head ** -0.5`.

    Returns:
        The attention output, and the shares in float32: how much of a query's attention goes to keys of
        each role. They sum to 1 over the roles if every visible key has one. A query for which `attn_mask`
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
        width = padded_width(max(d_head + len(columns), d_value + n_shares))
        query, key, value = (F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    for i, (in_query, in_key) in enumerate(columns):
        query[..., d_head + i] = in_query
        key[..., d_head + i] = rearrange(in_key, "batch key_pos -> batch 1 key_pos")
    if role_ids is not None:
        one_hot = mark_roles(role_ids, n_roles, value.dtype)
        value[..., d_value : d_value + n_roles] = rearrange(one_hot, "batch key role -> batch 1 key role")

    output = _call_kernel(query, key, value, mask, causal_kernel, factor)
    shares = None if role_ids is None else output[..., d_value : d_value + n_roles].float()
    return output[..., :d_value], shares


def padded_width(width: int) -> int:
    """The width to which heads of at least this width are padded."""
    return WIDTH_MULTIPLE * math.ceil(width / WIDTH_MULTIPLE)


def count_bias_columns(dtype: torch.dtype) -> int:
    """How many columns of Q and K one finite bias takes: 16-bit dtypes need it split."""
    return 3 if dtype in _SIXTEEN_BIT else 1


def mark_roles(
    role_ids: Int[Tensor, "batch key_pos"], n_roles: int, dtype: torch.dtype
) -> Float[Tensor, "batch key_pos role"]:
    """1 at the role of every key, 0 elsewhere; ids outside 0 to `n_roles` - 1 get zeros only."""
    return (role_ids[..., None] == torch.arange(n_roles, device=role_ids.device)).to(dtype)


def _call_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Torch's fused call, with grouped heads in the form that costs least."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.shape[2] <= FEW_QUERIES and not is_causal:
        return _call_kernel_by_group(query, key, value, mask, groups, scale)
    if groups > 1 and mask is not None and query.device.type == "cuda":
        # Fused CUDA kernels take a mask or grouped heads, but not both.
        copies = "batch kv_head key_pos width -> batch (kv_head group) key_pos width"
        key, value = (repeat(x, copies, group=groups) for x in (key, value))
        groups = 1
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=groups > 1
    )


def _call_kernel_by_group(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, groups: int, scale: float
) -> Tensor:
    """The fused call for few queries: the heads of a group become further queries of their one key head.

    Every decoding step of every layer comes through here. einops costs several microseconds per call, which
    is more than 1 % of such a step in a small model, so these are plain reshapes.
    """
    batch, n_heads, n_queries, width = query.shape
    rows = groups * n_queries
    query = query.reshape(batch, key.shape[1], rows, width)  # batch kv_head (group query) width
    if mask is not None and mask.shape[1] == n_heads:
        mask = mask.reshape(mask.shape[0], key.shape[1], rows, mask.shape[3])
    elif mask is not None and n_queries > 1:
        mask = repeat(mask, "batch 1 query key -> batch 1 (group query) key", group=groups)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return output.reshape(batch, n_heads, n_queries, output.shape[3])


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
    columns: Int[Tensor, " column"] | None = None,
) -> Float[Tensor, "batch head query_pos column"]:
    """The attention pattern itself, computed explicitly in float32 or wider.

    Memory grows with query_pos x key_pos, so ask for few queries. Arguments as in `augmented_attention`, and
    `softcap`, `sinks` and `position_bias` as in `tiled_attention`. With sinks a row sums to less than 1; the
    rest is the sink's share. `columns` are the keys whose attention is returned, by default all.
    """
    check_shapes(query, key, key, None, key_bias, attn_mask, is_causal)
    wide = torch.promote_types(query.dtype, torch.float32)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    mask, causal = _combine_masks(attn_mask, is_causal, query.shape[2], key.shape[2], query.device)
    if causal:
        mask = _causal_mask(query.shape[2], key.shape[2], query.device)
    scores = score_keys(query.to(wide) * factor, key.to(wide))
    if position_bias is not None:
        scores = scores + position_bias.to(wide)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if key_bias is not None:
        scores = scores + compute_score_bias(query, key_bias, head_select).to(wide)
    if mask is not None:
        # In place: the scores are this function's own, and another tensor of their size costs as much again.
        scores.add_(_as_additive(mask, wide) if mask.dtype == torch.bool else mask)
    n_keys = scores.shape[-1]
    pattern = (scores if sinks is None else append_sink(scores, sinks)).softmax(-1)[..., :n_keys]
    if columns is not None:
        pattern = pattern.index_select(-1, columns)
    return pattern if sinks is not None else torch.nan_to_num(pattern)


def _as_additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a query may attend, minus infinity elsewhere: adding it costs less than filling the scores."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def score_keys(
    query: Float[Tensor, "batch head query_pos d_head"], key: Float[Tensor, "batch kv_head key_pos d_head"]
) -> Float[Tensor, "batch head query_pos key_pos"]:
    """The dot products of queries and keys; the heads of a group share their keys."""
    rows = rearrange(
        query,
        "batch (kv_head group) query d_head -> batch kv_head (group query) d_head",
        kv_head=key.shape[1],
    )
    return rearrange(
        rows @ key.mT,
        "batch kv_head (group query) key -> batch (kv_head group) query key",
        query=query.shape[2],
    )


def append_sink(
    scores: Float[Tensor, "batch head query_pos key_pos"], sinks: Float[Tensor, " head"]
) -> Float[Tensor, "batch head query_pos key_pos_and_sink"]:
    """The scores with one more column, the last: the score of each head's sink."""
    column = repeat(
        sinks.to(scores.dtype), "head -> batch head query 1", batch=scores.shape[0], query=scores.shape[2]
    )
    return torch.cat([scores, column], -1)


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

    The kernel multiplies the product of both columns by `scale`, so the pair must give bias * weight / scale.
    The query's column holds the weight times a power of two, which loses nothing; the key's column holds the
    rest. In 16-bit dtypes bias and weight are each split into a rounded part and what rounding lost, so that
    about 16 bits of them are kept.
    """
    dtype = query.dtype
    power = 2.0 ** round(math.log2(1 / scale))
    biases, selects = split_biases(query, key_bias, head_select)
    blinding = bool(torch.isneginf(key_bias).any())
    columns = []
    for bias, select in zip(biases, selects, strict=True):
        blind = torch.isneginf(bias)
        wanted = bias.masked_fill(blind, 0.0) / (scale * power)
        rounded = wanted.to(dtype)
        weight = select * power
        rounded_weight = weight.to(dtype)
        columns.append((rounded_weight, rounded))
        if dtype in _SIXTEEN_BIT:
            columns.append((rounded_weight, (wanted - rounded.to(wanted.dtype)).to(dtype)))
            columns.append(((weight - rounded_weight.to(weight.dtype)).to(dtype), rounded))
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
        select = rearrange(select, "head bias -> 1 head 1 bias")
    fits = (
        select.ndim == 4
        and select.shape[0] in (1, batch)
        and select.shape[1] == n_heads
        and select.shape[2] in (1, query_pos)
        and select.shape[3] == len(biases)
    )
    if not fits:
        raise InputError(
            f"head_select has shape {tuple(head_select.shape)}; expected [head] = [{n_heads}] or "
            f"[batch, head, query_pos] = [{batch}, {n_heads}, {query_pos}]"
            + (f", each with {len(biases)} biases last." if several else ".")
        )
    return biases, list(select.unbind(-1))


def _causal_mask(query_pos: int, key_pos: int, device: torch.device) -> Tensor:
    ones = torch.ones(query_pos, key_pos, dtype=torch.bool, device=device)
    return rearrange(ones.tril(key_pos - query_pos), "query key -> 1 1 query key")


def _combine_masks(
    attn_mask: Tensor | None, is_causal: bool, query_pos: int, key_pos: int, device: torch.device
) -> tuple[Tensor | None, bool]:
    """The mask for the kernel, and whether the kernel's own causality can stand in for it."""
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
    refuse_all_blinded(visible, compute_score_bias(query, key_bias, head_select))


def refuse_all_blinded(visible: Tensor, bias: Tensor, first_query: int = 0) -> None:
    """Raise `InputError` if blinding leaves a query none of its visible keys.

    Args:
        visible: which keys a query may attend to, `[#batch, #head, #query, key]`.
        bias: what is added to the scores (`compute_score_bias`).
        first_query: the position of the first query, for the message.
    """
    left = (visible & (bias > BLINDING_BIAS / 2)).any(-1)
    lost = visible.any(-1) & ~left
    if bool(lost.any()):
        batch, head, query = (int(i) for i in lost.nonzero()[0])
        raise InputError(
            f"every key that batch, head, query {(batch, head, first_query + query)} can see is blinded, so "
            "its attention has nowhere to go; leave it at least one key, or use a finite bias."
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
    "BLINDING_BIAS", "FEW_QUERIES", "WIDTH_MULTIPLE", "append_sink", "augmented_attention", "check_shapes",
    "compute_attention_pattern", "compute_score_bias", "count_bias_columns", "mark_roles", "padded_width",
    "refuse_all_blinded", "score_keys", "split_biases",
]  # fmt: skip
