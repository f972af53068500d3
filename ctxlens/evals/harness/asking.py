"""How a model of ctxlens is asked lm-eval's tasks under a condition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ctxlens.chat import condition as conditions
from ctxlens.chat.condition import Condition
from ctxlens.errors import InputError
from ctxlens.evals.harness.adapter import CtxlensLM
from ctxlens.models import Model
from ctxlens.models.attention.steering import steering_of
from ctxlens.processes import ALONE

ANSWER_PREFIX = "Answer:"
"""How answers begin under a condition with `prefix`."""


def parse_conditions(words: str | Sequence[str | Condition]) -> tuple[Condition, ...]:
    """Conditions that tasks can be asked under, from their spellings (`ctxlens.chat.condition.SPELLING`).

    Raises:
        InputError: no condition is given, one cannot be read, one occurs twice, or one asks for what
            lm-eval's tasks do not have: a context that stands apart from the question, or retrieval heads.
    """
    found = conditions.parse_conditions(words)
    for condition in found:
        if condition.context_in == "assistant":
            raise InputError(
                f"condition {condition.name!r} is for needles only: the context of lm-eval's tasks is part "
                "of the question; use plain or template."
            )
        if condition.control:
            raise InputError(
                f"condition {condition.name!r} is for needles only; leave out {condition.control}."
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


@contextmanager
def answers_begin(task: Any, condition: Condition, prefix: str = ANSWER_PREFIX) -> Iterator[None]:
    """Let the answers to a task begin with a prefix during a `with` block, if the condition says so.

    With the chat template, the prefix opens the assistant's turn; without, it stands on a line of its own
    after the question. A task whose answers begin with words of its own (`ctxlens_needle_known_prefix`) keeps
    them.

    Args:
        task: a task of lm-eval.
        condition: how the model is asked.
        prefix: the first words of every answer; a template of lm-eval (`gen_prefix`).
    """
    if not condition.prefix or task.get_config("gen_prefix"):
        yield
        return
    opening = prefix if condition.template else f"\n{prefix}"
    examples = task.fewshot_cfg
    before = examples.gen_prefix
    task.set_config("gen_prefix", opening)
    examples.gen_prefix = opening
    try:
        yield
    finally:
        task.set_config("gen_prefix", None)
        examples.gen_prefix = before


def tell_tasks(
    first_model: str, metadata: Mapping[str, Any] | None, data_dir: str | Path | None
) -> dict[str, Any]:
    """The metadata that tasks are built with; some tasks count tokens with the first model's tokenizer."""
    told = {"pretrained": first_model, **(metadata or {})}
    return told if data_dir is None else {**told, "data_dir": str(data_dir)}


__all__ = ["ANSWER_PREFIX", "adapt", "answers_begin", "find_misfit", "parse_conditions", "tell_tasks"]
