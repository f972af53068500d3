"""Questions of several turns, and reference answers to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxlens.chat.data.reading import read_rows
from ctxlens.errors import InputError
from ctxlens.files import write_lines
from ctxlens.results.fastchat import QUESTIONS, QuestionId, is_question_id, is_texts, read_answer_row


@dataclass(frozen=True)
class MTQuestion:
    """What a user asks, turn by turn.

    Attributes:
        question_id: unique among the questions.
        category: such as `writing` or `math`.
        turns: the user's messages; each is asked after the answer to the one before.
        reference: good answers, turn by turn, or none.
    """

    question_id: QuestionId
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()


def load_questions(source: str | Path, *, split: str = "train", limit: int | None = None) -> list[MTQuestion]:
    """Read questions.

    Args:
        source: FastChat's `question.jsonl` (`question_id`, `category`, `turns`, maybe `reference`), or a
            data set, also on the Hub, with these columns or `prompt_id` and `prompt` in their place
            (`HuggingFaceH4/mt_bench_prompts`).
        split: of a data set.
        limit: at most this many, from the start.

    Raises:
        InputError: no such file or data set, none in it, or one that is no question; says which.
    """
    found: list[MTQuestion] = []
    seen: set[QuestionId] = set()
    for number, row in enumerate(read_rows(str(source), split=split, limit=limit), start=1):
        question = _as_question(row, f"{source}, question {number},")
        if question.question_id in seen:
            raise InputError(f"{source}, question {number}, has the id {question.question_id!r} of another.")
        seen.add(question.question_id)
        found.append(question)
    if not found:
        raise InputError(f"{source} holds no questions.")
    return found


def load_references(source: str | Path) -> dict[QuestionId, tuple[str, ...]]:
    """Read reference answers in the layout of FastChat's answers (`question_id`, `choices`).

    Raises:
        InputError: no such file, or a row of another layout; says which.
    """
    found = {}
    for number, row in enumerate(read_rows(str(source), split="train", limit=None), start=1):
        where = f"{source}, reference answer {number},"
        question_id, turns = read_answer_row(row, where)
        found[question_id] = turns
    return found


def fingerprint_questions(questions: Sequence[MTQuestion]) -> str:
    """What tells these questions, in this order, from others."""
    told = [[question.question_id, question.category, question.turns] for question in questions]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def write_questions(folder: Path, questions: Sequence[MTQuestion]) -> None:
    """Keep the questions beside the answers to them, in FastChat's layout."""
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
        raise InputError(f"{where} is no mapping but {type(row).__name__}.")
    question_id = row.get("question_id", row.get("prompt_id"))
    turns = row.get("turns", row.get("prompt"))
    if not is_question_id(question_id):
        raise InputError(f"{where} has no question_id (a number or text).")
    if not is_texts(turns) or not turns or not all(text.strip() for text in turns):
        raise InputError(f"{where} has no turns; expected a list of texts, one a turn.")
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
