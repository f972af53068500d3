"""Any transformers decoder, read and steered through `AttentionInterface`.

One attention function and one mask function are registered under the name `ctxlens`. `attend` selects them
on a model for the time of a `with` block and restores the old choice on exit. Inside it every forward pass,
with or without cache, is steered, and the asked layers' role shares are kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ctxlens.augment import augmented_attention, compute_attention_pattern, compute_score_bias
from ctxlens.batching import Decoder, ModelShape, RunningKeys, TokenBatch, take_queries
from ctxlens.errors import InputError, UnsupportedModelError
from ctxlens.roles import N_ROLES, Role
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
    configs = {
        id(m.config): m.config
        for m in model.modules()
        if hasattr(getattr(m, "config", None), "_attn_implementation")
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
    if steerings:
        bias = attending.keys.bias(key.shape[2], query.shape[0])
        select = combine_selects(attending.keys.steerings, layer, query.shape[1]).to(query.device)
    rest: dict[str, Any] = {"attn_mask": attention_mask, "is_causal": causal, "scale": scaling}
    if reads and attending.keep == "pattern":
        _collect_pattern(attending, layer, query, key, bias, select, rest)
    if bias is not None and not reads and n_queries <= _FEW_QUERIES and not causal:
        rest["attn_mask"] = _add_to_mask(compute_score_bias(query, bias, select), attention_mask, query.dtype)
        bias = select = None
    role_ids = (
        attending.keys.roles(key.shape[2], query.shape[0]) if reads and attending.keep == "shares" else None
    )
    output, shares = augmented_attention(
        query, key, value, role_ids=role_ids, n_roles=N_ROLES - 1, key_bias=bias, head_select=select, **rest
    )
    if shares is not None:
        kept = shares if attending.queries is None else take_queries(shares, attending.queries)
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
    queries = attending.queries
    if queries is None:
        queries = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
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
                f"this model {what}, which one fused attention call cannot express ({type(module).__name__}); "
                'load it with backend="lens".'
            )
    if dropout:
        raise InputError("attention dropout is on; call model.eval() before reading or steering attention.")


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class NativeBackend:
    """A transformers decoder, read and steered in place."""

    name = "native"

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a decoder over.

        Raises:
            UnsupportedModelError: its attention cannot be read and steered exactly.
        """
        self.hf_model = model.eval()
        self.shape = shape_of(model)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._check_model()

    @property
    def device(self) -> torch.device:
        """Where the first layer lives."""
        return self.hf_model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.hf_model.dtype

    @torch.no_grad()
    def read_shares(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        queries: Int[Tensor, "batch query"],
        steerings: Sequence[Steering],
    ) -> Float[Tensor, "batch layer head query role"]:
        """See `Backend.read_shares`."""
        return self._read(batch, layers, queries, steerings, "shares")

    @torch.no_grad()
    def read_pattern(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        queries: Int[Tensor, "batch query"],
        steerings: Sequence[Steering],
    ) -> Float[Tensor, "batch layer head query key"]:
        """See `Backend.read_pattern`."""
        return self._read(batch, layers, queries, steerings, "pattern")

    def _read(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        queries: Tensor,
        steerings: Sequence[Steering],
        keep: Literal["shares", "pattern"],
    ) -> Tensor:
        kwargs: dict[str, Any] = {"steerings": steerings, "layers": layers, "queries": queries}
        with attend(self.hf_model, batch, keep=keep, stop=True, **kwargs) as attending:
            # Right padding needs no mask: no query that counts comes after it.
            self.hf_model.base_model(input_ids=batch.tokens, use_cache=False)
        return torch.stack([attending.collected[layer] for layer in layers], dim=1)

    @torch.no_grad()
    def logits(self, batch: TokenBatch, steerings: Sequence[Steering]) -> Float[Tensor, "batch pos vocab"]:
        """See `Backend.logits`."""
        with attend(self.hf_model, batch, steerings=steerings):
            return self.hf_model(input_ids=batch.tokens, use_cache=False).logits

    @contextmanager
    def decoder(self, batch: TokenBatch, steerings: Sequence[Steering]) -> Iterator[Decoder]:
        """See `Backend.decoder`."""
        mask = batch.attention_mask
        cache = None

        @torch.no_grad()
        def step(tokens: Tensor) -> Tensor:
            nonlocal mask, cache
            if cache is not None:
                mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            kwargs: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
            if self._takes_positions:
                positions = (mask.cumsum(-1) - 1).clamp_min(0)
                kwargs["position_ids"] = positions[:, -tokens.shape[1] :]
            output = self.hf_model(input_ids=tokens, **kwargs)
            cache = output.past_key_values
            return output.logits[:, -1].float()

        if any(not s.changes_nothing for s in steerings):
            with attend(self.hf_model, batch, steerings=steerings):
                yield step
        else:
            yield step

    @torch.no_grad()
    def _check_model(self) -> None:
        """Run a few tokens plainly and through our function: every layer must call it, and agree."""
        model = self.hf_model
        tokens = torch.arange(8, device=self.device)[None] % self.shape.d_vocab
        roles = torch.arange(8, device=self.device)[None] % int(Role.PAD)
        batch = TokenBatch(tokens, roles, torch.ones_like(tokens), torch.tensor([8], device=self.device))
        plain = model(input_ids=tokens, use_cache=False).logits
        with attend(model, batch, layers=range(self.shape.n_layers)) as attending:
            ours = model(input_ids=tokens, use_cache=False).logits
        missing = sorted(set(range(self.shape.n_layers)) - attending.called)
        kind = type(model).__name__
        if missing:
            raise UnsupportedModelError(
                f"{kind} does not take its attention from transformers' AttentionInterface "
                f'(layers {missing} never asked for it), so it cannot be read this way; try backend="lens".'
            )
        error = (plain - ours).abs().max() / plain.abs().max().clamp_min(1e-6)
        if not error < (1e-3 if plain.dtype == torch.float32 else 0.1):
            raise UnsupportedModelError(
                f"{kind} computes attention in a way that one fused call does not reproduce (logits differ "
                f'by {float(error):.1e} of their size); try backend="lens".'
            )


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape of a transformers decoder, from its config.

    Raises:
        UnsupportedModelError: it is no decoder-only language model.
    """
    config: Any = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is no decoder-only language model; ctxlens needs a causal LM."
        )
    n_heads = config.num_attention_heads
    return ModelShape(
        n_layers=config.num_hidden_layers,
        n_heads=n_heads,
        n_key_value_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        d_model=config.hidden_size,
        d_head=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        n_ctx=getattr(config, "max_position_embeddings", None) or 2**31 - 1,
        d_vocab=config.vocab_size,
    )


__all__ = ["NAME", "Attending", "NativeBackend", "attend", "shape_of"]
