"""Sizes of the pipeline: ten minutes on a GPU, three on a CPU, or a few steps of everything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ctxlens.organism import recipe


@dataclass(frozen=True)
class Preset:
    """How much every stage does.

    Attributes:
        shape: shape of the model, as arguments of `PretrainRecipe`.
        minutes: maximum time of pretraining.
        copy_share: maximum share of this time for learning to copy.
        copy_steps: maximum number of steps of the first phase, in which the model learns to copy.
        document_steps: maximum number of steps of the second phase, on documents.
        tokens_per_step: tokens per pretraining step.
        lr: peak learning rate of pretraining.
        workers: number of processes that make the texts.
        conversations: number of conversations of the fine-tuning data.
        sft_steps: optimizer steps of each fine-tuning.
        sft_rows: rows per step.
        sft_lr: peak learning rate of the fine-tuning.
        evaluation: keys of the evaluation.
        bf16: whether to autocast to bfloat16 on a GPU.
    """

    shape: dict[str, int]
    minutes: float
    copy_share: float
    copy_steps: int
    document_steps: int
    tokens_per_step: int
    lr: float
    workers: int
    conversations: int
    sft_steps: int
    sft_rows: int
    sft_lr: float
    evaluation: dict[str, Any] = field(default_factory=dict)
    bf16: bool = False


GRID = {"lengths": "64,160,260,360,480", "depths": "0,25,50,75,100", "cases": 2}

PRESETS = {
    "gpu": Preset(
        shape={"n_layers": 12, "d_model": 768, "d_mlp": 2048, "n_heads": 12, "n_key_value_heads": 4},
        minutes=5.0, copy_share=0.4, copy_steps=20_000, document_steps=20_000, tokens_per_step=64 * 576,
        lr=5e-4, workers=14, conversations=recipe.CONVERSATIONS, sft_steps=recipe.STEPS,
        sft_rows=recipe.BATCH_ROWS, sft_lr=1e-4, evaluation=GRID, bf16=True,
    ),
    "cpu": Preset(
        shape={"n_layers": 2, "d_model": 64, "d_mlp": 160, "n_heads": 4, "n_key_value_heads": 2},
        minutes=0.7, copy_share=0.5, copy_steps=2_500, document_steps=1_200, tokens_per_step=4_608,
        lr=1e-3, workers=0, conversations=320, sft_steps=20, sft_rows=24, sft_lr=7e-4,
        evaluation={"lengths": "64,160,300", "depths": "0,50,100", "cases": 2},
    ),
    "smoke": Preset(
        shape={"n_layers": 1, "d_model": 32, "d_mlp": 48, "n_heads": 2, "n_key_value_heads": 1},
        minutes=1.0, copy_share=0.5, copy_steps=2, document_steps=2, tokens_per_step=1_152,
        lr=1e-3, workers=0, conversations=24, sft_steps=2, sft_rows=8, sft_lr=7e-4,
        evaluation={"lengths": "64", "depths": "50", "cases": 1, "new_tokens": 2},
    ),
}  # fmt: skip

__all__ = ["PRESETS", "Preset"]
