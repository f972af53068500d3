"""Fine-tuning with the indicator: a thin layer over TRL's `SFTTrainer`.

`train` takes conversations, `train_from_config` a recipe file. On several processes, run a recipe with
`accelerate launch -m ctxlens.sft --config recipe.yaml` (or `torchrun`).

The steps of a training, each in its own module: `keys` and `recipe` read what is wanted, `arguments` holds
TRL's arguments, `job` resolves and prepares, `marks` and `variants` apply the selection, `rows` and `replay`
make the rows, `fit` trains, `delivery` writes the checkpoint, and `evaluation` with `before_after` compares
it with the model before the training.
"""

from ctxlens.sft.arguments import default_arguments, make_model_config, make_sft_config
from ctxlens.sft.keys import TrainConfig
from ctxlens.sft.marks import IndicatorWarning
from ctxlens.sft.recipe import read_config, read_recipe
from ctxlens.sft.replay import read_replay
from ctxlens.sft.rows import TrainRows, build_row, build_rows, find_trained
from ctxlens.sft.switch import add_switch
from ctxlens.sft.training import train, train_from_config

__all__ = [
    "IndicatorWarning", "TrainConfig", "TrainRows", "add_switch", "build_row", "build_rows",
    "default_arguments", "find_trained", "make_model_config", "make_sft_config", "read_config",
    "read_recipe", "read_replay", "train", "train_from_config",
]  # fmt: skip
