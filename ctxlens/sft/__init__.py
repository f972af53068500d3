"""Indicator-conditioned supervised fine-tuning: a thin layer over TRL's `SFTTrainer`.

`train` takes conversations, `train_from_config` a recipe file;
`accelerate launch -m ctxlens.sft --config recipe.yaml` (or `torchrun`) runs the latter on several
processes.
"""

from ctxlens.sft.config import (
    TrainConfig,
    default_arguments,
    make_model_config,
    make_sft_config,
    read_config,
    read_replay,
)
from ctxlens.sft.marks import IndicatorWarning
from ctxlens.sft.rows import TrainRows, build_row, build_rows, find_trained
from ctxlens.sft.switch import add_switch
from ctxlens.sft.training import train, train_from_config

__all__ = [
    "IndicatorWarning", "TrainConfig", "TrainRows", "add_switch", "build_row", "build_rows",
    "default_arguments", "find_trained", "make_model_config", "make_sft_config", "read_config",
    "read_replay", "train", "train_from_config",
]  # fmt: skip
