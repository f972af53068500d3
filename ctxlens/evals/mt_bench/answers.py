"""A model's answers, turn by turn, written in the layout that FastChat's tools read."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ctxlens.chat.condition import Condition
from ctxlens.chat.data.annotate import mark_last_question
from ctxlens.chat.roles import RenderedChat
from ctxlens.errors import InputError, RenderError, RunExistsError
from ctxlens.evals.mt_bench.questions import MTQuestion
from ctxlens.files import append_lines, read_lines, write_atomic, write_lines
from ctxlens.models.indicator_token import require_indicator
from ctxlens.results.fastchat import QuestionId, read_answer_row
from ctxlens.runs import Progress

CHUNK = 16
"""Number of questions that are answered before the answers are written."""

_UNSAFE = re.compile(r"[^\w.+@=-]+")


@runtime_checkable
class Answerer(Protocol):
    """What a model needs in order to answer; `ctxlens.models.Model` is one."""

    @property
    def name(self) -> str: ...
    @property
    def indicator(self) -> str | None: ...
    @property
    def n_ctx(self) -> int: ...
    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedChat: ...
    def generate(
        self,
        chats: Any,
        *,
        max_new_tokens: int = ...,
        batch_tokens: int = ...,
        on_cut: Callable[[int], None] | None = ...,
    ) -> Any: ...


def answers_path(folder: Path, model_id: str) -> Path:
    """The file of a model's answers in a folder of FastChat's layout."""
    return folder / "model_answer" / f"{model_id}.jsonl"


def make_label(model: str, condition: Condition, folder: Path | None = None) -> str:
    """Name a model under a condition so that the name can be a file's.

    The label is the last part of the model's name, followed by the condition's name. `template` is left out,
    because MT-Bench is always asked with the chat template. Characters that a label may not have become `_`:
    `M-7B+indicator`, `M-7B+steered_0.1`.

    Args:
        model: folder, Hub id or name of the model.
        condition: how it is asked.
        folder: a folder in FastChat's layout. If it holds answers under the label that earlier versions gave
            the same model and condition (`M-7B+alpha0.1`), that label is returned.
    """
    name = _UNSAFE.sub("_", Path(model).name).lstrip(".") or "model"
    label = name + _UNSAFE.sub("_", condition.name.removeprefix("template"))
    if folder is not None and condition.alpha is not None:
        indicator = "+indicator" if condition.indicator else ""
        heads = "" if condition.heads == "all" else f"@{_UNSAFE.sub('_', condition.heads)}"
        earlier = f"{name}{indicator}+alpha{condition.alpha:g}{heads}"
        if answers_path(folder, earlier).is_file():
            return earlier
    return label


def check_label(label: str) -> str:
    """Return the label if it can be the name of a file.

    Raises:
        InputError: it cannot.
    """
    if not label or _UNSAFE.search(label) or label.startswith("."):
        raise InputError(
            f"{label!r} cannot be a model's label, because the label names a file; use only letters, digits "
            "and .+@=-_, and no point at the start."
        )
    return label


def record_settings(folder: Path, model_id: str, settings: Mapping[str, Any]) -> None:
    """Record the settings that a model's answers come from; the same settings may be recorded again.

    Raises:
        RunExistsError: there are answers under this name with other settings, or with none recorded.
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
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Let a model answer questions, greedily and with its chat template.

    Questions that the file already answers are not asked again. Each turn is asked with the model's own
    answers to the turns before it, under the steering that is in force. A conversation that leaves too little
    room in the window is truncated in the middle of its context.

    Args:
        model: the model, as from `load_model`.
        questions: what is asked.
        path: the file of answers; it grows by `CHUNK` questions at a time.
        model_id: the model's name in the file.
        indicator: whether the message that is being answered carries the model's indicator. Earlier messages
            of the conversation do not carry it, as with the chat template's own switch.
        max_new_tokens: upper bound on the tokens of an answer; half of the window, if that is less.
        batch_tokens: upper bound on the prompt and new tokens in one batch.
        progress: called with the numbers of answered and of all questions.

    Returns:
        One row per question, in their order: `question_id`, `answer_id`, `model_id`, `choices` (one, with its
        `turns`) and `tstamp` in FastChat's layout. Two more lists have one entry per turn: `truncated` (the
        prompt was truncated) and `cut` (the answer was cut off at its longest).

    Raises:
        InputError: the indicator is asked for and the model has none, the file answers other questions, or
            the template refuses a question.
    """
    if indicator:
        require_indicator(model)
    known = read_answers(path)
    _check_same_questions(path, known, questions)
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


def _check_same_questions(
    path: Path, known: Mapping[QuestionId, Mapping[str, Any]], questions: Sequence[MTQuestion]
) -> None:
    """Raise `InputError` if a kept answer has another number of turns than its question."""
    for question in questions:
        answer = known.get(question.question_id)
        if answer is not None and len(answer["choices"][0]["turns"]) != len(question.turns):
            raise InputError(f"{path} answers another question {question.question_id}; choose another file.")


def read_answers(path: Path) -> dict[QuestionId, dict[str, Any]]:
    """The answers in a file by question; if a question has several, the last one. Empty if there is no file.

    Raises:
        InputError: a row has another layout; the message names the row.
    """
    found = {}
    for number, row in enumerate(read_lines(path), start=1):
        question_id, _ = read_answer_row(row, f"{path}, row {number},")
        found[question_id] = row
    return found


def read_all_answers(folder: Path) -> dict[str, dict[QuestionId, dict[str, Any]]]:
    """The answers of every model in a folder of FastChat's layout; a model is called like its file."""
    paths = sorted((folder / "model_answer").glob("*.jsonl"), key=lambda path: path.stem)
    return {path.stem: read_answers(path) for path in paths}


