"""TransformerLens models, read and steered through hooks: the reference, with access to full patterns.

This works for a `TransformerBridge` (TransformerLens 4) and a `HookedTransformer` (3.9) alike, because only
`cfg`, `hooks()`, hook names and the forward pass are used. Patterns are reduced inside the hook, so that only
one layer's pattern is in memory at a time. No other module imports `transformer_lens`.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxlens.chat.roles import N_ROLES, Role
from ctxlens.errors import UnsupportedModelError
from ctxlens.models.attention.fused import append_sink, compute_score_bias
from ctxlens.models.attention.resting import RestingShares, SinkReader, stack_resting
from ctxlens.models.attention.shares import compute_role_shares
from ctxlens.models.attention.steering import Steering, combine_selects, weigh_targets
from ctxlens.models.backends.batch import RunningKeys, TokenBatch, take_queries
from ctxlens.models.backends.protocol import (
    Decoder,
    DecoderCosts,
    HeadEdit,
    LayerFacts,
    ModelShape,
    Reduce,
    ReduceResting,
)
from ctxlens.models.backends.sizes import count_feed_forward, weigh


def pattern_hook(layer: int) -> str:
    """The name of the hook on a layer's attention pattern `[batch, head, query_pos, key_pos]`."""
    return f"blocks.{layer}.attn.hook_pattern"


def scores_hook(layer: int) -> str:
    """The name of the hook on a layer's masked attention scores, before softmax."""
    return f"blocks.{layer}.attn.hook_attn_scores"


def residual_hook(layer: int) -> str:
    """The name of the hook on the hidden states at the entry of a layer `[batch, pos, d_model]`."""
    return f"blocks.{layer}.hook_resid_pre"


def head_output_hook(layer: int) -> str:
    """The name of the hook on the outputs of a layer's heads `[batch, pos, head, d_head]`."""
    return f"blocks.{layer}.attn.hook_z"


class _StopForward(Exception):
    """Raised to leave the forward pass after the highest layer that is read."""


