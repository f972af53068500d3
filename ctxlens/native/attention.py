"""The attention of a transformers decoder, taken over for the time of a `with` block.

One attention function and one mask function are registered under the name `ctxlens`. `attend` selects them
on a model for the time of a `with` block and restores the old choice on exit. Inside it every forward pass,
with or without cache, is steered, and the asked layers' role shares are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ctxlens.augment import augmented_attention, compute_attention_pattern, compute_score_bias
from ctxlens.batching import RunningKeys, TokenBatch, take_queries
from ctxlens.errors import InputError, UnsupportedModelError
from ctxlens.roles import N_ROLES
from ctxlens.steering import Steering, combine_selects

NAME = "ctxlens"

_FEW_QUERIES = 8
"""Up to so many queries (decoding steps) an additive mask is cheaper than columns on the whole cache."""

_FOREIGN_TERMS = {
    "softcap": "soft-caps its attention scores",
    "s_aux": "has attention sinks",
    "position_bias": "adds a position bias (such as ALiBi) to its attention scores",
}


class _StopForward(Exception):
    """Raised out of the forward pass after the highest layer that is wanted."""


@dataclass
class Attending:
    """What happens in the attention of a model inside `attend`, and what has been read so far.

    Attributes:
        keys: roles and biases of the keys.
        layers: the layers to read.
        queries: the query positions to keep, by row.
        keep: whether role shares or whole patterns are kept.
        stop: whether the forward pass ends after the highest layer to read.
        collected: by layer, shares `[batch, head, query, role]` or patterns, float32, on the CPU.
        called: the layers whose attention went through here.
    """

    keys: RunningKeys
    layers: frozenset[int] = frozenset()
    queries: Int[Tensor, "batch query"] | None = None
    keep: Literal["shares", "pattern"] = "shares"
    stop: bool = False
    collected: dict[int, Tensor] = field(default_factory=dict)
    called: set[int] = field(default_factory=set)
    _selects: dict[int, Tensor] = field(default_factory=dict)
    _masks: dict[tuple[float, ...], tuple[int, Tensor | None, Tensor]] = field(default_factory=dict)

    def select(self, layer: int, n_heads: int, device: torch.device) -> Tensor:
        """The head weights of a layer `[1, head, 1, steering]`, made once."""
        if layer not in self._selects:
            self._selects[layer] = combine_selects(self.keys.steerings, layer, n_heads).to(device)
        return self._selects[layer]

    def step_mask(self, layer: int, query: Tensor, n_keys: int, mask: Tensor | None) -> Tensor:
        """Bias and mask of a decoding step in one additive mask, shared by layers that are steered alike."""
        select = self.select(layer, query.shape[1], query.device)
        alike = tuple(select.flatten().tolist()) if query.device.type == "cpu" else (float(layer),)
        made = self._masks.get(alike)
        size = (query.shape[0], n_keys)
        if (
            made is None
            or made[0] != self.keys.seen
            or made[1] is not mask
            or (made[2].shape[0], made[2].shape[-1]) != size
        ):
            key_bias = self.keys.bias(n_keys, query.shape[0]).to(query.device)
            bias = compute_score_bias(query, key_bias, select)
            made = self._masks[alike] = (self.keys.seen, mask, _add_to_mask(bias, mask, query.dtype))
        return made[2]


_ATTENDING: dict[int, Attending] = {}
"""What is going on in the models whose configs have these ids."""


@contextmanager
def attend(
    model: PreTrainedModel,
    batch: TokenBatch,
    *,
    steerings: Sequence[Steering] = (),
    layers: Sequence[int] = (),
    queries: Int[Tensor, "batch query"] | None = None,
    keep: Literal["shares", "pattern"] = "shares",
    stop: bool = False,
) -> Iterator[Attending]:
    """Steer and read every forward pass (and `generate`) of a transformers model inside the block.

    With `stop`, the forward pass ends silently after the highest layer to read; the block ends with it.

    Raises:
        UnsupportedModelError: the model does not take its attention from `AttentionInterface`.
    """
    active = tuple(s for s in steerings if not s.changes_nothing)
    attending = Attending(RunningKeys(batch, active), frozenset(layers), queries, keep, stop)
    configs: dict[int, Any] = {
        id(config): config
        for config in (getattr(module, "config", None) for module in model.modules())
        if hasattr(config, "_attn_implementation")
    }
    outer = {key: _ATTENDING.get(key) for key in configs}
    chosen = {key: config._attn_implementation for key, config in configs.items()}
    hook = model.base_model.register_forward_pre_hook(_count_positions(attending), with_kwargs=True)
    try:
        for key, config in configs.items():
            config._attn_implementation_internal = NAME
            _ATTENDING[key] = attending
        yield attending
    except _StopForward:
        pass
    finally:
        hook.remove()
        for key, config in configs.items():
            config._attn_implementation_internal = chosen[key]
            before = outer[key]
            if before is None:
                _ATTENDING.pop(key, None)
            else:
                _ATTENDING[key] = before


def _count_positions(attending: Attending) -> Any:
    def count(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = args[0] if args else kwargs["inputs_embeds"]
        past = kwargs.get("past_key_values")
        attending.keys.seen = tokens.shape[1] + (0 if past is None else int(past.get_seq_length()))

    return count


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: plain where nothing is asked of a layer."""
    attending = _ATTENDING.get(id(getattr(module, "config", None)))
    layer = cast(int, getattr(module, "layer_idx", None))
    _check_expressible(module, dropout, kwargs)
    reads = attending is not None and layer in attending.layers
    steerings = () if attending is None else tuple(s for s in attending.keys.steerings if s.touches(layer))
    if attending is None or not (reads or steerings):
        if attending is not None:
            attending.called.add(layer)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    attending.called.add(layer)

    n_queries = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and n_queries > 1
    if causal and key.shape[2] > n_queries:  # an empty static cache: what comes after is not written yet
        key, value = key[:, :, :n_queries], value[:, :, :n_queries]
    bias = select = None
    is_step = n_queries <= _FEW_QUERIES and not causal and not reads
    if steerings and is_step:
        attention_mask = attending.step_mask(layer, query, key.shape[2], attention_mask)
    elif steerings:
        bias = attending.keys.bias(key.shape[2], query.shape[0]).to(query.device)
        select = attending.select(layer, query.shape[1], query.device)
    rest: dict[str, Any] = {"attn_mask": attention_mask, "is_causal": causal, "scale": scaling}
    if reads and attending.keep == "pattern":
        _collect_pattern(attending, layer, query, key, bias, select, rest)
    role_ids = None
    if reads and attending.keep == "shares":
        role_ids = attending.keys.roles(key.shape[2], query.shape[0]).to(query.device)
    output, shares = augmented_attention(
        query, key, value, role_ids=role_ids, n_roles=N_ROLES - 1, key_bias=bias, head_select=select, **rest
    )
    if shares is not None:
        kept = shares
        if attending.queries is not None:
            kept = take_queries(shares, attending.queries.to(shares.device))
        kept = kept.float().cpu()
        attending.collected[layer] = torch.nn.functional.pad(kept, (0, 1))  # no token is a sink
    if reads and attending.stop and layer == max(attending.layers):
        raise _StopForward
    return output.transpose(1, 2).contiguous(), None


