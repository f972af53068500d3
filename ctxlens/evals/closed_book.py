"""General ability: questions that need no context, asked without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from ctxlens.errors import InputError
from ctxlens.evals.needle.match import score_recall
from ctxlens.evals.needle.prompts import NeedleModel
from ctxlens.models.backends.batch import plan_batches
from ctxlens.models.indicator_token import require_indicator
from ctxlens.results import Ability


@runtime_checkable
class Question(Protocol):
    """A question with its answer; needles and facts of the organism's world are such."""

    @property
    def question(self) -> str: ...
    @property
    def prefix(self) -> str: ...
    @property
    def keywords(self) -> tuple[str, ...]: ...


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
    progress: Callable[[int, int], None] | None = None,
) -> Ability:
    """Ask questions without any document and score the answers by keyword recall.

    Args:
        model: the model, as from `load_model`; steering in force applies.
        questions: questions with the first words of their answers and the answers' keywords, for
            instance `load_world().closed_book(100, seed)`.
        indicator: whether each question carries the model's indicator.
        template: whether the chat template is applied.
        prefix: whether the answer's first words are put into the model's mouth.
        label: the model's name in the table; its own by default.
        max_new_tokens: the longest response, in tokens.
        batch_tokens: how many prompt and new tokens are worked on at once.
        progress: called with the numbers of answered and of all questions.

    Returns:
        One row a question, in their order, with the columns `template` and `prefix` beside the usual.

    Raises:
        InputError: no questions, a question that does not fit the window, or an indicator is asked of a
            model that has none.
    """
    if not questions:
        raise InputError("no questions were given; closed-book ability needs at least one.")
    if indicator:
        require_indicator(model)
    render = model.render if template else model.render_plain
    mark = {"indicator": True} if indicator else {}
    chats = []
    for item in questions:
        asked = {"role": "user", "content": item.question, **mark}
        if prefix and item.prefix:
            answer = {"role": "assistant", "content": item.prefix}
            chats.append(render([asked, answer], continue_final_message=True))
        else:
            chats.append(render([asked], add_generation_prompt=True))
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


__all__ = ["Question", "run_closed_book"]
