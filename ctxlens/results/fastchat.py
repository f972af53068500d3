"""Answers to MT-Bench and judgments of them, read from files in FastChat's layout.

A folder in that layout holds `question.jsonl`, `model_answer/MODEL.jsonl` and
`model_judgment/JUDGE_single.jsonl`; files that other tools have written are read as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

from ctxlens.errors import InputError
from ctxlens.files import read_lines
from ctxlens.results.ratings import Ratings
from ctxlens.results.tables import _Table

QUESTIONS = "question.jsonl"
NO_RATING = -1
"""The score of a judgment without rating; FastChat's `show_result` leaves it out."""

QuestionId = int | str


@dataclass(frozen=True)
class Question:
    """The user's messages, turn by turn, and the category of the question."""

    category: str
    turns: tuple[str, ...] = ()


Questions = Mapping[str, Question]
"""Questions by their id; ids are text, as in tables."""


@dataclass(frozen=True, repr=False)
class Dialogues(_Table):
    """Models' answers to questions of several turns, one row per answer.

    Columns: `model`, `question_id`, `category`, `turn` (from 1), `asked` (empty if the question is not
    known), `answer`, `truncated` (the prompt was truncated to the window), `cut` (1: the answer was cut off
    at its longest, 0: it was not, NaN: the file does not say).
    """

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "model", "question_id", "category", "turn", "asked", "answer", "truncated", "cut",
    )  # fmt: skip

    @property
    def models(self) -> list[str]:
        """The models, in the order of the rows."""
        return list(dict.fromkeys(self.frame["model"]))


def read_questions(path: Path) -> dict[str, Question]:
    """Read the questions of a file; empty if there is no file.

    Raises:
        InputError: a row has another layout; the message names the row.
    """
    found = {}
    for number, row in enumerate(read_lines(path), start=1):
        question_id, turns, category = row.get("question_id"), row.get("turns"), row.get("category")
        if not is_question_id(question_id) or not is_texts(turns):
            raise InputError(
                f"{path}, row {number}, is not a question in FastChat's layout; expected question_id and "
                "turns."
            )
        kind = category if isinstance(category, str) and category else "general"
        found[str(question_id)] = Question(kind, tuple(turns))
    return found


def read_dialogues(path: Path, questions: Questions) -> Dialogues:
    """Read a model's answers; the model is called like the file, and a question's last answer counts.

    Raises:
        InputError: a row has another layout; the message names the row.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(read_lines(path), start=1):
        question_id, turns = read_answer_row(row, f"{path}, row {number},")
        key = str(question_id)
        question = questions.get(key, Question("general"))
        truncated, cut = (_as_list(row.get(name)) for name in ("truncated", "cut"))
        rows[key] = [
            {
                "model": path.stem, "question_id": key, "category": question.category, "turn": turn,
                "asked": "".join(question.turns[turn - 1 : turn]), "answer": text,
                "truncated": any(truncated[turn - 1 : turn]),
                "cut": float(bool(cut[turn - 1])) if len(cut) >= turn else math.nan,
            }
            for turn, text in enumerate(turns, start=1)
        ]  # fmt: skip
    ordered = [*(key for key in questions if key in rows), *(key for key in rows if key not in questions)]
    return Dialogues.from_rows([row for key in ordered for row in rows[key]])


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def read_ratings(path: Path, questions: Questions) -> dict[str, Ratings]:
    """Read the ratings of each judge in a file, with the additional column `judgment`: the judge's reply.

    If an answer has several judgments, the latest counts.

    Raises:
        InputError: a row has another layout; the message names the row.
    """
    found: dict[str, dict[tuple[str, str, int], dict[str, Any]]] = {}
    for number, row in enumerate(read_lines(path), start=1):
        try:
            rated = _read_judgment(row, questions)
            judge = str(row["judge"][0])
        except (KeyError, ValueError, TypeError, IndexError):
            raise InputError(f"{path}, row {number}, is not a judgment in FastChat's layout.") from None
        of_judge = found.setdefault(judge, {})
        key = (rated["model"], rated["question_id"], rated["turn"])
        if key not in of_judge or of_judge[key]["tstamp"] <= rated["tstamp"]:
            of_judge[key] = rated
    places = {question_id: place for place, question_id in enumerate(questions)}

    def order(row: Mapping[str, Any]) -> tuple[str, int, int]:
        return row["model"], places.get(row["question_id"], len(places)), row["turn"]

    return {
        judge: Ratings.from_rows(sorted(rows.values(), key=order), {"judge": judge})
        for judge, rows in found.items()
    }


def read_answer_row(row: Any, where: str) -> tuple[QuestionId, tuple[str, ...]]:
    """Read question id and turns of the first choice from a row in the layout of FastChat's answers.

    Raises:
        InputError: the row has another layout; the message begins with `where`.
    """
    question_id = row.get("question_id") if isinstance(row, Mapping) else None
    try:
        turns = row["choices"][0]["turns"]
    except (KeyError, IndexError, TypeError):
        turns = None
    if not is_question_id(question_id) or not is_texts(turns):
        raise InputError(
            f"{where} is not an answer in FastChat's layout; expected question_id and choices with turns."
        )
    return question_id, tuple(turns)


def is_question_id(value: Any) -> TypeGuard[QuestionId]:
    """Whether a value can be a question's id: a whole number or a text that is not empty."""
    return isinstance(value, int | str) and not isinstance(value, bool) and value != ""


def is_texts(value: Any) -> TypeGuard[list[str]]:
    """Whether a value is a list of texts."""
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _read_judgment(row: Mapping[str, Any], questions: Questions) -> dict[str, Any]:
    score, question_id = float(row["score"]), str(row["question_id"])
    known = math.isfinite(score) and score != NO_RATING
    return {
        "model": str(row["model"]),
        "question_id": question_id,
        "category": questions.get(question_id, Question("general")).category,
        "turn": int(row["turn"]),
        "score": score if known else math.nan,
        "error": "" if known else str(row.get("error") or "the judge gave no rating"),
        "judgment": str(row.get("judgment") or ""),
        "tstamp": float(row.get("tstamp") or 0.0),
    }


__all__ = [
    "NO_RATING", "QUESTIONS", "Dialogues", "Question", "QuestionId", "Questions", "is_question_id",
    "is_texts", "read_answer_row", "read_dialogues", "read_questions", "read_ratings",
]  # fmt: skip
