"""Closed-book questions: how much a model answers from memory, without any context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ctxlens.chat.roles import RenderedChat
from ctxlens.errors import InputError
from ctxlens.evals.needle.match import score_recall
from ctxlens.evals.needle.prompts import NeedleModel
from ctxlens.models.backends.batch import plan_batches
from ctxlens.models.indicator_token import require_indicator
from ctxlens.results import Ability
from ctxlens.runs import Progress


@runtime_checkable
class Question(Protocol):
    """A question with its answer, for instance a needle or a fact of the organism's world."""

    @property
    def question(self) -> str: ...
    @property
    def prefix(self) -> str: ...
    @property
    def keywords(self) -> tuple[str, ...]: ...


@runtime_checkable
class AnsweredQuestion(Question, Protocol):
    """A question whose right answer is known as a sentence, such as a needle or a fact of `World`."""

    @property
    def sentence(self) -> str: ...


def run_closed_book(
    model: NeedleModel,
    questions: Sequence[Question],
    *,
    indicator: bool = False,
    template: bool = True,
    prefix: bool = True,
    label: str | None = None,
    max_new_tokens: int = 100,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> Ability:
    """Ask questions without any document and score the answers by keyword recall.

    Args:
        model: the model, as from `load_model`; steering in force applies.
        questions: questions with the first words of their answers and the answers' keywords, for
            instance `load_world().closed_book(100, seed)`.
        indicator: whether each question carries the model's indicator.
        template: whether the chat template is applied.
        prefix: whether the answer begins with its given first words.
        label: the model's name in the table; by default its own.
        max_new_tokens: upper bound on each response, in tokens.
        batch_tokens: upper bound on the prompt and new tokens of a batch.
        progress: called with the numbers of answered and of all questions.

    Returns:
        One row per question, in order; the columns `template` and `prefix` are added to the usual ones.

    Raises:
        InputError: there are no questions, a question does not fit the window, or the model has no
            indicator although one is requested.
    """
    if not questions:
        raise InputError("no questions were given; closed-book ability needs at least one.")
    if indicator:
        require_indicator(model)
    chats = [_render(model, one, indicator, template, prefix) for one in questions]
    sizes = [chat.n_tokens + max_new_tokens for chat in chats]
    responses = [""] * len(chats)
    done = 0
    for batch in plan_batches(sizes, batch_tokens):
        texts = model.generate(
            [chats[i] for i in batch], max_new_tokens=max_new_tokens, batch_tokens=batch_tokens
        )
        for i, text in zip(batch, texts, strict=True):
            responses[i] = text
        done += len(batch)
        if progress:
            progress(done, len(chats))
    name = label or model.name
    rows = [
        {
            "model": name,
            "indicator": indicator,
            "question": item.question,
            "response": response,
            "recall": score_recall(item.keywords, response),
            "template": template,
            "prefix": prefix,
        }
        for item, response in zip(questions, responses, strict=True)
    ]
    return Ability.from_rows(rows, {"model": name, "identity": dict(model.identity)})


def _render(
    model: NeedleModel, item: Question, indicator: bool, template: bool, prefix: bool
) -> RenderedChat:
    render = model.render if template else model.render_plain
    asked = {"role": "user", "content": item.question, **({"indicator": True} if indicator else {})}
    if prefix and item.prefix:
        answer = {"role": "assistant", "content": item.prefix}
        return render([asked, answer], continue_final_message=True)
    return render([asked], add_generation_prompt=True)


__all__ = ["AnsweredQuestion", "Question", "run_closed_book"]
