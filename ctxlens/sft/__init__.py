"""Fine-tuning with the indicator: a thin layer over TRL's `SFTTrainer`.

`train` takes conversations, `train_from_config` a recipe file. On several processes, run a recipe with
`accelerate launch -m ctxlens.sft --config recipe.yaml` (or `torchrun`).

The steps of a training, each in its own module: `keys` and `recipe` read what is wanted, `early` refuses what
is seen to be wrong at once, `arguments` holds TRL's arguments, `job` resolves and prepares, `marks` and
`variants` apply the selection, `rows` and `replay` make the rows, `fit` trains, `watching` with `context`
measures meanwhile how the model uses its context, `delivery` writes the checkpoint, and `evaluation` with
`before_after` compares it with the model before the training.

Names are loaded when they are first used, so that a recipe can be read and refused without torch and TRL.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxlens.sft.arguments import default_arguments as default_arguments
    from ctxlens.sft.arguments import make_model_config as make_model_config
    from ctxlens.sft.arguments import make_sft_config as make_sft_config
    from ctxlens.sft.context.callback import ContextCallback as ContextCallback
    from ctxlens.sft.context.callback import ContextWarning as ContextWarning
    from ctxlens.sft.keys import TrainConfig as TrainConfig
    from ctxlens.sft.marks import IndicatorWarning as IndicatorWarning
    from ctxlens.sft.recipe import read_config as read_config
    from ctxlens.sft.recipe import read_recipe as read_recipe
    from ctxlens.sft.replay import read_replay as read_replay
    from ctxlens.sft.rows import TrainRows as TrainRows
    from ctxlens.sft.rows import build_row as build_row
    from ctxlens.sft.rows import build_rows as build_rows
    from ctxlens.sft.rows import find_trained as find_trained
    from ctxlens.sft.switch import add_switch as add_switch
    from ctxlens.sft.training import train as train
    from ctxlens.sft.training import train_from_config as train_from_config

_EXPORTS = {
    "arguments": ("default_arguments", "make_model_config", "make_sft_config"),
    "context.callback": ("ContextCallback", "ContextWarning"),
    "keys": ("TrainConfig",),
    "marks": ("IndicatorWarning",),
    "recipe": ("read_config", "read_recipe"),
    "replay": ("read_replay",),
    "rows": ("TrainRows", "build_row", "build_rows", "find_trained"),
    "switch": ("add_switch",),
    "training": ("train", "train_from_config"),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ctxlens.sft' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ctxlens.sft.{_HOME[name]}"), name)


__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]
