"""Questions of several turns, and reference answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxlens.chat.data.given_rows import Source, describe_source
from ctxlens.chat.data.reading import read_rows
from ctxlens.errors import InputError
from ctxlens.files import write_lines
from ctxlens.results.fastchat import QUESTIONS, QuestionId, is_question_id, is_texts, read_answer_row
from ctxlens.runs import digest


@dataclass(frozen=True)
class MTQuestion:
    """A question of several turns.

    Attributes:
        question_id: unique among the questions.
        category: such as `writing` or `math`.
        turns: the user's messages; each is asked after the answer to the one before.
        reference: a good answer to each turn; empty if there are none.
    """

    question_id: QuestionId
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()


def load_questions(source: Source, *, split: str = "train", limit: int | None = None) -> list[MTQuestion]:
    """Read questions.

    Args:
        source: FastChat's `question.jsonl` (`question_id`, `category`, `turns`, maybe `reference`), or a
            data set, also on the Hub or in memory (see `load_conversations`), with these columns or with
            `prompt_id` and `prompt` instead (`HuggingFaceH4/mt_bench_prompts`).
        split: the split of a data set.
        limit: read at most this many, from the start.

    Raises:
        InputError: there is no such file or data set, it holds no questions, or a row is not a question; the
            message names the row.
    """
    found: list[MTQuestion] = []
    name = describe_source(source)
    seen: set[QuestionId] = set()
    for number, row in enumerate(read_rows(source, split=split, limit=limit), start=1):
        question = _as_question(row, f"{name}, question {number},")
        if question.question_id in seen:
            raise InputError(
                f"{name}, question {number}, has the id {question.question_id!r} of another question; "
                "ids must be unique."
            )
        seen.add(question.question_id)
        found.append(question)
    if not found:
        raise InputError(f"{name} holds no questions.")
    return found


def load_references(source: Source) -> dict[QuestionId, tuple[str, ...]]:
    """Read reference answers in the layout of FastChat's answers (`question_id`, `choices`).

    Raises:
        InputError: there is no such file, or a row has another layout; the message names the row.
    """
    found = {}
    for number, row in enumerate(read_rows(source, split="train", limit=None), start=1):
        where = f"{describe_source(source)}, reference answer {number},"
        question_id, turns = read_answer_row(row, where)
        found[question_id] = turns
    return found


def fingerprint_questions(questions: Sequence[MTQuestion]) -> str:
    """A digest of these questions in this order."""
    return digest([[question.question_id, question.category, question.turns] for question in questions])


def write_questions(folder: Path, questions: Sequence[MTQuestion]) -> None:
    """Write the questions into the folder of their answers, in FastChat's layout."""
    write_lines(
        folder / QUESTIONS,
        [
            {"question_id": question.question_id, "category": question.category, "turns": question.turns}
            | ({"reference": question.reference} if question.reference else {})
            for question in questions
        ],
    )


def _as_question(row: Any, where: str) -> MTQuestion:
    if not isinstance(row, Mapping):
        raise InputError(f"{where} must be a mapping, got {type(row).__name__}.")
    question_id = row.get("question_id", row.get("prompt_id"))
    turns = row.get("turns", row.get("prompt"))
    if not is_question_id(question_id):
        raise InputError(f"{where} has no question_id (a number or text).")
    if not is_texts(turns) or not turns or not all(text.strip() for text in turns):
        raise InputError(f"{where} has no turns; expected a list of texts, one per turn.")
    category, reference = row.get("category"), row.get("reference")
    return MTQuestion(
        question_id,
        category if isinstance(category, str) and category else "general",
        tuple(turns),
        tuple(reference) if is_texts(reference) else (),
    )


__all__ = [
    "MTQuestion", "fingerprint_questions", "load_questions", "load_references", "write_questions",
]  # fmt: skip
