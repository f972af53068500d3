"""The models and lengths that are measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Preset:
    """A random Llama-shaped model and what is run on it.

    Attributes:
        dtype: name of a torch dtype.
        lengths: prompt lengths in tokens, batch 1.
        memory_lengths: those at which peak memory is measured.
        explicit_up_to: longest prompt at which ways that store patterns are timed in several rounds.
        decode_lengths: prompt lengths after which decoding is timed, one token at a time.
        profile_length: prompt length of the profile.
        checkpoint: folder of a transformers checkpoint whose weights are used; empty: random weights.
    """

    name: str
    device: str
    dtype: str
    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    lengths: tuple[int, ...]
    memory_lengths: tuple[int, ...]
    explicit_up_to: int
    decode_lengths: tuple[int, ...]
    decode_steps: int
    profile_length: int
    d_vocab: int = 1024
    checkpoint: str = ""

    def rounds(self, length: int) -> int:
        """How many times every way is timed at a length."""
        return max(3, min(9, 10_240 // length))

    def explicit_rounds(self, length: int) -> int:
        """How many times the ways that store patterns are timed at a length."""
        return 0 if length > self.explicit_up_to else max(2, min(3, 8_192 // length))


PRESETS = {
    "cpu": Preset(
        "cpu", "cpu", "float32", 8, 512, 8, 4, 64, 1376, (512, 1024, 2048, 4096, 8192), (4096, 8192), 4096,
        (512, 2048), 96, 2048,
    ),
    "gpu": Preset(
        "gpu", "cuda", "bfloat16", 32, 4096, 32, 8, 128, 14_336, (4096, 32_768, 131_072),
        (4096, 32_768, 131_072), 32_768, (4096, 32_768), 96, 4096,
    ),
    "smoke": Preset("smoke", "cpu", "float32", 2, 64, 4, 2, 16, 128, (128,), (128,), 128, (64,), 64, 128),
}  # fmt: skip


def preset_of_checkpoint(folder: str, preset: Preset) -> Preset:
    """A preset's lengths and dtype with the model of a transformers checkpoint."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    heads = config.num_attention_heads
    return replace(
        preset,
        name=f"{preset.name}, {Path(folder).name}",
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=heads,
        n_key_value_heads=getattr(config, "num_key_value_heads", heads),
        d_head=getattr(config, "head_dim", None) or config.hidden_size // heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        checkpoint=folder,
    )


__all__ = ["PRESETS", "Preset", "preset_of_checkpoint"]
