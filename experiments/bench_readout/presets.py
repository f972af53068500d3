"""The models and lengths that are measured."""

from __future__ import annotations

from dataclasses import dataclass


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

__all__ = ["PRESETS", "Preset"]