def count_answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """Numbers of answers (`turns`), of empty and cut answers, and of answers to a truncated prompt.

    `cut` is None if no row says which answers were cut, as in files of other tools.
    """
    turns = [text for row in rows for text in row["choices"][0]["turns"]]
    truncated = [one for row in rows for one in row.get("truncated", ()) if one]
    cut = [one for row in rows for one in row.get("cut", ())]
    return {
        "turns": len(turns),
        "empty": sum(not text.strip() for text in turns),
        "truncated": len(truncated),
        "cut": sum(map(bool, cut)) if cut else None,
    }


def _answer_chunk(
    model: Answerer,
    questions: Sequence[MTQuestion],
    model_id: str,
    indicator: bool,
    room: int,
    batch_tokens: int,
) -> list[dict[str, Any]]:
    """The rows of several questions, asked together turn by turn."""
    said: list[list[str]] = [[] for _ in questions]
    truncated: list[list[bool]] = [[] for _ in questions]
    cut: list[list[bool]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [i for i, question in enumerate(questions) if len(question.turns) > turn]
        chats = [_render(model, questions[i], said[i], indicator, room) for i in asked]
        reached: set[int] = set()
        texts = model.generate(chats, max_new_tokens=room, batch_tokens=batch_tokens, on_cut=reached.add)
        for at, (i, chat, text) in enumerate(zip(asked, chats, texts, strict=True)):
            said[i].append(text)
            truncated[i].append(chat.truncated is not None)
            cut[i].append(at in reached)
    return [
        {
            "question_id": question.question_id,
            "answer_id": _make_id(model_id, question, turns),
            "model_id": model_id,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
            "truncated": truncated[i],
            "cut": cut[i],
        }
        for i, (question, turns) in enumerate(zip(questions, said, strict=True))
    ]


def _render(
    model: Answerer, question: MTQuestion, said: Sequence[str], indicator: bool, room: int
) -> RenderedChat:
    """The conversation up to the turn that comes next, shortened so that `room` tokens are free."""
    messages: list[dict[str, Any]] = []
    for text, answer in zip(question.turns, said, strict=False):
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": question.turns[len(said)]})
    try:
        return model.render(
            mark_last_question(messages, indicator),
            add_generation_prompt=True,
            max_tokens=model.n_ctx - room,
            truncate=True,
            truncation="middle",
        )
    except InputError as error:
        kind = RenderError if isinstance(error, RenderError) else InputError
        raise kind(f"question {question.question_id}, turn {len(said) + 1}: {error}") from error


def _make_id(model_id: str, question: MTQuestion, turns: Sequence[str]) -> str:
    """The id of an answer: the same for the same answer, and 22 characters long, as FastChat's ids are.

    `runs.digest` is shorter, and ids in files written before would no longer equal those of the same answers.
    """
    told = json.dumps([model_id, question.question_id, question.turns, list(turns)])
    return hashlib.sha256(told.encode()).hexdigest()[:22]


__all__ = [
    "CHUNK", "Answerer", "answer_questions", "answers_path", "check_label", "count_answers", "make_label",
    "read_all_answers", "read_answers", "record_settings",
]  # fmt: skip
