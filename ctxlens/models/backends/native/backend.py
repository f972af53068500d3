"""Any transformers decoder, read and steered in place."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ctxlens.chat.roles import Role
from ctxlens.errors import UnsupportedModelError
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.batch import TokenBatch
from ctxlens.models.backends.native.attention import Path, attend
from ctxlens.models.backends.native.cache import ResumedDecoder, make_cache, read_cache
from ctxlens.models.backends.protocol import Decoder, KeyValues, ModelShape, Readout, Reduce


class NativeBackend:
    """A transformers decoder, read and steered in place.

    Attributes:
        paths: by layer, how attention is computed where it is read or steered: `fused` or `tiled`.
    """

    name = "native"

    def __init__(self, model: Any, *, readout: Readout | str = "model") -> None:
        """Take a decoder over.

        Args:
            model: a transformers decoder; compile it, if at all, in place (`model.compile()`).
            readout: whether role shares are computed in the model's own dtype, or in `float32` from its
                16-bit queries and keys, which costs a second pass over the scores of the layers read.

        Raises:
            UnsupportedModelError: its attention cannot be read and steered exactly.
        """
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModelError(
                f"a {type(model).__name__} is no transformers model; if it comes from torch.compile(model), "
                "compile in place instead: model.compile()."
            )
        self.hf_model = model.eval()
        self.readout = readout
        self.shape = shape_of(model)
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._check_model()

    @property
    def device(self) -> torch.device:
        """Where the first layer runs; offloaded weights live elsewhere until then."""
        embedding: Any = self.hf_model.get_input_embeddings()
        runs_on = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        return embedding.weight.device if runs_on is None else torch.device(runs_on)

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
        reduce: Reduce | None = None,
    ) -> Float[Tensor, "batch layer ..."]:
        """See `Backend.read_shares`."""
        return self._read(batch, layers, queries, steerings, "shares", reduce)

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
        reduce: Reduce | None = None,
    ) -> Tensor:
        kwargs: dict[str, Any] = {"steerings": steerings, "layers": layers, "queries": queries}
        kwargs["reduce"] = reduce
        kwargs["exact"] = self.readout == "float32"
        with attend(self.hf_model, batch, keep=keep, stop=True, **kwargs) as attending:
            # Right padding needs no mask: no query that counts comes after it.
            self.hf_model.base_model(input_ids=batch.tokens, use_cache=False)
        return torch.stack([attending.collected[layer].cpu() for layer in layers], dim=1)

    def logits(
        self, batch: TokenBatch, steerings: Sequence[Steering], *, grad: bool = False
    ) -> Float[Tensor, "batch pos vocab"]:
        """See `Backend.logits`."""
        with torch.set_grad_enabled(grad), attend(self.hf_model, batch, steerings=steerings):
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
            output = self._run(tokens, mask, cache)
            cache = output.past_key_values
            return output.logits[:, -1].float()

        with attend(self.hf_model, batch, steerings=steerings) if _any(steerings) else nullcontext():
            yield step

    @torch.no_grad()
    def prefill(
        self, batch: TokenBatch, past: KeyValues | None, steerings: Sequence[Steering], n_logits: int = 1
    ) -> tuple[Tensor, KeyValues | None]:
        """See `PrefixBackend.prefill`."""
        cache = None if past is None else make_cache(past)
        known = 0 if past is None else past[0][0].shape[-2]
        with attend(self.hf_model, batch, steerings=steerings) if _any(steerings) else nullcontext():
            output = self._run(batch.tokens[:, known:], batch.attention_mask, cache, n_logits)
        # Without positions of its own a model goes by columns, which padding in between would shift.
        return output.logits, read_cache(output.past_key_values) if self._takes_positions else None

    @contextmanager
    def resume(
        self, batch: TokenBatch, past: KeyValues, steerings: Sequence[Steering]
    ) -> Iterator[ResumedDecoder]:
        """See `PrefixBackend.resume`."""
        steered = attend(self.hf_model, batch, steerings=steerings) if _any(steerings) else nullcontext()
        with torch.no_grad(), steered as attending:
            yield ResumedDecoder(
                lambda *given: self._run(*given).logits[:, -1].float(),
                batch.attention_mask,
                make_cache(past),
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
        """Run a few tokens plainly and through our function: every layer must call it, and agree."""
        model = self.hf_model
        tokens = torch.arange(8, device=self.device)[None] % self.shape.d_vocab
        roles = torch.arange(8, device=self.device)[None] % int(Role.PAD)
        batch = TokenBatch(tokens, roles, torch.ones_like(tokens), torch.tensor([8], device=self.device))
        plain = model(input_ids=tokens, use_cache=False).logits
        with attend(model, batch, layers=range(self.shape.n_layers)) as attending:
            ours = model(input_ids=tokens, use_cache=False).logits
        missing = sorted(set(range(self.shape.n_layers)) - set(attending.paths))
        self.paths: Mapping[int, Path] = dict(sorted(attending.paths.items()))
        kind = type(model).__name__
        if missing:
            raise UnsupportedModelError(
                f"{kind} does not take its attention from transformers' AttentionInterface "
                f'(layers {missing} never asked for it), so it cannot be read this way; try backend="lens".'
            )
        error = (plain - ours).abs().max() / plain.abs().max().clamp_min(1e-6)
        if not error < (1e-3 if plain.dtype == torch.float32 else 0.1):
            raise UnsupportedModelError(
                f"{kind} computes attention in a way that ctxlens does not reproduce (logits differ "
                f'by {float(error):.1e} of their size); try backend="lens".'
            )


def _any(steerings: Sequence[Steering]) -> bool:
    return any(not s.changes_nothing for s in steerings)


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


__all__ = ["NativeBackend", "shape_of"]
