"""What a model answers to the cells of a needle grid: responses, and how likely it finds the needle.

A cell on which the model fails is told apart from the others, whose answers are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ctxlens.chat.roles import RenderedChat
from ctxlens.errors import InputError
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.prompts import Cell, NeedleModel, answer_positions, render_cell

_T = TypeVar("_T")
Job = tuple[Cell, str]
"""A cell and the condition in which it is asked."""


@dataclass(frozen=True)
class Answer:
    """What came of one cell in one condition.

    Attributes:
        prompt_tokens: the prompt's length in tokens.
        response: what the model said; None if it was not asked, or failed.
        logprob: mean log-probability of the needle's words after its prefix, in nats per token; None if it
            was not asked for, or the model failed.
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
    indicator: bool = False,
    batch_tokens: int = 8192,
) -> list[Answer]:
    """Ask a model for what the configuration scores.

    Where the model raises on several cells at once, they are halved until the failing ones are alone (so
    memory that is short for a batch may be enough for half of it).

    Args:
        model: the model.
        jobs: cells and conditions.
        config: their configuration.
        indicator: whether the question carries the model's indicator.
        batch_tokens: how many prompt and new tokens are worked on at once.

    Raises:
        InputError: a prompt that does not fit the window, or that the template refuses.
    """

    def render(answer: bool) -> list[RenderedChat]:
        return [
            render_cell(
                model, cell, config, condition,
                indicator=indicator, answer=cell.needle.sentence if answer else None,
            )
            for cell, condition in jobs
        ]  # fmt: skip

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
    """The answers to the chats, in order, with the reason in place of each that fails."""
    try:
        return list(ask(chats))
    except InputError:
        raise
    except Exception as error:  # whatever a model raises concerns the cells it was asked
        if len(chats) == 1:
            lines = str(error).strip().splitlines()
            return [_Failure(": ".join([type(error).__name__, *lines[:1]])[:300])]
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
                f"cell {cell.number} ({condition}) has {chat.n_tokens} tokens, which with {new} new ones do "
                f"not fit the window of {model.n_ctx}; ask for shorter contexts."
            )


__all__ = ["Answer", "Job", "answer_jobs"]
