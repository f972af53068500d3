"""The attention of a transformers decoder, taken over for the time of a `with` block.

One attention function and one mask function are registered under the name `ctxlens`. `attend` selects them
on a model for the time of a `with` block and restores the old choice on exit. Inside it every forward pass,
with or without cache, is steered, and the asked layers' role shares are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ctxlens.chat.roles import N_ROLES
from ctxlens.errors import InputError
from ctxlens.models.attention.fused import (
    FEW_QUERIES,
    augmented_attention,
    compute_attention_pattern,
    compute_score_bias,
)
from ctxlens.models.attention.shares import compute_role_shares
from ctxlens.models.attention.steering import Steering, combine_selects, weigh_targets
from ctxlens.models.attention.tiled import tiled_attention
from ctxlens.models.backends.batch import RunningKeys, TokenBatch, take_queries
from ctxlens.models.backends.native.direct import Attention, calls_directly, catch_direct_calls
from ctxlens.models.backends.protocol import Reduce

NAME = "ctxlens"

Path = Literal["fused", "tiled", "plain"]
"""How a layer's attention is computed: in one fused call, in exact tiles of queries, or as ever."""

_TERMS = {"softcap": "softcap", "s_aux": "sinks", "position_bias": "position_bias"}
"""What transformers calls the terms that one fused call cannot express, and what `tiled_attention` does."""


