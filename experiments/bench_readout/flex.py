"""On a GPU: does FlexAttention with a wider value beat SDPA with padded columns? One layer's attention."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from ctxlens.chat.roles import N_ROLES
from ctxlens.models.attention.fused import augmented_attention
from experiments.bench_readout.presets import Preset
from experiments.bench_readout.subject import make_batch
from experiments.bench_readout.timing import seconds


def widened_flex(attention: Any, query: Any, key: Any, value: Any, one_hot: Any, block_mask: Any) -> Any:
    """Output and shares by FlexAttention: only the value is wider than the head."""
    wide = torch.cat([value, one_hot[:, None].expand(-1, value.shape[1], -1, -1)], dim=-1)
    wide = F.pad(wide, (0, 2 ** (wide.shape[-1] - 1).bit_length() - wide.shape[-1]))
    output = attention(query, key, wide, block_mask=block_mask, enable_gqa=True)
    d = value.shape[-1]
    return output[..., :d], output[..., d : d + one_hot.shape[-1]]


def compare_flex(preset: Preset, length: int, rounds: int = 10) -> dict[str, Any]:
    """Milliseconds of plain SDPA, of ours and of the widened FlexAttention, and the shares' difference."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.manual_seed(0)
    device, dtype = preset.device, getattr(torch, preset.dtype)
    sizes = (preset.n_heads, preset.n_key_value_heads, preset.n_key_value_heads)
    query, key, value = (torch.randn(1, n, length, preset.d_head, device=device, dtype=dtype) for n in sizes)
    role_ids = make_batch(preset, length).role_ids
    n_roles = N_ROLES - 1
    one_hot = (role_ids[..., None] == torch.arange(n_roles, device=device)).to(dtype)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device)
    attention = torch.compile(flex_attention) if device == "cuda" else flex_attention
    runs = {
        "sdpa": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
        "ours": lambda: augmented_attention(
            query, key, value, role_ids=role_ids, n_roles=n_roles, is_causal=True
        ),
        "flex": lambda: widened_flex(attention, query, key, value, one_hot, mask),
    }
    difference = (runs["ours"]()[1].float() - runs["flex"]()[1].float()).abs().max()
    runs["sdpa"]()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    ms = {name: round(1e3 * median(spent), 3) for name, spent in times.items()}
    return {"length": length, "ms": ms, "shares_difference": float(f"{difference:.3g}")}


__all__ = ["compare_flex", "widened_flex"]
