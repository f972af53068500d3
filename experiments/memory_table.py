"""The table of forecast memory in `docs/resources.md`, from the shapes of models; nothing is downloaded.

`python -m experiments.memory_table` prints it. The shapes are those of the models' published configurations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from ctxlens.models.backends.native.sizes import layer_windows, measure_costs, shape_of
from ctxlens.models.backends.protocol import DecoderCosts, LayerFacts
from ctxlens.models.memory import MemoryForecast, forecast_memory

LENGTHS = (1000, 8000, 32000, 128000)
NEW_TOKENS = 100


def _config(kind: type[PreTrainedConfig], layers: int, width: int, heads: int, mlp: int, **more: Any) -> Any:
    return kind(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=mlp,
        max_position_embeddings=131072, **more,
    )  # fmt: skip


_LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256}
_SMALL = {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
_QWEN = {"num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False}

MODELS = {
    "SmolLM2-135M, float32": (_config(LlamaConfig, 30, 576, 9, 1536, **_SMALL), torch.float32),
    "Llama-3.2-1B, bfloat16": (
        _config(LlamaConfig, 16, 2048, 32, 8192, **_LLAMA, tie_word_embeddings=True), torch.bfloat16,
    ),
    "Llama-3.1-8B, bfloat16": (
        _config(LlamaConfig, 32, 4096, 32, 14336, **_LLAMA, tie_word_embeddings=False), torch.bfloat16,
    ),
    "Qwen2.5-32B, bfloat16": (_config(Qwen2Config, 64, 5120, 40, 27648, **_QWEN), torch.bfloat16),
    "Llama-3.1-70B, bfloat16": (
        _config(LlamaConfig, 80, 8192, 64, 28672, **_LLAMA, tie_word_embeddings=False), torch.bfloat16,
    ),
}  # fmt: skip
"""Configuration and number format by model."""


class Shape:
    """What a forecast needs of a backend, for a model that has a shape but no weights."""

    name = "native"

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        self.shape, self.dtype = shape_of(self.model), dtype
        windows = layer_windows(self.model.config)
        self.layers = tuple(LayerFacts(layer, "fused", window) for layer, window in enumerate(windows))

    def costs(self) -> DecoderCosts:
        """The sizes, with the weights that the model would have."""
        weights = sum(one.numel() * one.element_size() for one in self.model.parameters())
        costs = measure_costs(self.model)
        return DecoderCosts(weights, costs.feed_forward, costs.is_eager)


@dataclass(frozen=True)
class Forecastable:
    """A model as `forecast_memory` takes it."""

    backend: Any


def forecast(name: str, length: int, what: str) -> MemoryForecast:
    """The forecast for one conversation of a length."""
    config, dtype = MODELS[name]
    new = NEW_TOKENS if what == "generate" else 0
    return forecast_memory(Forecastable(Shape(config, dtype)), length=length, what=what, new_tokens=new)


def gigabytes(size: int) -> str:
    """A size in units of 10⁹ bytes."""
    value = size / 1e9
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def main() -> None:
    """Print the table."""
    print("| model | weights | tokens | read | generate | eager patterns | TransformerLens cache |")
    print("|---|---|---|---|---|---|---|")
    for name in MODELS:
        for length in LENGTHS[: 2 if name.startswith("Smol") else None]:
            read, write = forecast(name, length, "read"), forecast(name, length, "generate")
            sizes = (read.weights, read.run, write.run, read.eager, read.lens_cache)
            weights, *rest = map(gigabytes, sizes)
            print(f"| {name} | {weights} | {length:,} | {' | '.join(rest)} |", flush=True)


if __name__ == "__main__":
    main()
