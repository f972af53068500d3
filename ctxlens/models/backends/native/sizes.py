"""The shape of a transformers decoder, its sliding windows and its sizes, from its config."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ctxlens.errors import UnsupportedModelError
from ctxlens.models.backends.protocol import DecoderCosts, ModelShape
from ctxlens.models.backends.sizes import count_feed_forward, weigh

_MLP_WIDTHS = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function")


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape of a transformers decoder, from its config.

    Raises:
        UnsupportedModelError: it is not a decoder-only language model.
    """
    config: Any = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a decoder-only language model; ctxlens needs a causal LM."
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


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """By layer of a transformers decoder, the tokens of its sliding window; None: it sees all tokens."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None:
        return (None,) * config.num_hidden_layers
    if kinds is None:
        return (int(window),) * config.num_hidden_layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def measure_costs(model: PreTrainedModel) -> DecoderCosts:
    """The sizes of a transformers decoder that a memory forecast needs."""
    config: Any = model.config.get_text_config()
    feed_forward = count_feed_forward(
        model,
        d_model=config.hidden_size,
        d_mlp=_first_set(config, _MLP_WIDTHS) or 4 * config.hidden_size,
        experts=getattr(config, "num_experts_per_tok", None) or 1,
        activation=str(_first_set(config, _ACTIVATIONS) or ""),
    )
    return DecoderCosts(weigh(model), feed_forward, is_eager=config._attn_implementation == "eager")


def _first_set(config: Any, names: tuple[str, ...]) -> Any:
    """The first of some settings that has a value."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


__all__ = ["layer_windows", "measure_costs", "shape_of"]
