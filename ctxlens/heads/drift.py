"""Attention drift: role shares of the same conversations, read from two models or in two conditions.

The paper's Figures 3 to 5 compare such shares: with and without template, before and after fine-tuning, with
and without indicator. Here every difference is paired by conversation and has an interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from ctxlens.chat.condition import Condition
from ctxlens.chat.data.annotate import mark_last_question
from ctxlens.chat.roles import RenderedChat
from ctxlens.chat.roles.left_out import count_left_out
from ctxlens.errors import InputError
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.defaults import Texts, choose_texts
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.prompts import Cell, word_question
from ctxlens.heads import find_retrieval_heads
from ctxlens.models import Model
from ctxlens.models.allocate import open_model
from ctxlens.models.asking import Given, list_conversations
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


@dataclass(frozen=True)
class Comparison:
    """Two sides and the conversations that both are asked.

    Attributes:
        first, second: the sides.
        conversations: lists of messages.
        contexts: which text each conversation is made from; None: each its own.
        options: options of rendering.
        texts: the texts that were chosen because no conversations were given; otherwise None.
    """

    first: Side
    second: Side
    conversations: Sequence[Messages]
    contexts: Int[np.ndarray, " conversation"] | None
    options: Mapping[str, Any]
    texts: Texts | None = None

    def read(self, queries: str = "first_answer", progress: Progress | None = None) -> Drift:
        """Read the role shares of both sides."""
        return read_drift(
            self.first, self.second, self.conversations, queries=queries, contexts=self.contexts,
            render_options=self.options, progress=progress,
        )  # fmt: skip


def plan_comparison(
    model: Model,
    against: Model | None = None,
    conversations: Sequence[Messages] | None = None,
    *,
    conditions: str | Sequence[str | Condition] | None = None,
    limit: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Comparison:
    """Choose the sides and the conversations of a comparison; see `drift`."""
    words = parse_sides(conditions, two_models=against is not None)
    sides = Side(model, words[0]), Side(model if against is None else against, words[1])
    if conversations is not None:
        return Comparison(*sides, conversations[:limit], None, options)
    texts = choose_texts(model.name)
    asked, contexts = _ask_needles(model, texts, seed, limit)
    return Comparison(*sides, asked, contexts, {**options, "continue_final_message": True}, texts)


def parse_sides(
    conditions: str | Sequence[str | Condition] | None, *, two_models: bool
) -> tuple[Condition, Condition]:
    """The conditions of both sides, which may be the same.

    Args:
        conditions: two conditions, or a text with a comma between them. By default `plain,template` for one
            model and `template,template` for two.
        two_models: whether the sides are two models.

    Raises:
        InputError: there are not exactly two, or one is not a condition.
    """
    if conditions is None:
        conditions = "template,template" if two_models else "plain,template"
    words = conditions.split(",") if isinstance(conditions, str) else list(conditions)
    if len(words) != 2:
        raise InputError(f"a comparison needs two conditions, such as plain,template; got {conditions!r}.")
    return Condition.parse(words[0]), Condition.parse(words[1])


def drift(
    model: Model | str | Path,
    against: Model | str | Path | None = None,
    messages: Given | Any | None = None,
    *,
    conditions: str | Sequence[str | Condition] | None = None,
    queries: str = "first_answer",
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Drift:
    """Compare attention by role between two models or two conditions, with paired differences.

    ```python
    import ctxlens as cl

    found = cl.drift("organism-chat", messages=["Who is the mayor of Oakford?", "Where is Oakford?"])
    assert found.sides == ("organism-chat, plain", "organism-chat, template")
    ```

    Args:
        model: the first side: a model, or what `load_model` takes.
        against: the second side; by default the same model under another condition.
        messages: conversations, as in `allocate`. By default needle cells: of the built-in world for the
            built-in model, otherwise neutral ones.
        conditions: the conditions of the first and the second side: `plain` or `template`, then `+indicator`
            as needed. By default `plain,template` for one model and `template,template` for two.
        queries: `first_answer` or `response_mean`.
        limit: use only the first conversations.
        seed: seed of the needle cells.
        progress: called with the number of finished readings and the total.
        **options: options of `ctxlens.render`, such as `truncate=True`.

    Raises:
        InputError: see `read_drift`.
    """
    parse_sides(conditions, two_models=against is not None)
    asked = None if messages is None else list_conversations(messages)[0]
    if any(isinstance(one, RenderedChat) for one in asked or ()):
        raise InputError("each side renders the conversations itself; give messages, not rendered ones.")
    lm = open_model(model)
    other = None if against is None else open_model(against)
    planned = plan_comparison(lm, other, asked, conditions=conditions, limit=limit, seed=seed, **options)
    return planned.read(queries, progress)


def compare(
    first: Model | str | Path, second: Model | str | Path, messages: Given | Any, **options: Any
) -> Drift:
    """Compare the attention by role of two models on the same conversations, with paired differences.

    The result holds the second model's shares beside the first one's. Both are asked with their chat
    template; give `conditions` for anything else.

    ```python
    import ctxlens as cl

    found = cl.compare("organism", "organism-chat", "Who is the mayor of Oakford?")
    print(found.difference("user").values.round(2))
    ```

    Args:
        first: the model that the second one is compared with, or what `load_model` takes.
        second: the other model.
        messages: conversations, as in `allocate`.
        **options: further arguments of `drift`.

    Raises:
        InputError: see `read_drift`.
    """
    return drift(first, second, messages, **options)


def _ask_needles(
    model: Model, texts: Texts, seed: int, limit: int | None
) -> tuple[list[list[dict[str, Any]]], Int[np.ndarray, " conversation"]]:
    """Needle cells of the default texts as conversations, and the number of the text of each."""
    config = NeedleConfig(
        lengths=4, depths=(10.0, 50.0, 90.0), needles=(texts.needles,), cases_per_cell=2, max_new_tokens=30,
        seed=seed,
    )  # fmt: skip
    cells = build_cells(model, config, load_haystack(texts.haystack, seed=seed))
    return needle_conversations(cells[:limit], config)


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


__all__ = [
    "Comparison", "Side", "compare", "drift", "needle_conversations", "parse_sides", "plan_comparison",
    "read_drift",
]  # fmt: skip
