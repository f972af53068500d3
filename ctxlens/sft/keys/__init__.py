"""The keys of a recipe that belong to ctxlens, as frozen pydantic models.

`TrainConfig` holds all of them; `EvaluationKeys` is its part that describes the evaluation, and `ContextKeys`
the one that describes readings during the training. TRL's own
argument classes check TRL's keys.
"""

from ctxlens.sft.keys.base import RecipeKeys, check_known, unknown_keys
from ctxlens.sft.keys.context import ContextKeys
from ctxlens.sft.keys.evaluation import EVALUATION_KEYS, EvaluationKeys
from ctxlens.sft.keys.training import DATA_KEYS, OPTION_KEYS, RECORDED_KEYS, TrainConfig, make_train_config

__all__ = [
    "DATA_KEYS", "EVALUATION_KEYS", "OPTION_KEYS", "RECORDED_KEYS", "ContextKeys", "EvaluationKeys",
    "RecipeKeys", "TrainConfig", "check_known", "make_train_config", "unknown_keys",
]  # fmt: skip
