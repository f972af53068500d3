"""A cell of a needle grid as a prompt, in each condition."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from ctxlens.chat.roles import RenderedChat
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import Context
from ctxlens.evals.needle.needles import Needle

_ASSISTANT_REQUEST = "Write a text and a question about it, then answer the question from the text."


@runtime_checkable
class Renderer(Protocol):
    """What building cells needs of a model: its tokenizer, template and window, but no weights."""

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def indicator(self) -> str | None: ...
    @property
    def n_ctx(self) -> int: ...
    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedChat: ...
    def render_plain(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedChat: ...


@runtime_checkable
class NeedleModel(Renderer, Protocol):
    """What a needle grid needs of a model; `ctxlens.models.Model` has it."""

    @property
    def identity(self) -> Mapping[str, Any]: ...
    def generate(self, chats: Any, *, max_new_tokens: int = ..., batch_tokens: int = ...) -> Any: ...
    def logprobs(self, chats: Any, *, batch_tokens: int = ...) -> Any: ...
    @property
    def steer(self) -> Callable[..., contextlib.AbstractContextManager[Any]]: ...


@dataclass(frozen=True)
class Cell:
    """One context with its needle: what all conditions have in common.

    Attributes:
        number: its number in the grid; the same in all conditions and for all models.
        needle: what is hidden.
        context: where.
        context_tokens: the length asked for, in tokens.
        depth_percent: the depth asked for.
        case: which of the cell's cases.
    """

    number: int
    needle: Needle
    context: Context
    context_tokens: int
    depth_percent: float
    case: int


def render_cell(
    model: Renderer,
    cell: Cell,
    config: NeedleConfig,
    condition: str,
    *,
    indicator: bool = False,
    answer: str | None = None,
) -> RenderedChat:
    """The prompt of a cell in one condition, as the model gets it.

    Args:
        model: the model.
        cell: the cell.
        config: its configuration.
        condition: one of `CONDITIONS`.
        indicator: whether the question carries the model's indicator.
        answer: what to put in the model's mouth, in place of the needle's prefix (in every condition).
    """
    needle = cell.needle
    prefix = needle.prefix if answer is None else answer
    asked = word_question(cell, config)
    mark = {"indicator": True} if indicator else {}
    if condition == "template" and answer is None:
        return model.render([{"role": "user", "content": asked, **mark}], add_generation_prompt=True)
    request = asked
    if condition == "assistant+prefix":
        request, prefix = _ASSISTANT_REQUEST, f"{asked}\n{prefix}"
    messages = [
        {"role": "user", "content": request, **mark},
        {"role": "assistant", "content": prefix},
    ]
    render = model.render_plain if condition == "plain+prefix" else model.render
    return render(messages, continue_final_message=True)


def fill_wording(template: str, context: str, question: str) -> str:
    """A wording with its context and question put in; other braces stay as they are."""
    fields = {"context": context, "question": question}
    return re.sub(r"\{(context|question)\}", lambda match: fields[match[1]], template)


def word_question(cell: Cell, config: NeedleConfig) -> str:
    """What the user says in a cell: its context and question in the configuration's wording."""
    return fill_wording(config.template, cell.context.text, cell.needle.question)


def answer_positions(chat: RenderedChat, cell: Cell) -> Int64[np.ndarray, " answer_pos"]:
    """The tokens of the needle's answer, that is of what comes after its prefix, in the model's mouth.

    The same words in every condition, so that their probabilities compare.

    Args:
        chat: the cell, rendered with the needle's sentence as `answer`.
        cell: the cell.
    """
    said = chat.response_positions()
    start = chat.text.rindex(cell.needle.sentence) + cell.needle.sentence.rindex(cell.needle.answer)
    return said[chat.spans[said, 1] > start]


def describe_cell(
    model: Renderer, cell: Cell, config: NeedleConfig, condition: str, *, indicator: bool = False
) -> str:
    """A cell in words, with its whole prompt: what a dry run shows."""
    chat = render_cell(model, cell, config, condition, indicator=indicator)
    lines = (
        f"cell {cell.number}, {condition}{', with indicator' if indicator else ''}",
        f"  needle    {cell.needle.name}: {cell.needle.sentence}",
        f"  question  {cell.needle.question}",
        f"  keywords  {', '.join(cell.needle.keywords)}",
        f"  context   {cell.context.tokens} tokens ({cell.context_tokens} asked for)",
        f"  depth     {cell.context.depth_percent:.1f} % ({cell.depth_percent:g} % asked for)",
        f"  prompt    {chat.n_tokens} tokens, window {model.n_ctx}, "
        + (f"up to {config.max_new_tokens} new ones" if config.generates else "nothing generated"),
    )
    return "\n".join([*lines, "-" * 20, chat.text, "-" * 20])


__all__ = [
    "Cell",
    "NeedleModel",
    "Renderer",
    "answer_positions",
    "describe_cell",
    "fill_wording",
    "render_cell",
    "word_question",
]
