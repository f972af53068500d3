"""What a model answers to the cells of a needle grid: responses, and the probability of the needle.

A cell on which the model fails is recorded as a failure; the answers to the other cells are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ctxlens.chat.condition import Condition
from ctxlens.chat.roles import RenderedChat
from ctxlens.errors import InputError, first_line
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.prompts import Cell, NeedleModel, answer_positions, render_cell

_T = TypeVar("_T")
Job = tuple[Cell, Condition]
"""A cell and the condition under which it is asked."""


@dataclass(frozen=True)
class Answer:
    """The answer to one cell under one condition.

    Attributes:
        prompt_tokens: the prompt's length in tokens.
        response: what the model said; None if no response was generated.
        logprob: mean log-probability of the needle's words after its prefix, in nats per token; None if it
            was not requested, or the model failed.
        error: why there is no answer; empty if there is one.
    """

    prompt_tokens: int
    response: str | None = None
    logprob: float | None = None
    error: str = ""


@dataclass(frozen=True)
class _Failure:
    reason: str


def answer_jobs(
    model: NeedleModel,
    jobs: Sequence[Job],
    config: NeedleConfig,
    *,
    batch_tokens: int = 8192,
) -> list[Answer]:
    """Ask a model for what the configuration scores.

    Where the model raises on a batch, the batch is halved until the failing cells are alone. Half a batch may
    also fit where the memory is too small for the whole.

    Args:
        model: the model.
        jobs: cells and conditions; the indicator of a condition marks the question.
        config: their configuration.
        batch_tokens: upper bound on the prompt and new tokens of a batch.

    Raises:
        InputError: a prompt does not fit the window, or the template refuses it.
    """

    def render(answer: bool) -> list[RenderedChat]:
        return [
            render_cell(model, cell, config, condition, answer=cell.needle.sentence if answer else None)
            for cell, condition in jobs
        ]

    prompts = render(answer=False)
    _check_fit(model, jobs, prompts, config.max_new_tokens if config.generates else 0)
    texts: Sequence[str | _Failure | None] = [None] * len(jobs)
    if config.generates:
        texts = _attempt(
            lambda some: model.generate(
                some, max_new_tokens=config.max_new_tokens, batch_tokens=batch_tokens
            ),
            prompts,
        )
    means: Sequence[float | _Failure | None] = [None] * len(jobs)
    if "logprob" in config.score:
        said = render(answer=True)
        _check_fit(model, jobs, said, 0)
        found = _attempt(lambda some: model.logprobs(some, batch_tokens=batch_tokens), said)
        means = [
            _mean_of_answer(values, chat, cell)
            for values, chat, (cell, _) in zip(found, said, jobs, strict=True)
        ]
    return [
        _merge(prompt.n_tokens, text, mean) for prompt, text, mean in zip(prompts, texts, means, strict=True)
    ]


def _attempt(
    ask: Callable[[list[RenderedChat]], Sequence[_T]], chats: list[RenderedChat]
) -> list[_T | _Failure]:
    """The answers to the chats, in order; a chat that fails gives the reason instead."""
    try:
        return list(ask(chats))
    except InputError:
        raise
    except Exception as error:  # whatever a model raises concerns the cells it was asked
        if len(chats) == 1:
            kind, reason = type(error).__name__, first_line(error)
            return [_Failure(kind if reason == kind else f"{kind}: {reason}")]
    half = len(chats) // 2
    return [*_attempt(ask, chats[:half]), *_attempt(ask, chats[half:])]


def _mean_of_answer(values: Any, chat: RenderedChat, cell: Cell) -> float | _Failure:
    if isinstance(values, _Failure):
        return values
    wanted = len(answer_positions(chat, cell))
    mean = float(values[len(values) - wanted :].mean())
    return _Failure("the model gives no finite log-probability") if not math.isfinite(mean) else mean


def _merge(prompt_tokens: int, text: str | _Failure | None, mean: float | _Failure | None) -> Answer:
    failures = [one.reason for one in (text, mean) if isinstance(one, _Failure)]
    return Answer(
        prompt_tokens,
        None if isinstance(text, _Failure) else text,
        None if isinstance(mean, _Failure) else mean,
        "; ".join(dict.fromkeys(failures)),
    )


def _check_fit(model: NeedleModel, jobs: Sequence[Job], chats: Sequence[RenderedChat], new: int) -> None:
    for (cell, condition), chat in zip(jobs, chats, strict=True):
        if chat.n_tokens + new > model.n_ctx:
            raise InputError(
                f"cell {cell.number} ({condition}) has {chat.n_tokens} tokens, which do not fit the window "
                f"of {model.n_ctx} together with {new} new tokens; ask for shorter contexts."
            )


__all__ = ["Answer", "Job", "answer_jobs"]
