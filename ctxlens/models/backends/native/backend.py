"""Any transformers decoder, read and steered in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ctxlens.chat.roles import Role
from ctxlens.errors import UnsupportedModelError
from ctxlens.models.attention.resting import RestingShares, SinkReader, stack_resting
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.batch import TokenBatch
from ctxlens.models.backends.native.attending import Attending
from ctxlens.models.backends.native.attention import attend
from ctxlens.models.backends.native.cache import (
    ResumedDecoder,
    holds_keys_and_values,
    make_cache,
    read_cache,
)
from ctxlens.models.backends.native.held import HeldAttention
from ctxlens.models.backends.native.layers import find_decoder_layers, note_hidden_states
from ctxlens.models.backends.native.projections import find_output_projections
from ctxlens.models.backends.native.sizes import layer_windows, measure_costs, shape_of
from ctxlens.models.backends.protocol import (
    Decoder,
    DecoderCosts,
    HeadEdit,
    KeyValues,
    LayerFacts,
    LayerPath,
    ModelShape,
    Readout,
    Reduce,
    ReduceResting,
)

_PASS_COLUMNS = 512
"""On a CPU, long prompts are read in passes of about this many columns. One pass over the whole prompt took
as long without padding, and longer with it, because a mask then makes every query see the keys after it."""


class NativeBackend:
    """A transformers decoder, read and steered in place.

    Attributes:
        paths: by layer, how attention is computed where it is read or steered: `fused` or `tiled`.
    """

    name = "native"

    def __init__(self, model: Any, *, readout: Readout | str = "model") -> None:
        """Take over a decoder.

        Args:
            model: a transformers decoder. If you compile it, compile it in place (`model.compile()`).
            readout: whether role shares are computed in the model's own dtype, or in `float32` from its
                16-bit queries and keys, which costs a second pass over the scores of the layers read.

        Raises:
            UnsupportedModelError: its attention cannot be read and steered exactly.
        """
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModelError(
                f"a {type(model).__name__} is not a transformers model; if it comes from "
                "torch.compile(model), compile in place instead: model.compile()."
            )
        self.hf_model = model.eval()
        self.readout = readout
        self.shape: ModelShape = shape_of(model)
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._check_model()

    @property
    def device(self) -> torch.device:
        """Where the first layer runs; offloaded weights are elsewhere until they are used."""
        embedding: Any = self.hf_model.get_input_embeddings()
        runs_on = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        return embedding.weight.device if runs_on is None else torch.device(runs_on)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.hf_model.dtype

    @property
    def layers(self) -> tuple[LayerFacts, ...]:
        """See `Backend.layers`."""
        windows = layer_windows(self.hf_model.config)
        return tuple(LayerFacts(layer, self.paths[layer], windows[layer]) for layer in sorted(self.paths))

    def costs(self) -> DecoderCosts:
        """See `Backend.costs`."""
        return measure_costs(self.hf_model)

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
        return self._read(batch, layers, queries, steerings, "shares", reduce=reduce)

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
        sinks = SinkReader.of_texts(batch.role_ids)
        entered = self._decoder_layers[: max(layers) + 1]
        with note_hidden_states(entered, sinks.enter):
            return self._read(batch, layers, queries, steerings, "resting", sinks=sinks, reduce=reduce)

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

    @torch.no_grad()
    def hold(
        self,
        batch: TokenBatch,
        steerings: Sequence[Steering],
        progress: Callable[[int, int], None] | None = None,
    ) -> HeldAttention:
        """One conversation's queries and keys in every layer, its sinks, and the next token's logits.

        Args:
            batch: one conversation, without padding.
            steerings: what is steered.
            progress: called with the number of layers read and the total; what it raises ends the reading.
        """
        try:
            entered, sinks = self._decoder_layers, SinkReader.of_texts(batch.role_ids)
        except UnsupportedModelError:
            entered, sinks = [], None
        layers = range(self.shape.n_layers)
        kwargs: dict[str, Any] = {"logits_to_keep": 1} if self._keeps_logits else {}
        with (
            note_hidden_states(entered, (lambda hidden: None) if sinks is None else sinks.enter),
            attend(
                self.hf_model, batch, steerings=steerings, layers=layers, keep="calls", sinks=sinks,
                progress=progress,
            ) as attending,
        ):  # fmt: skip
            logits = self.hf_model(input_ids=batch.tokens, use_cache=False, **kwargs).logits[0, -1]
        return HeldAttention([attending.held[layer] for layer in layers], batch.role_ids, logits.float())

    def _read(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        queries: Tensor,
        steerings: Sequence[Steering],
        keep: Literal["shares", "resting", "pattern"],
        **kwargs: Any,
    ) -> Tensor:
        kwargs |= {"steerings": steerings, "layers": layers, "queries": queries}
        kwargs["exact"] = self.readout == "float32"
        with attend(self.hf_model, batch, keep=keep, stop=True, **kwargs) as attending:
            # Right padding needs no mask: every query that counts comes before it.
            self.hf_model.base_model(input_ids=batch.tokens, use_cache=False)
        return torch.stack([attending.collected[layer].cpu() for layer in layers], dim=1)

    def logits(
        self, batch: TokenBatch, steerings: Sequence[Steering], *, grad: bool = False
    ) -> Float[Tensor, "batch pos vocab"]:
        """See `Backend.logits`."""
        with torch.set_grad_enabled(grad), attend(self.hf_model, batch, steerings=steerings):
            return self.hf_model(input_ids=batch.tokens, use_cache=False).logits

    @torch.no_grad()
    def logits_while_reading(self, batch: TokenBatch) -> Float[Tensor, "batch pos vocab"]:
        """See `Backend.logits_while_reading`."""
        with attend(self.hf_model, batch, layers=range(self.shape.n_layers)):
            return self.read_alone(batch)

    @torch.no_grad()
    def read_alone(self, batch: TokenBatch) -> Float[Tensor, "batch pos vocab"]:
        """See `EagerBackend.read_alone`."""
        return self.hf_model(input_ids=batch.tokens, use_cache=False).logits

    @torch.no_grad()
    def read_eagerly(
        self, batch: TokenBatch
    ) -> tuple[Float[Tensor, "batch pos vocab"], list[Float[Tensor, "batch head query key"]]]:
        """See `EagerBackend.read_eagerly`."""
        chosen: Any = self.hf_model.config._attn_implementation
        self.hf_model.set_attn_implementation("eager")
        try:
            out = self.hf_model(input_ids=batch.tokens, output_attentions=True, use_cache=False)
        finally:
            self.hf_model.set_attn_implementation(chosen)
        if not out.attentions or any(pattern is None for pattern in out.attentions):
            raise ValueError("its eager attention gives no patterns")
        return out.logits, list(out.attentions)

    @contextmanager
    def edit_heads(self, edits: Mapping[int, HeadEdit]) -> Iterator[None]:
        """See `Backend.edit_heads`. The edit happens at the input of the layer's output projection."""
        projections = self._output_projections
        with ExitStack() as stack:
            for layer, edit in edits.items():
                handle = projections[layer].register_forward_pre_hook(self._head_hook(edit))
                stack.callback(handle.remove)
            yield

    @cached_property
    def _decoder_layers(self) -> list[torch.nn.Module]:
        return find_decoder_layers(self.hf_model, self.shape.n_layers)

    @cached_property
    def _output_projections(self) -> Mapping[int, torch.nn.Module]:
        width = self.shape.n_heads * self.shape.d_head
        return find_output_projections(self.hf_model, self.shape.n_layers, width)

    def _head_hook(self, edit: HeadEdit) -> Callable[..., tuple[Tensor, ...]]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = rearrange(args[0], "... (head d_head) -> ... head d_head", head=self.shape.n_heads)
            return rearrange(edit(z), "... head d_head -> ... (head d_head)"), *args[1:]

        return hook

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
            output = self._run(tokens, mask, cache)
            cache = output.past_key_values
            return output.logits[:, -1].float()

        with attend(self.hf_model, batch, steerings=steerings) if _any(steerings) else nullcontext():
            yield step

    @cached_property
    def shares_prefixes(self) -> bool:
        """See `PrefixBackend.shares_prefixes`.

        A model that takes no positions counts columns, which padding before the tokens would shift.
        """
        chunked = getattr(self.hf_model.config.get_text_config(), "attention_chunk_size", None)
        if not self._takes_positions or chunked:
            return False
        with torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            cache = getattr(self.hf_model(input_ids=token, use_cache=True), "past_key_values", None)
        return holds_keys_and_values(cache, self.shape.n_layers)

    @torch.no_grad()
    def prefill(
        self,
        batch: TokenBatch,
        past: KeyValues | None,
        known: int,
        steerings: Sequence[Steering],
        n_logits: int = 1,
    ) -> tuple[Tensor, KeyValues]:
        """See `PrefixBackend.prefill`."""
        columns = batch.tokens.shape[1]
        cache = make_cache(self.shape.n_layers if past is None else past, known, columns)
        logits = batch.tokens.new_empty(0)
        with self._attending(batch, steerings):
            for start, stop in self._split(known, columns, n_logits):
                mask = batch.attention_mask[:, :stop]
                logits = self._run(batch.tokens[:, start:stop], mask, cache, n_logits).logits
        return logits, read_cache(cache)

    def _attending(
        self, batch: TokenBatch, steerings: Sequence[Steering]
    ) -> AbstractContextManager[Attending | None]:
        """Our attention where it steers, and where transformers' own would copy the keys for every head.

        On CUDA, fused kernels need these copies too.
        """
        config: Any = self.hf_model.config
        grouped = self.shape.n_heads > self.shape.n_key_value_heads
        better = grouped and self.device.type == "cpu" and config._attn_implementation == "sdpa"
        return (
            attend(self.hf_model, batch, steerings=steerings) if _any(steerings) or better else nullcontext()
        )

    def _split(self, first: int, last: int, n_logits: int) -> Iterator[tuple[int, int]]:
        """The columns of each forward pass: equal parts, of which the last has all logits that are wanted."""
        size = _PASS_COLUMNS if self.device.type == "cpu" else last - first
        n_parts = max(1, min(round((last - first) / size), (last - first) // n_logits))
        return pairwise(first + (last - first) * part // n_parts for part in range(n_parts + 1))

    @contextmanager
    def resume(
        self, batch: TokenBatch, past: KeyValues, steerings: Sequence[Steering]
    ) -> Iterator[ResumedDecoder]:
        """See `PrefixBackend.resume`."""
        with torch.no_grad(), self._attending(batch, steerings) as attending:
            yield ResumedDecoder(
                lambda *given: self._run(*given).logits[:, -1].float(),
                batch.attention_mask,
                make_cache(past, batch.tokens.shape[1], batch.tokens.shape[1]),
                (lambda rows: None) if attending is None else attending.keys.keep,
            )

    def _run(self, tokens: Tensor, mask: Tensor, cache: Any, n_logits: int = 1) -> Any:
        kwargs: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if self._keeps_logits:
            kwargs["logits_to_keep"] = n_logits
        if self._takes_positions:
            kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
        return self.hf_model(input_ids=tokens, **kwargs)

    @torch.no_grad()
    def _check_model(self) -> None:
        """Run a few tokens plainly and through our function: every layer must call it and agree."""
        model = self.hf_model
        tokens = torch.arange(8, device=self.device)[None] % self.shape.d_vocab
        roles = torch.arange(8, device=self.device)[None] % int(Role.PAD)
        batch = TokenBatch(tokens, roles, torch.ones_like(tokens), torch.tensor([8], device=self.device))
        plain = model(input_ids=tokens, use_cache=False).logits
        with attend(model, batch, layers=range(self.shape.n_layers)) as attending:
            ours = model(input_ids=tokens, use_cache=False).logits
        missing = sorted(set(range(self.shape.n_layers)) - set(attending.paths))
        self.paths: Mapping[int, LayerPath] = dict(sorted(attending.paths.items()))
        kind = type(model).__name__
        if missing:
            raise UnsupportedModelError(
                f"{kind} does not take its attention from transformers' AttentionInterface "
                f'(layers {missing} never called it), so it cannot be read this way; try backend="lens".'
            )
        error = (plain - ours).abs().max() / plain.abs().max().clamp_min(1e-6)
        if not error < (1e-3 if plain.dtype == torch.float32 else 0.1):
            raise UnsupportedModelError(
                f"{kind} computes attention in a way that ctxlens does not reproduce (logits differ by "
                f'{float(error):.1e} relative to the largest); try backend="lens".'
            )


def _any(steerings: Sequence[Steering]) -> bool:
    return any(not s.changes_nothing for s in steerings)


__all__ = ["NativeBackend", "shape_of"]
