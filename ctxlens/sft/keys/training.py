"""The keys of a recipe that say what to train on and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from ctxlens.errors import InputError
from ctxlens.sft.keys.base import check_known
from ctxlens.sft.keys.context import ContextKeys
from ctxlens.sft.keys.evaluation import EVALUATION_KEYS, EvaluationKeys

LossOn = Literal["assistant", "all"]


class TrainConfig(EvaluationKeys, ContextKeys):
    """All keys of a recipe that belong to ctxlens; TRL's `SFTConfig` and `ModelConfig` add theirs.

    Raises:
        InputError: an unknown key, a value of the wrong kind or out of range, or keys that contradict each
            other.
    """

    model: str = Field(
        default="organism",
        description="Model to start from: a folder, a Hub id, or the name of a packaged model.",
    )
    dataset: str = Field(
        default="",
        description="Conversations: a file, a folder or a Hub id, as for `ctxlens score --dataset`.",
    )
    split: str = Field(default="train", description="Split of a data set from the Hub.")
    layout: str | None = Field(
        default=None, description="Layout of the data set. Default: detected from the first rows."
    )
    limit: int | None = Field(
        default=None, description="Number of conversations to use, from the start. Default: all."
    )
    selection: str | None = Field(
        default=None,
        description="Turns whose user messages get the indicator: selection.parquet, or the folder of the "
        "run that wrote it.",
    )
    require_selected: bool = Field(
        default=False,
        description="Raise an error instead of a warning if no user message carries the indicator.",
    )
    indicator: str | None = Field(
        default=None, description="The indicator, such as [IND]. Default: train without an indicator."
    )
    indicator_as: Literal["token", "text"] = Field(
        default="token",
        description="token: one token, which is added to the vocabulary if it is missing. text: ordinary "
        "text, which the tokenizer may split.",
    )
    indicator_init: str = Field(
        default="mean",
        description="Initial embedding of the indicator. mean: the mean of all embeddings. A phrase: the "
        "mean of the embeddings of its tokens.",
    )
    indicator_in_data: Literal["error", "keep"] = Field(
        default="error",
        description="What to do if the data already contain the indicator as text: raise an error, or "
        "keep it.",
    )
    indicator_dropout: float = Field(
        default=0.0,
        description="Share of the selected messages that are trained without the indicator; at least 0, "
        "below 1.",
    )
    negative_indicator: str | None = Field(
        default=None,
        description="A second indicator, for answered messages that are not selected. Default: none of them "
        "is marked.",
    )
    selection_control: Literal["none", "random"] = Field(
        default="none",
        description="random: replace the selected turns by the same number of randomly drawn turns, as a "
        "control.",
    )
    upsample_selected: int = Field(
        default=1,
        description="How many times each conversation with a selected turn occurs in the training data.",
    )
    loss_on: LossOn = Field(
        default="assistant",
        description="Tokens that contribute to the loss. assistant: what the model has to write. all: every "
        "token, as in the paper's code.",
    )
    truncation: Literal["left", "right", "middle"] = Field(
        default="left",
        description="Where the context of a conversation is truncated that is too long for the window.",
    )
    unusable: Literal["error", "skip"] = Field(
        default="error",
        description="What to do with conversations that cannot be trained on: raise an error, or skip and "
        "count them.",
    )
    replay: str | None = Field(
        default=None,
        description="Raw texts to train on besides the conversations: JSON Lines with the key text, or plain "
        "text with blank lines between the texts.",
    )
    replay_share: float | None = Field(
        default=None,
        description="Share of raw texts among all rows, at least 0, below 1. Default: every text once.",
    )
    allow_cross_sample_attention: bool = Field(
        default=False,
        description="Train although conversations that share a packed row see each other.",
    )
    chat_template: str | None = Field(
        default=None, description="File with a Jinja chat template that replaces the tokenizer's own."
    )
    template_args: dict | None = Field(
        default=None,
        description="Values of the chat template's own variables, such as {enable_thinking: false}. The "
        "trained checkpoint's template has them as its defaults.",
    )
    overwrite: bool = Field(
        default=False, description="Start again. A run that is already in the folder is renamed to DIR.old."
    )

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if not 0 <= self.indicator_dropout < 1:
            raise InputError(
                f"indicator_dropout must be at least 0 and below 1, got {self.indicator_dropout}."
            )
        if self.upsample_selected < 1:
            raise InputError(f"upsample_selected must be at least 1, got {self.upsample_selected}.")
        if self.negative_indicator is not None and self.negative_indicator == self.indicator:
            raise InputError(f"negative_indicator must differ from the indicator, got {self.indicator!r}.")
        for name in ("indicator_dropout", "negative_indicator"):
            if getattr(self, name) and self.indicator is None:
                raise InputError(f'{name} has no effect without an indicator; give indicator="[IND]" too.')
        return self


DATA_KEYS = frozenset({"model", "dataset", "split", "layout", "limit", "selection", "replay"})
"""The keys that name the model and the data; they are arguments of `train`, not options."""

RECORDED_KEYS = (
    "indicator", "indicator_as", "indicator_init", "indicator_dropout", "negative_indicator",
    "selection_control", "upsample_selected", "loss_on", "truncation", "unusable", "replay_share",
)  # fmt: skip
"""The keys that stand in the manifest; the others do not change what is trained, or are hashed."""

OPTION_KEYS = frozenset(TrainConfig.model_fields) - DATA_KEYS - EVALUATION_KEYS
"""The keys that say how to train: the options of `train`."""


def make_train_config(options: Mapping[str, Any] | None = None) -> TrainConfig:
    """Check the options of `train` and fill in the defaults.

    Raises:
        InputError: an unknown key, or a value that the key does not allow.
    """
    given = dict(options or {})
    check_known(given, OPTION_KEYS, "train")
    return TrainConfig(**given)


__all__ = ["DATA_KEYS", "OPTION_KEYS", "RECORDED_KEYS", "LossOn", "TrainConfig", "make_train_config"]
