"""Sizes: what is trained for how long, and how much is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """Everything that determines a run, except data and seed.

    Attributes:
        vocab_size: Tokens of the BPE tokenizer.
        d_model, d_mlp, n_layers, n_heads, n_key_value_heads: The model's shape.
        n_ctx: The window, and the length of a packed row.
        copy_vocab: Number of the most frequent tokens that the copying phase draws from.
        copy_tokens: Tokens per step of the copying phase.
        copy_length: Tokens of a row of the copying phase.
        copy_max_steps: Upper bound on the steps of the copying phase.
        row_tokens: Tokens per step of the text phase.
        lr: Peak learning rate of the text phase.
        minutes: Budget of pretraining, both phases together.
        corpus_tokens: Approximate number of tokens of the packed corpus.
        sft_rows: Conversations for fine-tuning, by kind.
        sft_tokens: Conversations longer than this are not drawn.
        sft_batch: Rows of an optimizer step, processed in two halves.
        sft_lr: Peak learning rate of fine-tuning.
        sft_epochs: Passes over the conversations.
        oracle: Whether a third model is trained, with the indicator on the turns of dependent kinds.
        replay_share: Share of rows that replay raw pretraining text.
        needle_lengths, needle_depths, needle_cases: The needle grid.
        questions: Held-out questions asked of each reading-comprehension set.
        prompts: Held-out closed-book questions.
        ifeval: Prompts of IFEval.
        precision: `float32`, or `bfloat16` for mixed precision on an accelerator.
    """

    vocab_size: int = 2048
    d_model: int = 128
    d_mlp: int = 320
    n_layers: int = 4
    n_heads: int = 4
    n_key_value_heads: int = 2
    n_ctx: int = 512
    copy_vocab: int = 512
    copy_tokens: int = 2048
    copy_length: int = 64
    copy_max_steps: int = 3000
    row_tokens: int = 4096
    lr: float = 1.5e-3
    minutes: float = 33.0
    corpus_tokens: int = 5_000_000
    sft_rows: Mapping[str, int] = field(
        default_factory=lambda: {
            "document": 700, "closed": 600, "options": 250, "input": 120, "instruction": 450,
        }
    )  # fmt: skip
    sft_tokens: int = 320
    sft_batch: int = 16
    sft_lr: float = 7e-4
    sft_epochs: int = 1
    replay_share: float = 0.2
    oracle: bool = True
    needle_lengths: tuple[int, ...] = (100, 180, 260, 340)
    needle_depths: tuple[float, ...] = (0.0, 50.0, 100.0)
    needle_cases: int = 2
    questions: int = 100
    prompts: int = 120
    ifeval: int = 24
    precision: str = "float32"


PRESETS: Mapping[str, Preset] = {
    "smoke": Preset(
        vocab_size=600, d_model=32, d_mlp=64, n_layers=2, n_heads=4, n_key_value_heads=2, copy_max_steps=20,
        minutes=0.2, corpus_tokens=60_000, row_tokens=2048, sft_batch=8,
        sft_rows={"document": 8, "closed": 8, "options": 4, "input": 4, "instruction": 8},
        needle_lengths=(160,), needle_depths=(50.0,), needle_cases=1, questions=4, prompts=4, ifeval=2,
    ),
    "small": Preset(oracle=False),
    "cpu": Preset(
        vocab_size=4096, d_model=192, d_mlp=512, n_heads=6, n_key_value_heads=3, minutes=120.0,
        corpus_tokens=12_000_000, sft_batch=32, sft_lr=5e-4, needle_cases=6, questions=300, ifeval=200,
        sft_rows={"document": 1300, "closed": 1100, "options": 500, "input": 250, "instruction": 850},
    ),
    "gpu": Preset(
        vocab_size=12_288, d_model=512, d_mlp=1408, n_layers=10, n_heads=8, n_key_value_heads=4,
        copy_vocab=4096, copy_tokens=32_768, row_tokens=65_536, lr=1e-3, minutes=9.0,
        corpus_tokens=30_000_000, precision="bfloat16",
        sft_rows={"document": 2500, "closed": 1400, "options": 900, "input": 600, "instruction": 3000},
        sft_tokens=448, sft_batch=32, sft_lr=2e-4, sft_epochs=2, needle_cases=6,
        questions=600, prompts=279, ifeval=541,
    ),
}  # fmt: skip
"""`smoke`: does it run; `small`: 1 million parameters, what a shared core can do in an hour; `cpu`: 2.4
million parameters, an idle core for three hours; `gpu`: 36 million parameters."""