def _collect_pattern(
    attending: Attending,
    layer: int,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    select: Tensor | None,
    rest: Mapping[str, Any],
) -> None:
    """Compute the pattern of the wanted queries explicitly, masked as the kernel masks it."""
    if attending.queries is None:
        queries = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
    else:
        queries = attending.queries.to(query.device)
    mask = rest["attn_mask"]
    if mask is None:
        position = torch.arange(key.shape[2], device=query.device)
        mask = (position <= queries[..., None])[:, None]
    else:
        mask = take_queries(mask.expand(query.shape[0], -1, -1, -1), queries)
    pattern = compute_attention_pattern(
        take_queries(query, queries),
        key,
        key_bias=bias,
        head_select=select,
        attn_mask=mask,
        scale=rest["scale"],
    )
    attending.collected[layer] = pattern.float().cpu()


def _add_to_mask(bias: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    bias = bias.to(dtype)
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(dtype).min)
    return torch.where(mask > torch.finfo(mask.dtype).min / 2, bias + mask, mask)


def _check_expressible(module: torch.nn.Module, dropout: float, kwargs: Mapping[str, Any]) -> None:
    for term, what in _FOREIGN_TERMS.items():
        if kwargs.get(term) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} {what}, which one fused attention call cannot express; "
                'load the model with backend="lens".'
            )
    if dropout:
        raise InputError("attention dropout is on; call model.eval() before reading or steering attention.")


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


__all__ = ["NAME", "Attending", "attend"]
