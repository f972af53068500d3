"""A model's answers, turn by turn, written as they come in the layout that FastChat's tools read."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ctxlens.chat.roles import RenderedChat
from ctxlens.errors import InputError, RenderError, RunExistsError
from ctxlens.evals.mt_bench.questions import MTQuestion
from ctxlens.files import append_lines, read_lines, write_atomic, write_lines
from ctxlens.results.fastchat import QuestionId, read_answer_row

CHUNK = 16
"""Questions that are answered before the answers are written."""

_UNSAFE = re.compile(r"[^\w.+@=-]+")


@runtime_checkable
class Answerer(Protocol):
    """What answering needs of a model; `ctxlens.models.Model` has it."""

    @property
    def name(self) -> str: ...
    @property
    def indicator(self) -> str | None: ...
    @property
    def n_ctx(self) -> int: ...
    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedChat: ...
    def generate(self, chats: Any, *, max_new_tokens: int = ..., batch_tokens: int = ...) -> Any: ...


def answers_path(folder: Path, model_id: str) -> Path:
    """Where a model's answers stand in a folder of FastChat's layout."""
    return folder / "model_answer" / f"{model_id}.jsonl"


def make_label(model: str, *, indicator: bool = False, alpha: float = 1.0, heads: str = "all") -> str:
    """A name for a model under a condition that can be a file's."""
    name = _UNSAFE.sub("_", Path(model).name).lstrip(".") or "model"
    steered = f"+alpha{alpha:g}" + (f"@{_UNSAFE.sub('_', heads)}" if heads != "all" else "")
    return name + ("+indicator" if indicator else "") + (steered if alpha != 1 else "")


def check_label(label: str) -> str:
    """The label itself.

    Raises:
        InputError: it cannot be a file's name.
    """
    if not label or _UNSAFE.search(label) or label.startswith("."):
        raise InputError(
            f"{label!r} cannot be a model's label, which is a file's name; use letters, digits, .+@=-_ only."
        )
    return label


def record_settings(folder: Path, model_id: str, settings: Mapping[str, Any]) -> None:
    """Write down what a model's answers come from, once.

    Raises:
        RunExistsError: there are answers of this name that come from something else.
    """
    path = folder / "models" / f"{model_id}.json"
    wanted = json.loads(json.dumps(settings, default=str))
    if not path.is_file():
        if answers_path(folder, model_id).is_file():
            raise RunExistsError(
                f"{answers_path(folder, model_id)} was not written by this command; choose another --label."
            )
        write_atomic(path, json.dumps(wanted, indent=2))
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it and the answers beside it.") from error
    if found != wanted:
        keys = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
        raise RunExistsError(
            f"{folder} already holds answers of {model_id} with other settings "
            f"({', '.join(keys) or 'more'}); choose another --label or folder."
        )