_ROWS_APART = 32
"""Shares of at most one query in so many are computed apart from the output (measured: cheaper or even)."""


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
        exact: whether the shares of 16-bit models are computed in float32.
        reduce: what is made of each layer's shares before they are kept.
        collected: by layer, shares `[batch, head, query, role]` or patterns, float32, on the CPU; or what was
            made of the shares, where the model runs.
        paths: by layer whose attention went through here, how it was computed.
    """

    keys: RunningKeys
    layers: frozenset[int] = frozenset()
    queries: Int[Tensor, "batch query"] | None = None
    keep: Literal["shares", "pattern"] = "shares"
    stop: bool = False
    exact: bool = False
    reduce: Reduce | None = None
    collected: dict[int, Tensor] = field(default_factory=dict)
    paths: dict[int, Path] = field(default_factory=dict)
    _selects: dict[int, tuple[Tensor, tuple[float, ...]]] = field(default_factory=dict)
    _biases: dict[tuple[object, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[object, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def select(self, layer: int, query: Tensor) -> tuple[Tensor, tuple[float, ...]]:
        """The head weights of a layer `[1, head, 1, steering]`, made once, and the same as numbers."""
        if layer not in self._selects:
            select = combine_selects(self.keys.steerings, layer, query.shape[1])
            alike = tuple(select.flatten().tolist())
            self._selects[layer] = select.to(query.device), alike
        return self._selects[layer]

    def step_mask(self, layer: int, query: Tensor, n_keys: int, mask: Tensor | None) -> Tensor:
        """Bias and mask of a decoding step in one additive mask, shared by layers that are steered alike.

        Where there is no mask it is a slice of what was made for many steps.
        """
        select, alike = self.select(layer, query)
        which = (alike, query.shape[0], query.dtype, query.device)
        made = self._masks.get((*which, n_keys))
        if mask is not None and made is not None and made[0] is mask:
            return made[1]
        biases = self.keys.whole(n_keys, query.shape[0], query.device)[1]
        assert biases is not None
        ready = self._biases.get(which)
        if ready is None or ready[0] is not biases:
            by_head = select[:, :1] if bool((select == select[:, :1]).all()) else select
            total = (biases[:, None, None] * by_head[..., None, :]).sum(-1)
            ready = self._biases[which] = biases, total.to(query.dtype)
        bias = ready[1][..., self.keys.window(n_keys)]
        if mask is None:
            return bias
        total = _add_to_mask(bias, mask)
        self._masks[(*which, n_keys)] = mask, total
        return total

    def start_step(self, seen: int) -> None:
        """Note how many columns have gone into the model with the forward pass that begins."""
        self.keys.seen = seen
        self._masks.clear()


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
    exact: bool = False,
    reduce: Reduce | None = None,
) -> Iterator[Attending]:
    """Steer and read every forward pass (and `generate`) of a transformers model inside the block.

    Args:
        model: a decoder that takes its attention from `AttentionInterface`.
        batch: the prompts that the forward passes are about.
        steerings: what is steered.
        layers: the layers to read.
        queries: the query positions to keep, by row; all by default.
        keep: role shares, or whole patterns.
        stop: end the forward pass silently after the highest layer to read; the block ends with it.
        exact: compute the shares of 16-bit models in float32, in a second pass over the scores.
        reduce: what to make of each layer's shares before they are kept.

    Yields:
        What is collected; valid after the block too.
    """
    active = tuple(s for s in steerings if not s.changes_nothing)
    attending = Attending(RunningKeys(batch, active), frozenset(layers), queries, keep, stop, exact, reduce)
    configs: dict[int, Any] = {
        id(config): config
        for config in (getattr(module, "config", None) for module in model.modules())
        if hasattr(config, "_attn_implementation")
    }
    outer = {key: _ATTENDING.get(key) for key in configs}
    chosen = {key: config._attn_implementation for key, config in configs.items()}
    direct = calls_directly(model)
    hook = model.base_model.register_forward_pre_hook(_count_positions(attending), with_kwargs=True)
    try:
        for key, config in configs.items():
            config._attn_implementation_internal = "sdpa" if direct else NAME
            _ATTENDING[key] = attending
        with catch_direct_calls(model, cast(Attention, _attention)) if direct else nullcontext():
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
        attending.start_step(tokens.shape[1] + (0 if past is None else int(past.get_seq_length())))

    return count


@torch.compiler.disable
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
    if dropout:
        raise InputError("attention dropout is on; call model.eval() before reading or steering attention.")
    terms = {ours: kwargs[theirs] for theirs, ours in _TERMS.items() if kwargs.get(theirs) is not None}
    reads = attending is not None and layer in attending.layers
    steers = attending is not None and any(s.touches(layer) for s in attending.keys.steerings)
    if not (reads or steers or terms):
        if attending is not None:
            attending.paths[layer] = "plain"
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )

    n_queries = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and n_queries > 1
    if causal and key.shape[2] > n_queries:  # an empty static cache: what comes after is not written yet
        key, value = key[:, :, :n_queries], value[:, :, :n_queries]
        if "position_bias" in terms:
            terms["position_bias"] = terms["position_bias"][..., :n_queries]
    call = _Call(query, key, value, attention_mask, causal, scaling, terms)
    if attending is None:
        return call().transpose(1, 2).contiguous(), None
    attending.paths[layer] = "tiled" if terms else "fused"
    is_step = n_queries <= FEW_QUERIES and not (causal or reads or terms)
    if steers and is_step and all(s.target_share is None for s in attending.keys.steerings):
        call.mask = attending.step_mask(layer, query, key.shape[2], attention_mask)
    elif steers:
        call.steer(attending, layer, as_mask=is_step)
    if reads and attending.keep == "pattern":
        attending.collected[layer] = call.pattern(attending.queries).float().cpu()
    if not reads or attending.keep == "pattern":
        output = call()
    else:
        role_ids = attending.keys.roles(key.shape[2], query.shape[0], query.device)
        output, shares = call.read(role_ids, attending.queries, exact=attending.exact)
        shares = shares.float()
        attending.collected[layer] = shares.cpu() if attending.reduce is None else attending.reduce(shares)
    if reads and attending.stop and layer == max(attending.layers):
        raise _StopForward
    return output.transpose(1, 2).contiguous(), None


@dataclass
class _Call:
    """One layer's attention in one forward pass, with what its model adds to it and how it is steered."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float | None
    terms: dict[str, Any]
    bias: Tensor | None = None
    select: Tensor | None = None

    def __call__(self) -> Tensor:
        """The output."""
        return self._run(self.query, self.key, self.value)[0]

    def read(self, role_ids: Tensor, queries: Tensor | None, *, exact: bool) -> tuple[Tensor, Tensor]:
        """The output, and the shares `[batch, head, query, role]` of all roles for some queries or all."""
        if queries is not None and queries.shape[1] * _ROWS_APART <= self.key.shape[2] and not self.terms:
            output, shares = self(), self._read_apart(role_ids, queries.to(self.query.device))
        else:
            output, shares = self._read_all(role_ids, exact=exact)
            if queries is not None:
                shares = take_queries(shares, queries.to(shares.device))
        if "sinks" not in self.terms:
            shares = torch.nn.functional.pad(shares, (0, 1))
        return output, shares

    def _read_all(self, role_ids: Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
        """Output and shares of every query, in one call unless 16-bit shares are wanted in float32."""
        if exact and not self.terms and self.query.dtype != torch.float32:
            output = self()
            wide = [x.float() for x in (self.query, self.key, self.value[..., :0])]
            _, shares = self._run(*wide, role_ids=role_ids, n_roles=N_ROLES - 1)
        else:
            output, shares = self._run(
                self.query, self.key, self.value, role_ids=role_ids, n_roles=N_ROLES - 1
            )
        assert shares is not None
        return output, shares

    def _read_apart(self, role_ids: Tensor, queries: Tensor) -> Tensor:
        """The shares of few queries, apart from the output, in float32 or wider."""
        query, given = self._rows(queries)
        wanted = {"role_ids": role_ids, "n_roles": N_ROLES - 1, "key_bias": self.bias, "scale": self.scale}
        _, shares = tiled_attention(query, self.key, self.value[..., :0], **wanted, **given, tile=64)
        assert shares is not None
        return shares

    def _rows(self, queries: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Some queries, and what of mask, head weights and terms belongs to them."""
        mask = self.mask
        if mask is None and self.causal:
            position = torch.arange(self.key.shape[2], device=queries.device)
            last = queries + self.key.shape[2] - self.query.shape[2]
            mask = (position <= last[..., None])[:, None]
        elif mask is not None and mask.shape[2] > 1:
            mask = take_queries(mask.expand(len(self.query), -1, -1, -1), queries)
        given = {"head_select": self.select, **self.terms}
        for name, x in given.items():
            if name != "sinks" and isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] > 1:
                given[name] = take_queries(x.expand(len(self.query), -1, -1, -1), queries)
        return take_queries(self.query, queries), {"attn_mask": mask, **given}

    def pattern(self, queries: Tensor | None) -> Tensor:
        """The pattern of some queries (all by default), masked as the kernel masks it."""
        if queries is None:
            queries = torch.arange(self.query.shape[2]).expand(len(self.query), -1)
        query, given = self._rows(queries.to(self.query.device))
        return compute_attention_pattern(query, self.key, key_bias=self.bias, scale=self.scale, **given)

    def steer(self, attending: Attending, layer: int, *, as_mask: bool) -> None:
        """Add the steering of a layer, as columns or (for few queries) as an additive mask."""
        keys = attending.keys
        bias = keys.bias(self.key.shape[2], self.query.shape[0], self.query.device)
        read_shares = partial(self._spread, bias, explicitly=as_mask)
        select = weigh_targets(keys.steerings, bias, attending.select(layer, self.query)[0], read_shares)
        if as_mask:
            added = compute_score_bias(self.query, bias, select).to(self.query.dtype)
            self.mask = added if self.mask is None else _add_to_mask(added, self.mask)
        else:
            self.bias, self.select = bias, select

    def _spread(self, bias: Tensor, kinds: Tensor, weights: Tensor, *, explicitly: bool) -> Tensor:
        """How attention spreads over two kinds of keys under some weights of the biases."""
        biased = {"key_bias": bias, "head_select": weights, **self._masking()}
        if explicitly:
            return compute_role_shares(compute_attention_pattern(self.query, self.key, **biased), kinds, 2)
        run = tiled_attention if self.terms else augmented_attention
        shares = run(self.query, self.key, self.value[..., :0], role_ids=kinds, n_roles=2, **biased)[1]
        assert shares is not None
        return shares

    def _masking(self) -> dict[str, Any]:
        return {"attn_mask": self.mask, "is_causal": self.causal, "scale": self.scale, **self.terms}

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, role_ids: Tensor | None = None, n_roles: int = 0
    ) -> tuple[Tensor, Tensor | None]:
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


def _add_to_mask(bias: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return torch.where(mask > torch.finfo(mask.dtype).min / 2, bias + mask, mask)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


__all__ = ["NAME", "Attending", "Path", "attend"]
