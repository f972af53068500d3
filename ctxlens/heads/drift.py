"""Attention drift: role shares of the same conversations, read from two models or in two conditions.

The paper's Figures 3 to 5 compare such shares: with and without template, before and after fine-tuning, with
and without indicator. Here every difference is paired by conversation and has an interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from ctxlens.chat.condition import Condition
from ctxlens.chat.data.annotate import mark_last_question
from ctxlens.chat.roles import RenderedChat
from ctxlens.chat.roles.left_out import count_left_out
from ctxlens.errors import InputError
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.prompts import Cell, word_question
from ctxlens.heads import find_retrieval_heads
from ctxlens.models import Model
from ctxlens.models.indicator_token import require_indicator
from ctxlens.results import Drift, RoleAllocation
from ctxlens.results.arrays import join_resting
from ctxlens.runs import Progress

_COMPARED = ("plain", "template", "plain+indicator", "template+indicator")

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Side:
    """One side of the comparison.

    Attributes:
        model: the model.
        condition: with or without the template, with or without the indicator in the last question; a
            `Condition` or its spelling.
        label: the name in figures; by default the model's own.

    Raises:
        InputError: the condition cannot be compared here, or it needs an indicator that the model lacks.
    """

    model: Model
    condition: Condition | str = "template"
    label: str | None = None

    def __post_init__(self) -> None:
        if self.asked.name not in _COMPARED:
            raise InputError(
                f"drift cannot compare the condition {self.asked.name!r}; choose from {', '.join(_COMPARED)}."
            )
        if self.asked.indicator:
            require_indicator(self.model)

    @property
    def asked(self) -> Condition:
        """The condition, parsed."""
        return Condition.parse(self.condition)

    @property
    def name(self) -> str:
        """Model and condition in words."""
        return f"{self.label or self.model.name}, {self.asked}"

    def render(self, messages: Messages, **options: Any) -> RenderedChat:
        """Render a conversation for this side; a final user turn is followed by the generation prompt."""
        marked = mark_last_question(messages, self.asked.indicator)
        render = self.model.render if self.asked.template else self.model.render_plain
        return render(marked, **{"add_generation_prompt": marked[-1]["role"] != "assistant", **options})


def read_drift(
    first: Side,
    second: Side,
    conversations: Sequence[Messages],
    *,
    queries: Literal["first_answer", "response_mean"] | str = "first_answer",
    contexts: Int[np.ndarray, " conversation"] | None = None,
    render_options: Mapping[str, Any] | None = None,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> Drift:
    """Read role shares of the same conversations on both sides.

    Args:
        first: the reference side.
        second: the side that is compared with it.
        conversations: lists of messages; each side renders them itself.
        queries: `first_answer` or `response_mean`.
        contexts: which text each conversation is made from, if some share a text; texts are the units of
            intervals. By default each conversation is its own unit.
        render_options: further rendering options, for instance `truncate=True`, or
            `continue_final_message=True` if the conversations end with the beginning of an answer.
        batch_tokens: padded tokens in one forward pass.
        progress: called with the number of finished readings and the total.

    Raises:
        InputError: there are no conversations, the sides differ in layers or heads, or a conversation cannot
            be rendered or read; the message names it.
    """
    if not conversations:
        raise InputError("no conversations were given; drift needs at least one, preferably twenty.")
    shapes = [(side.model.n_layers, side.model.n_heads) for side in (first, second)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"only models of one shape can be compared head by head; {first.model.name} has {shapes[0][0]} "
            f"layers of {shapes[0][1]} heads, {second.model.name} {shapes[1][0]} of {shapes[1][1]}."
        )
    if queries not in ("first_answer", "response_mean"):
        raise InputError(f"unknown queries {queries!r}; choose first_answer or response_mean.")
    options = dict(render_options or {})
    rendered = [_render_all(side, conversations, options) for side in (first, second)]
    plain_side = replace(first, condition="plain")
    first_is_plain = first.asked == plain_side.asked
    plain = rendered[0] if first_is_plain else _render_all(plain_side, conversations, options)
    total = len(conversations) * (2 if first_is_plain else 3)
    done = 0

    def read(model: Model, chats: list[RenderedChat]) -> RoleAllocation:
        nonlocal done

        def tell(finished: int, _: int) -> None:
            if progress:
                progress(done + finished, total)

        found = model.read_roles(chats, queries=queries, batch_tokens=batch_tokens, progress=tell)
        done += len(chats)
        return RoleAllocation.concat(found)

    sides = [read(side.model, chats) for side, chats in zip((first, second), rendered, strict=True)]
    unmoved = sides[0] if first_is_plain else read(first.model, plain)
    heads = find_retrieval_heads(unmoved)
    return Drift(
        np.stack([side.shares for side in sides]).astype(np.float32),
        np.stack([side.key_counts for side in sides]).astype(np.float32),
        np.arange(len(conversations)) if contexts is None else np.asarray(contexts, dtype=np.int64),
        sides[0].layers,
        np.array([head for _, head in heads], dtype=np.int64),
        queries,
        {
            "sides": [first.name, second.name],
            "models": [dict(first.model.identity), dict(second.model.identity)],
            "conditions": [first.asked.name, second.asked.name],
            "conversations": len(conversations),
            "same_tokens": _same_tokens(*rendered),
            "left_out": dict(Counter(count_left_out(rendered[0])) | Counter(count_left_out(rendered[1]))),
        },
        join_resting(sides, lambda parts: np.stack(parts).astype(np.float32)),
    )


def needle_conversations(
    cells: Sequence[Cell], config: NeedleConfig
) -> tuple[list[list[dict[str, Any]]], Int[np.ndarray, " conversation"]]:
    """Needle cells as conversations that end with the answer's prefix, and the number of each one's text.

    Read them with `render_options={"continue_final_message": True}`.
    """
    asked = [
        [
            {"role": "user", "content": word_question(cell, config)},
            {"role": "assistant", "content": cell.needle.prefix},
        ]
        for cell in cells
    ]
    texts = [(cell.context_tokens, cell.case) for cell in cells]
    known = sorted(set(texts))
    return asked, np.array([known.index(text) for text in texts], dtype=np.int64)


def _render_all(side: Side, conversations: Sequence[Messages], options: dict[str, Any]) -> list[RenderedChat]:
    chats = []
    for i, messages in enumerate(conversations):
        try:
            chats.append(side.render(messages, **options))
        except InputError as error:
            raise type(error)(f"conversation {i} ({side.name}): {error}") from error
    return chats


def _same_tokens(first: Sequence[RenderedChat], second: Sequence[RenderedChat]) -> bool:
    """Whether both sides see identical tokens, as two models under one condition should."""
    return all(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, second, strict=True))


__all__ = ["Side", "needle_conversations", "read_drift"]
