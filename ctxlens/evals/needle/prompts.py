"""A cell of a needle grid as a prompt, under each condition."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from ctxlens.chat.condition import Condition
from ctxlens.chat.roles import RenderedChat, render, render_plain
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.contexts import Context
from ctxlens.evals.needle.controls import Renderer, render_controlled
from ctxlens.evals.needle.needles import Needle

_ASSISTANT_REQUEST = "Write a text and a question about it, then answer the question from the text."


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
class Window:
    """A model's tokenizer, template and window without its weights: enough to build cells and prompts.

    Attributes:
        name: the model's name, for messages.
        tokenizer: its tokenizer, with the chat template.
        n_ctx: the length of its window in tokens.
        indicator: its indicator, if it has one.
    """

    name: str
    tokenizer: Any
    n_ctx: int
    indicator: str | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedChat:
        """As `Model.render`."""
        return render(self.tokenizer, messages, **{**self._options(), **options})

    def render_plain(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedChat:
        """As `Model.render_plain`."""
        return render_plain(self.tokenizer, messages, **{**self._options(), **options})

    def _options(self) -> dict[str, Any]:
        return {"indicator": self.indicator, "max_tokens": self.n_ctx}


@dataclass(frozen=True)
class Cell:
    """One context with its needle; every condition and every model is asked with it.

    Attributes:
        number: its number in the grid; the same under all conditions and for all models.
        needle: the needle.
        context: the text that contains the needle.
        context_tokens: the requested length, in tokens.
        depth_percent: the requested depth.
        case: the number of the context among those of the same length.
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
    condition: Condition | str,
    *,
    answer: str | None = None,
) -> RenderedChat:
    """The prompt of a cell under one condition, as the model gets it.

    Args:
        model: the model.
        cell: the cell.
        config: its configuration.
        condition: the condition or its spelling. Its indicator marks the question; its steering has no effect
            on the prompt.
        answer: the text that begins the answer, in place of the needle's prefix (under every condition).
    """
    condition = Condition.parse(condition)
    request = word_question(cell, config)
    begun = answer if answer is not None else cell.needle.prefix if condition.prefix else None
    if condition.context_in == "assistant":
        request, begun = _ASSISTANT_REQUEST, request if begun is None else f"{request}\n{begun}"
    user = {"role": "user", "content": request, **({"indicator": True} if condition.indicator else {})}
    if begun is None:
        return render_controlled(model, [user], condition, add_generation_prompt=True)
    messages = [user, {"role": "assistant", "content": begun}]
    return render_controlled(model, messages, condition, continue_final_message=True)


def fill_wording(template: str, context: str, question: str) -> str:
    """Put a context and a question into a wording; other braces stay as they are."""
    fields = {"context": context, "question": question}
    return re.sub(r"\{(context|question)\}", lambda match: fields[match[1]], template)


def word_question(cell: Cell, config: NeedleConfig) -> str:
    """What the user says in a cell: its context and question in the configuration's wording."""
    return fill_wording(config.template, cell.context.text, cell.needle.question)


def answer_positions(chat: RenderedChat, cell: Cell) -> Int64[np.ndarray, " answer_pos"]:
    """The positions of the needle's answer, which is what follows its prefix, within the response.

    The same words are read under every condition, so that their probabilities are comparable.

    Args:
        chat: the cell, rendered with the needle's sentence as `answer`.
        cell: the cell.
    """
    said = chat.response_positions()
    start = chat.text.rindex(cell.needle.sentence) + cell.needle.sentence.rindex(cell.needle.answer)
    return said[chat.spans[said, 1] > start]


def describe_cell(model: Renderer, cell: Cell, config: NeedleConfig, condition: Condition | str) -> str:
    """A cell in words, with its whole prompt: what a dry run shows."""
    chat = render_cell(model, cell, config, condition)
    lines = (
        f"cell {cell.number}, {condition}",
        f"  needle    {cell.needle.name}: {cell.needle.sentence}",
        f"  question  {cell.needle.question}",
        f"  keywords  {', '.join(cell.needle.keywords)}",
        f"  context   {cell.context.tokens} tokens ({cell.context_tokens} requested)",
        f"  depth     {cell.context.depth_percent:.1f} % ({cell.depth_percent:g} % requested)",
        f"  prompt    {chat.n_tokens} tokens, window {model.n_ctx}, "
        + (f"up to {config.max_new_tokens} new tokens" if config.generates else "nothing is generated"),
    )
    return "\n".join([*lines, "-" * 20, chat.text, "-" * 20])


__all__ = [
    "Cell",
    "NeedleModel",
    "Renderer",
    "Window",
    "answer_positions",
    "describe_cell",
    "fill_wording",
    "render_cell",
    "word_question",
]