class LensBackend:
    """A TransformerLens model, read and steered by hooks."""

    name = "lens"

    def __init__(self, model: Any) -> None:
        """Take a `TransformerBridge` or `HookedTransformer`.

        Raises:
            UnsupportedModelError: some layer has no hooks on scores and patterns.
        """
        self.lens_model = model.eval()
        cfg = model.cfg
        missing = [
            name
            for layer in range(cfg.n_layers)
            for name in (scores_hook(layer), pattern_hook(layer))
            if name not in model.hook_dict
        ]
        if missing:
            raise UnsupportedModelError(f"TransformerLens offers no hook {missing[0]} for this model.")
        self.shape: ModelShape = ModelShape(
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_key_value_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
            d_model=cfg.d_model,
            d_head=cfg.d_head,
            n_ctx=cfg.n_ctx,
            d_vocab=cfg.d_vocab,
        )
        self._sinks = [p.detach() for name, p in model.named_parameters() if name.endswith("sinks")]
        self._forward_parameters = inspect.signature(type(model).forward).parameters

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        return torch.device(self.lens_model.cfg.device or "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.lens_model.cfg.dtype

    @property
    def layers(self) -> tuple[LayerFacts, ...]:
        """See `Backend.layers`."""
        return tuple(LayerFacts(layer, "hooks", None) for layer in range(self.shape.n_layers))

    def costs(self) -> DecoderCosts:
        """See `Backend.costs`. TransformerLens always computes whole patterns."""
        cfg, d_model = self.lens_model.cfg, self.shape.d_model
        experts = getattr(cfg, "experts_per_token", None) if getattr(cfg, "num_experts", None) else 1
        feed_forward = count_feed_forward(
            self.lens_model,
            d_model=d_model,
            d_mlp=getattr(cfg, "d_mlp", None) or 4 * d_model,
            experts=experts or 1,
            activation=str(getattr(cfg, "act_fn", "")),
        )
        return DecoderCosts(weigh(self.lens_model), feed_forward, is_eager=True)

    @torch.no_grad()
    def read_shares(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        queries: Int[Tensor, "batch query"],
        steerings: Sequence[Steering],
        reduce: Reduce | None = None,
    ) -> Float[Tensor, "batch layer ..."]:
        """See `Backend.read_shares`."""

        def to_shares(pattern: Tensor) -> Tensor:
            shares = self._sum_by_role(_take_rows(pattern, queries), batch)
            return shares if reduce is None else reduce(shares)

        return self._read(batch, layers, steerings, to_shares)

    def _sum_by_role(self, pattern: Tensor, batch: TokenBatch) -> Tensor:
        """Role shares of some rows of a pattern, with that of the learned sink."""
        shares = compute_role_shares(pattern, batch.role_ids, N_ROLES)
        if self._sinks:
            shares[..., int(Role.SINK)] = 1 - pattern.sum(-1)
        return shares

    @torch.no_grad()
    def read_resting(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        queries: Int[Tensor, "batch query"],
        steerings: Sequence[Steering],
    ) -> RestingShares:
        """See `Backend.read_resting`."""
        return RestingShares(*self.reduce_resting(batch, layers, queries, steerings, stack_resting).unbind(2))

    @torch.no_grad()
    def reduce_resting(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        queries: Int[Tensor, "batch query"],
        steerings: Sequence[Steering],
        reduce: ReduceResting,
    ) -> Float[Tensor, "batch layer ..."]:
        """See `Backend.reduce_resting`."""
        entries = [residual_hook(layer) for layer in range(max(layers) + 1)]
        if missing := [name for name in entries if name not in self.lens_model.hook_dict]:
            raise UnsupportedModelError(
                f"TransformerLens offers no hook {missing[0]} for this model, so its attention sinks cannot "
                'be found; read with sinks=False, or try backend="native".'
            )
        sinks = SinkReader.of_texts(batch.role_ids)

        def to_both(pattern: Tensor) -> Tensor:
            found = sinks.find(_take_rows(pattern, sinks.sample.positions))
            rows = _take_rows(pattern, queries)
            of_sinks = batch.role_ids.to(found.device).masked_fill(~found, -1)
            resting = compute_role_shares(rows, of_sinks, N_ROLES)
            return reduce(RestingShares(self._sum_by_role(rows, batch), resting))

        def enter(hidden: Tensor, hook: Any) -> None:
            sinks.enter(hidden)

        return self._read(batch, layers, steerings, to_both, [(name, enter) for name in entries])

    @torch.no_grad()
    def read_pattern(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        queries: Int[Tensor, "batch query"],
        steerings: Sequence[Steering],
    ) -> Float[Tensor, "batch layer head query key"]:
        """See `Backend.read_pattern`."""
        return self._read(batch, layers, steerings, lambda pattern: _take_rows(pattern, queries))

    def _read(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        steerings: Sequence[Steering],
        reduce: Callable[[Tensor], Tensor],
        further: Sequence[tuple[str, Callable[..., None]]] = (),
    ) -> Tensor:
        """The results of `reduce`, a function of a layer's pattern, stacked; `further` hooks run too."""
        last = max(layers)
        collected: dict[int, Tensor] = {}

        def reader(layer: int) -> Callable[..., None]:
            def read(pattern: Tensor, hook: Any) -> None:
                collected[layer] = reduce(pattern).cpu()
                if layer == last:
                    raise _StopForward

            return read

        keys = RunningKeys(batch, _active(steerings), batch.tokens.shape[1])
        hooks = [
            *further,
            *self._steering_hooks(keys),
            *((pattern_hook(layer), reader(layer)) for layer in layers),
        ]
        try:
            with self.lens_model.hooks(fwd_hooks=hooks):
                self._forward(batch)
        except _StopForward:
            pass
        return torch.stack([collected[layer] for layer in layers], dim=1)

    def logits(
        self, batch: TokenBatch, steerings: Sequence[Steering], *, grad: bool = False
    ) -> Float[Tensor, "batch pos vocab"]:
        """See `Backend.logits`."""
        keys = RunningKeys(batch, _active(steerings), batch.tokens.shape[1])
        with torch.set_grad_enabled(grad), self.lens_model.hooks(fwd_hooks=self._steering_hooks(keys)):
            return self._forward(batch)

    @torch.no_grad()
    def logits_while_reading(self, batch: TokenBatch) -> Float[Tensor, "batch pos vocab"]:
        """See `Backend.logits_while_reading`."""

        def look(pattern: Tensor, hook: Any) -> None:
            return None

        with self.lens_model.hooks(fwd_hooks=[(pattern_hook(n), look) for n in range(self.shape.n_layers)]):
            return self._forward(batch)

    @contextmanager
    def edit_heads(self, edits: Mapping[int, HeadEdit]) -> Iterator[None]:
        """See `Backend.edit_heads`."""
        names = {layer: head_output_hook(layer) for layer in edits}
        if missing := [name for name in names.values() if name not in self.lens_model.hook_dict]:
            raise UnsupportedModelError(f"TransformerLens offers no hook {missing[0]} for this model.")
        hooks = [(names[layer], self._head_hook(layer, edit)) for layer, edit in edits.items()]
        with self.lens_model.hooks(fwd_hooks=hooks):
            yield

    def _head_hook(self, layer: int, edit: HeadEdit) -> Callable[..., Tensor]:
        heads = (self.shape.n_heads, self.shape.d_head)

        def hook(z: Tensor, hook: Any) -> Tensor:
            if z.shape[-2:] != heads:
                raise UnsupportedModelError(
                    f"{head_output_hook(layer)} has shape {tuple(z.shape)}; expected [batch, pos, "
                    f'{heads[0]}, {heads[1]}]; try backend="native".'
                )
            return edit(z)

        return hook

    @contextmanager
    def decoder(self, batch: TokenBatch, steerings: Sequence[Steering]) -> Iterator[Decoder]:
        """See `Backend.decoder`."""
        keys = RunningKeys(batch, _active(steerings))
        if "past_kv_cache" in self._forward_parameters:
            forward = self._hooked_step(batch)
        elif "past_key_values" in self._forward_parameters:
            forward = self._bridge_step(batch)
        else:  # the bridge of TransformerLens 3 does not take a cache
            forward = self._recomputing_step(batch)

        @torch.no_grad()
        def step(tokens: Tensor) -> Tensor:
            keys.seen += tokens.shape[1]
            return forward(tokens)[:, -1].float()

        with self.lens_model.hooks(fwd_hooks=self._steering_hooks(keys)):
            yield step

    def _forward(self, batch: TokenBatch) -> Tensor:
        # Right padding needs no mask, but without one a HookedTransformer may infer one from the pad id.
        return self.lens_model(batch.tokens, attention_mask=torch.ones_like(batch.tokens))

    def _bridge_step(self, batch: TokenBatch) -> Callable[[Tensor], Tensor]:
        mask, cache = batch.attention_mask, None

        def step(tokens: Tensor) -> Tensor:
            nonlocal mask, cache
            if cache is not None:
                mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            logits, cache = self.lens_model(
                tokens,
                return_type="logits_and_cache",
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )
            return logits

        return step

    def _hooked_step(self, batch: TokenBatch) -> Callable[[Tensor], Tensor]:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(self.lens_model.cfg, self.device, len(batch.tokens))
        first = True

        def step(tokens: Tensor) -> Tensor:
            nonlocal first
            mask = batch.attention_mask if first else torch.ones_like(tokens)
            first = False
            return self.lens_model(tokens, attention_mask=mask, past_kv_cache=cache)

        return step

    def _recomputing_step(self, batch: TokenBatch) -> Callable[[Tensor], Tensor]:
        mask, known = batch.attention_mask, None

        def step(tokens: Tensor) -> Tensor:
            nonlocal mask, known
            if known is not None:
                mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
                tokens = torch.cat([known, tokens], dim=1)
            known = tokens
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            return self.lens_model(tokens, attention_mask=mask, position_ids=positions)

        return step

    def _steering_hooks(self, keys: RunningKeys) -> list[tuple[str, Callable[..., Tensor]]]:
        def steerer(layer: int) -> Callable[..., Tensor]:
            select = combine_selects(keys.steerings, layer, self.shape.n_heads)
            sinks = self._sinks[layer] if self._sinks else None

            def steer(scores: Tensor, hook: Any) -> Tensor:
                bias = keys.bias(scores.shape[-1], scores.shape[0], scores.device)
                read_shares = partial(_spread, scores, bias, sinks)
                weights = weigh_targets(keys.steerings, bias, select.to(scores.device), read_shares)
                return _add_bias(scores, bias, weights)

            return steer

        return [
            (scores_hook(layer), steerer(layer))
            for layer in range(self.shape.n_layers)
            if any(s.touches(layer) for s in keys.steerings)
        ]


def _take_rows(pattern: Tensor, queries: Tensor) -> Tensor:
    """The chosen query rows of every conversation, in float32."""
    return take_queries(pattern, queries.to(pattern.device)).float()


def _add_bias(scores: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
    """Steered scores; masked scores stay as they are."""
    added = compute_score_bias(scores, bias, weights).to(scores.dtype)
    return torch.where(scores > torch.finfo(scores.dtype).min / 2, scores + added, scores)


def _spread(scores: Tensor, bias: Tensor, sinks: Tensor | None, kinds: Tensor, weights: Tensor) -> Tensor:
    """How attention spreads over keys of kind 0 and 1, and over the sink, under weights of the biases."""
    scores = _add_bias(scores, bias, weights).float()
    if sinks is None:
        return compute_role_shares(torch.nan_to_num(scores.softmax(-1)), kinds, 2)
    pattern = append_sink(scores, sinks.flatten()).softmax(-1)
    return compute_role_shares(pattern, torch.nn.functional.pad(kinds, (0, 1), value=2), 3)


def _active(steerings: Sequence[Steering]) -> tuple[Steering, ...]:
    return tuple(s for s in steerings if not s.changes_nothing)


def bridge_from_hf(hf_model: Any, tokenizer: Any, *, copied: bool = True) -> Any:
    """A `TransformerBridge` around a transformers decoder.

    Args:
        hf_model: any decoder that TransformerLens knows. The bridge changes its modules.
        tokenizer: its tokenizer.
        copied: work on a copy and leave `hf_model` as it is.

    Raises:
        UnsupportedModelError: TransformerLens has no adapter for this architecture, or transformers'
            explicit attention, which the bridge runs, differs from the model's own.
    """
    from transformer_lens.model_bridge import TransformerBridge

    if hf_model.config.model_type == "falcon" and hf_model.config.alibi:
        raise UnsupportedModelError(
            "transformers' eager attention adds Falcon's position bias (ALiBi) twice, so its patterns are "
            'not those of the model; use backend="native".'
        )
    if copied:
        hf_model = copy.deepcopy(hf_model)
    hf_model.set_attn_implementation("eager")
    if not hf_model.config.architectures:
        hf_model.config.architectures = [type(hf_model).__name__]
    try:
        return TransformerBridge.boot_transformers(
            hf_model.config.name_or_path or type(hf_model).__name__,
            hf_model=hf_model,
            tokenizer=_private_copy(tokenizer),
            device=str(hf_model.device),
            dtype=hf_model.dtype,
        )
    except ValueError as error:
        raise UnsupportedModelError(
            f'TransformerLens cannot load a {type(hf_model).__name__} ({error}); try backend="native".'
        ) from error


def _private_copy(tokenizer: Any) -> Any:
    """A copy of a tokenizer that TransformerLens uses as it is.

    TransformerLens changes the tokenizer it gets, and reloads by name any that does not declare that it adds
    a BOS token.
    """
    twin = copy.deepcopy(tokenizer)
    twin.init_kwargs = {"name_or_path": "", **twin.init_kwargs, "add_bos_token": True}
    return twin


def hooked_from_hf(hf_model: Any, tokenizer: Any = None) -> Any:
    """A `HookedTransformer` (TransformerLens 3) with the weights of a Llama-architecture model.

    Its `from_pretrained` accepts official names only. This function accepts any local model and uses
    TransformerLens' own weight conversion. Nothing is folded or centred, so that the logits stay the same.

    Raises:
        UnsupportedModelError: TransformerLens 4 is installed, which has no `HookedTransformer`, or the
            model is not of the Llama architecture.
    """
    tl: Any = importlib.import_module("transformer_lens")
    try:
        tl.HookedTransformer  # noqa: B018
    except (ImportError, AttributeError):
        raise UnsupportedModelError(
            "TransformerLens 4 has no HookedTransformer; install transformer-lens 3.9, or use the bridge."
        ) from None
    conversions: Any = importlib.import_module("transformer_lens.pretrained.weight_conversions")
    config: Any = hf_model.config
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if config.model_type != "llama" or rope != "default" or config.attention_bias or config.mlp_bias:
        raise UnsupportedModelError(
            f"only plain Llama models can be turned into a HookedTransformer here, not {config.model_type!r} "
            f"with {rope} rotary positions; use the bridge."
        )
    n_heads, n_kv_heads = config.num_attention_heads, config.num_key_value_heads
    cfg = tl.HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        n_heads=n_heads,
        n_key_value_heads=None if n_kv_heads == n_heads else n_kv_heads,
        d_model=config.hidden_size,
        d_head=config.head_dim,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings,
        act_fn=config.hidden_act,
        eps=config.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=config.head_dim,
        rotary_base=config.rope_parameters["rope_theta"],
        original_architecture="LlamaForCausalLM",
        device=str(hf_model.device),
        dtype=hf_model.dtype,
        default_prepend_bos=False,
    )
    model = tl.HookedTransformer(cfg, None if tokenizer is None else _private_copy(tokenizer))
    model.load_and_process_state_dict(
        conversions.convert_llama_weights(hf_model, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


__all__ = ["LensBackend", "bridge_from_hf", "hooked_from_hf", "pattern_hook", "scores_hook"]
