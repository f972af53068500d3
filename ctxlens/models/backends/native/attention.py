"""The attention of a transformers decoder, taken over for the time of a `with` block.

One attention function and one mask function are registered under the name `ctxlens`. `attend` selects them
on a model for the time of a `with` block and restores the old choice on exit. Inside the block every forward
pass, with or without cache, is steered, and the role shares of the layers asked for are kept.

Every call of a layer's attention has a plan (`native.plan`); each of its entries has one function here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ctxlens.errors import InputError
from ctxlens.models.attention.resting import SinkReader, stack_resting
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.batch import RunningKeys, TokenBatch
from ctxlens.models.backends.native.attending import Attending
from ctxlens.models.backends.native.call import Call
from ctxlens.models.backends.native.direct import Attention, calls_directly, catch_direct_calls
from ctxlens.models.backends.native.held import HeldCall
from ctxlens.models.backends.native.plan import HowSteered, Kept, plan_call
from ctxlens.models.backends.protocol import Reduce, ReduceResting

NAME = "ctxlens"

_TERMS = {"softcap": "softcap", "s_aux": "sinks", "position_bias": "position_bias"}
"""The terms that one fused call cannot express: their names in transformers and in `tiled_attention`."""


class _StopForward(Exception):
    """Raised to leave the forward pass after the highest layer that is read."""


_ATTENDING: dict[int, Attending] = {}
"""What is asked of the models that are inside `attend`, by the id of their configs."""


@contextmanager
def attend(
    model: PreTrainedModel,
    batch: TokenBatch,
    *,
    steerings: Sequence[Steering] = (),
    layers: Sequence[int] = (),
    queries: Int[Tensor, "batch query"] | None = None,
    keep: Literal["shares", "resting", "pattern", "calls"] = "shares",
    stop: bool = False,
    exact: bool = False,
    reduce: Reduce | ReduceResting | None = None,
    sinks: SinkReader | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Attending]:
    """Steer and read every forward pass (and `generate`) of a transformers model inside the block.

    Args:
        model: a decoder that takes its attention from `AttentionInterface`.
        batch: the prompts that the forward passes are about.
        steerings: what is steered.
        layers: the layers to read.
        queries: the query positions to keep, by row; all by default.
        keep: role shares, role shares with the part that rests on sinks, whole patterns, or the calls, from
            which patterns can be computed later.
        stop: end the forward pass silently after the highest layer to read; the block ends with it.
        exact: compute the shares of 16-bit models in float32, in a second pass over the scores.
        reduce: a function of each layer's shares, or of shares and resting parts where both are kept; its
            result is kept in their place.
        sinks: finds the sinks, if they are to be kept apart. The caller lets it note the hidden states at the
            entry of every layer.
        progress: called with the number of layers whose calls are kept and the total; what it raises ends
            the forward pass.

    Yields:
        What is collected; it stays valid after the block.
    """
    active = tuple(s for s in steerings if not s.changes_nothing)
    keys = RunningKeys(batch, active)
    attending = Attending(keys, frozenset(layers), queries, keep, stop, exact, reduce, sinks)
    attending.progress = progress
    configs: dict[int, Any] = {
        id(config): config
        for config in (getattr(module, "config", None) for module in model.modules())
        if hasattr(config, "_attn_implementation")
    }
    outer = {key: _ATTENDING.get(key) for key in configs}
    chosen = {key: config._attn_implementation for key, config in configs.items()}
    direct = calls_directly(model)
    hook = model.base_model.register_forward_pre_hook(_announce_passes(attending), with_kwargs=True)
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


def _announce_passes(attending: Attending) -> Callable[..., None]:
    """A hook that tells `attending` of every forward pass that begins."""

    def announce(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = args[0] if args else kwargs["inputs_embeds"]
        past = kwargs.get("past_key_values")
        attending.start_pass(tokens.shape[1] + (0 if past is None else int(past.get_seq_length())))

    return announce


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
    """The registered attention function: transformers' own where nothing is asked of a layer."""
    if dropout:
        raise InputError("attention dropout is on; call model.eval() before reading or steering attention.")
    attending = _ATTENDING.get(id(getattr(module, "config", None)))
    layer = cast(int, getattr(module, "layer_idx", None))
    terms = {ours: kwargs[theirs] for theirs, ours in _TERMS.items() if kwargs.get(theirs) is not None}
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    plan = plan_call(
        attending,
        layer,
        query.shape[2],
        is_causal=causal,
        has_terms=bool(terms),
        copies_keys=attention_mask is not None
        and query.shape[1] > key.shape[1]
        and query.device.type == "cpu",
    )
    if attending is not None:
        attending.paths[layer] = plan.path
    if plan.path == "plain":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    call = Call(query, key, value, attention_mask, causal, scaling, terms).without_unwritten_keys()
    if attending is None:
        output = call.output()
    else:
        call = _STEER[plan.steered](call, attending, layer)
        output = _COMPUTE[plan.kept](call, attending, layer)
    if plan.stops:
        raise _StopForward
    return output.transpose(1, 2).contiguous(), None


def _leave(call: Call, attending: Attending, layer: int) -> Call:
    """No steering."""
    return call


def _only_output(call: Call, attending: Attending, layer: int) -> Tensor:
    """The output; nothing is kept."""
    return call.output()


def _keep_shares(call: Call, attending: Attending, layer: int) -> Tensor:
    """The output; the role shares are kept, or the result of `reduce`."""
    role_ids = attending.keys.roles(call.key.shape[2], call.query.shape[0], call.query.device)
    output, shares = call.read(role_ids, attending.queries, exact=attending.exact)
    shares = shares.float()
    attending.collected[layer] = shares.cpu() if attending.reduce is None else attending.reduce(shares)
    return output


def _keep_resting(call: Call, attending: Attending, layer: int) -> Tensor:
    """The output; the role shares and the part of them that rests on sinks are kept."""
    assert attending.sinks is not None, "without a reader of sinks nothing can be kept apart"
    role_ids = attending.keys.roles(call.key.shape[2], call.query.shape[0], call.query.device)
    output, found = call.read_resting(role_ids, attending.queries, attending.sinks, exact=attending.exact)
    attending.collected[layer] = (attending.reduce or stack_resting)(found)
    return output


def _keep_pattern(call: Call, attending: Attending, layer: int) -> Tensor:
    """The output; the pattern is kept."""
    attending.collected[layer] = call.pattern(attending.queries).float().cpu()
    return call.output()


def _keep_call(call: Call, attending: Attending, layer: int) -> Tensor:
    """The output; the call is kept, so that the pattern of any query can be computed later."""
    attending.held[layer] = HeldCall.of(call, attending.sinks)
    if attending.progress:
        attending.progress(len(attending.held), len(attending.layers))
    return call.output()


_STEER: dict[HowSteered, Callable[[Call, Attending, int], Call]] = {
    "not": _leave,
    "ready mask": Call.steer_by_ready_mask,
    "mask": Call.steer_by_mask,
    "columns": Call.steer_by_columns,
}
_COMPUTE: dict[Kept, Callable[[Call, Attending, int], Tensor]] = {
    "nothing": _only_output,
    "shares": _keep_shares,
    "resting": _keep_resting,
    "pattern": _keep_pattern,
    "calls": _keep_call,
}

AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


__all__ = ["NAME", "attend"]
