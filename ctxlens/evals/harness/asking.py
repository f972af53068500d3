"""How a model of ctxlens is asked lm-eval's tasks under a condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctxlens.chat import condition as conditions
from ctxlens.chat.condition import Condition
from ctxlens.errors import InputError
from ctxlens.evals.harness.adapter import CtxlensLM
from ctxlens.models import Model
from ctxlens.models.attention.steering import steering_of
from ctxlens.processes import ALONE


def parse_conditions(words: str | Sequence[str | Condition]) -> tuple[Condition, ...]:
    """Conditions that tasks can be asked under, from their spellings (`ctxlens.chat.condition.SPELLING`).

    Raises:
        InputError: no condition is given, one cannot be read, one occurs twice, or one asks for what
            lm-eval's tasks do not have: a response prefix, a context that stands apart from the question,
            or retrieval heads.
    """
    found = conditions.parse_conditions(words)
    for condition in found:
        if condition.prefix or condition.context_in == "assistant":
            raise InputError(
                f"condition {condition.name!r} is for needles only: lm-eval's tasks have no response prefix, "
                "and their context is part of the question; leave out prefix and assistant."
            )
        steering_of(condition)
    return found


def find_misfit(model: Model, condition: Condition) -> str:
    """Why a model cannot be asked under a condition; empty if it can."""
    if condition.indicator and model.indicator is None:
        return "it has no indicator token"
    if condition.template and not model.tokenizer.chat_template:
        return "it has no chat template"
    if (steering := steering_of(condition)) is not None:
        try:
            steering.check_heads(model.n_layers, model.n_heads)
        except InputError as error:
            return str(error).rstrip(".")
    return ""


def adapt(model: Model, condition: Condition, **options: Any) -> CtxlensLM:
    """The model as lm-eval calls it, under a condition.

    The condition's template is left to lm-eval (its option `apply_chat_template`), so that the examples given
    before a question become earlier turns.
    """
    return CtxlensLM(
        model,
        indicator=condition.indicator,
        alpha=condition.alpha,
        target_share=condition.target_share,
        heads=condition.heads,
        **{"processes": ALONE, **options},
    )


def tell_tasks(
    first_model: str, metadata: Mapping[str, Any] | None, data_dir: str | Path | None
) -> dict[str, Any]:
    """The metadata that tasks are built with; some tasks count tokens with the first model's tokenizer."""
    told = {"pretrained": first_model, **(metadata or {})}
    return told if data_dir is None else {**told, "data_dir": str(data_dir)}


__all__ = ["adapt", "find_misfit", "parse_conditions", "tell_tasks"]