def answer_questions(
    model: Answerer,
    questions: Sequence[MTQuestion],
    *,
    path: Path,
    model_id: str,
    indicator: bool = False,
    max_new_tokens: int = 1024,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Let a model answer, greedily and with its chat template; what is in the file is not asked again.

    Steering in force applies. Each turn is asked with the model's own answers to the turns before. A
    conversation that leaves too little room in the window is cut in the middle of its context.

    Args:
        model: the model, as from `load_model`.
        questions: what is asked.
        path: the file of answers; it grows by `CHUNK` questions at a time.
        model_id: the model's name in it.
        indicator: whether the message that is being answered carries the model's indicator (earlier
            ones of the conversation do not: so the chat template's own switch has it, too).
        max_new_tokens: the longest answer, in tokens; no more than half of the window.
        batch_tokens: how many prompt and new tokens are worked on at once.
        progress: called with the numbers of answered and of all questions.

    Returns:
        One row a question, in their order: `question_id`, `answer_id`, `model_id`, `choices` (one, with its
        `turns`) and `tstamp` as FastChat has them, and `truncated`, one entry a turn.

    Raises:
        InputError: an indicator is asked of a model that has none, a file of something else, or a question
            that the template refuses.
    """
    if indicator and model.indicator is None:
        raise InputError(f"{model.name} has no indicator token; train it with one, or ask without.")
    known = read_answers(path)
    for question in questions:
        if question.question_id in known and len(known[question.question_id]["choices"][0]["turns"]) != len(
            question.turns
        ):
            raise InputError(f"{path} answers another question {question.question_id}; choose another file.")
    left = [question for question in questions if question.question_id not in known]
    done = len(questions) - len(left)
    if progress:
        progress(done, len(questions))
    room = max(1, min(max_new_tokens, model.n_ctx // 2))
    for start in range(0, len(left), CHUNK):
        chunk = left[start : start + CHUNK]
        rows = _answer_chunk(model, chunk, model_id, indicator, room, batch_tokens)
        append_lines(path, rows)
        known |= {row["question_id"]: row for row in rows}
        done += len(chunk)
        if progress:
            progress(done, len(questions))
    ordered = [known.pop(question.question_id) for question in questions]
    if left:
        write_lines(path, [*ordered, *known.values()])
    return ordered


def read_answers(path: Path) -> dict[QuestionId, dict[str, Any]]:
    """A file's answers by question; of several to one question the last. None if there is no file.

    Raises:
        InputError: a row of another layout; says which.
    """
    found = {}
    for number, row in enumerate(read_lines(path), start=1):
        question_id, _ = read_answer_row(row, f"{path}, row {number},")
        found[question_id] = row
    return found


def read_all_answers(folder: Path) -> dict[str, dict[QuestionId, dict[str, Any]]]:
    """The answers of every model in a folder of FastChat's layout, by model (the name of its file)."""
    paths = sorted((folder / "model_answer").glob("*.jsonl"), key=lambda path: path.stem)
    return {path.stem: read_answers(path) for path in paths}


def count_answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many answers there are (`turns`), how many are empty, and how many to a prompt that was cut."""
    turns = [text for row in rows for text in row["choices"][0]["turns"]]
    cut = [one for row in rows for one in row.get("truncated", ()) if one]
    return {"turns": len(turns), "empty": sum(not text.strip() for text in turns), "truncated": len(cut)}


def _answer_chunk(
    model: Answerer,
    questions: Sequence[MTQuestion],
    model_id: str,
    indicator: bool,
    room: int,
    batch_tokens: int,
) -> list[dict[str, Any]]:
    said: list[list[str]] = [[] for _ in questions]
    cut: list[list[bool]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [i for i, question in enumerate(questions) if len(question.turns) > turn]
        chats = [_render(model, questions[i], said[i], indicator, room) for i in asked]
        texts = model.generate(chats, max_new_tokens=room, batch_tokens=batch_tokens)
        for i, chat, text in zip(asked, chats, texts, strict=True):
            said[i].append(text)
            cut[i].append(chat.truncated is not None)
    return [
        {
            "question_id": question.question_id,
            "answer_id": _make_id(model_id, question, turns),
            "model_id": model_id,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
            "truncated": flags,
        }
        for question, turns, flags in zip(questions, said, cut, strict=True)
    ]


def _render(
    model: Answerer, question: MTQuestion, said: Sequence[str], indicator: bool, room: int
) -> RenderedChat:
    messages: list[dict[str, Any]] = []
    for text, answer in zip(question.turns, said, strict=False):
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    mark = {"indicator": True} if indicator else {}
    messages.append({"role": "user", "content": question.turns[len(said)], **mark})
    try:
        return model.render(
            messages,
            add_generation_prompt=True,
            max_tokens=model.n_ctx - room,
            truncate=True,
            truncation="middle",
        )
    except InputError as error:
        kind = RenderError if isinstance(error, RenderError) else InputError
        raise kind(f"question {question.question_id}, turn {len(said) + 1}: {error}") from error


def _make_id(model_id: str, question: MTQuestion, turns: Sequence[str]) -> str:
    """Of the same answer always the same, as long as FastChat's."""
    told = json.dumps([model_id, question.question_id, question.turns, list(turns)])
    return hashlib.sha256(told.encode()).hexdigest()[:22]


__all__ = [
    "CHUNK", "Answerer", "answer_questions", "answers_path", "check_label", "count_answers", "make_label",
    "read_all_answers", "read_answers", "record_settings",
]  # fmt: skip
