"""Answers graded one by one; each judgment is written at once, and only missing ones are asked for again."""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from ctxlens.errors import InputError, ModelFailureError
from ctxlens.evals.judge.endpoint import Endpoint, Reply, Session
from ctxlens.evals.judge.prompts import Prompt, make_prompt
from ctxlens.evals.judge.replies import parse_rating
from ctxlens.evals.mt_bench import MTQuestion
from ctxlens.files import append_lines, read_lines, write_lines
from ctxlens.results import Ratings
from ctxlens.results.fastchat import NO_RATING
from ctxlens.runs import Progress

_GIVE_UP = 8
"""If this many judgments fail before one succeeds, the others are not tried."""

Answers = Mapping[str, Mapping[int | str, Mapping[str, Any]]]
"""Rows of FastChat's layout, by model and question."""


def judgments_path(folder: Path, judge: str) -> Path:
    """The file of a judge's judgments in a folder of FastChat's layout."""
    return (
        folder / "model_judgment" / f"{re.sub(r'[^A-Za-z0-9.+@=_-]+', '_', judge).lstrip('.')}_single.jsonl"
    )


@dataclass(frozen=True)
class _Task:
    model: str
    question: MTQuestion
    turn: int
    prompt: Prompt

    def is_answered_by(self, row: Mapping[str, Any] | None) -> bool:
        """Whether a row rates exactly this; a rating that was taken from the judge's thinking does not."""
        if row is None or row["score"] == NO_RATING or row.get("user_prompt") != self.prompt.user:
            return False
        return parse_rating(str(row.get("judgment", "")))[0] == row["score"]


def judge_answers(
    endpoint: Endpoint,
    questions: Sequence[MTQuestion],
    answers: Answers,
    *,
    path: Path,
    references: Mapping[int | str, Sequence[str]] | None = None,
    threads: int = 4,
    progress: Progress | None = None,
) -> Ratings:
    """Let a judge grade every answer separately, each turn shown with the turns before it.

    If the file holds a rating by this judge for exactly the same prompt, the judge is not asked again. If it
    holds a judgment without rating (the judge did not answer, its reply was cut off, or it gave no rating),
    the judge is asked again.

    Args:
        endpoint: the judge.
        questions: what was asked.
        answers: what the models answered; answers to other questions are ignored.
        path: the file of judgments. It grows with every judgment; rows of other judges in it are kept.
        references: good answers by question, instead of the questions' own.
        threads: number of judgments that are asked for at the same time.
        progress: called with the numbers of finished and of all judgments.

    Returns:
        One row per judgment; `score` is NaN if there is no rating, and `error` says why.

    Raises:
        InputError: there are no answers, or the file holds something else.
        ModelFailureError: the judge refuses every question (a wrong key, address or model), or none of the
            first requests succeeded. Judgments made until then are kept.
    """
    tasks = list(_make_tasks(questions, answers, references or {}))
    if not tasks:
        raise InputError("there are no answers to these questions; let a model answer them first.")
    rows = _read_judgments(path)
    open_ = [task for task in tasks if not task.is_answered_by(rows.get(_key(endpoint, task)))]
    done = len(tasks) - len(open_)
    if progress:
        progress(done, len(tasks))
    with closing(_ask_all(endpoint, open_, threads)) as judged:
        for task, row in judged:
            append_lines(path, [row])
            rows[_key(endpoint, task)] = row
            done += 1
            if progress:
                progress(done, len(tasks))
    if open_:
        write_lines(path, rows.values())
    return _as_ratings(endpoint, tasks, rows)


def _make_tasks(
    questions: Sequence[MTQuestion], answers: Answers, references: Mapping[int | str, Sequence[str]]
) -> Iterator[_Task]:
    for model, of_model in answers.items():
        for question in questions:
            if question.question_id not in of_model:
                continue
            said = of_model[question.question_id]["choices"][0]["turns"]
            reference = references.get(question.question_id, question.reference)
            shown = replace(question, reference=tuple(reference))
            for turn in range(1, min(len(said), len(question.turns)) + 1):
                yield _Task(model, question, turn, make_prompt(shown, said, turn))


def _key(endpoint: Endpoint, task: _Task) -> tuple[Any, ...]:
    return (endpoint.model, task.prompt.name, task.model, task.question.question_id, task.turn)


def _read_judgments(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    found = {}
    for number, row in enumerate(read_lines(path), start=1):
        try:
            judge, name = row["judge"]
            key = (judge, name, row["model"], row["question_id"], row["turn"])
            float(row["score"])
            hash(key)
        except (KeyError, ValueError, TypeError):
            raise InputError(f"{path}, row {number}, is not a judgment in FastChat's layout.") from None
        found[key] = row
    return found


def _ask_all(
    endpoint: Endpoint, tasks: Sequence[_Task], threads: int
) -> Generator[tuple[_Task, dict[str, Any]], None, None]:
    """One row per task, in the order in which the judge answers."""
    failed, succeeded = 0, 0
    with endpoint.open() as session:
        for task, reply in _ask_in_threads(session, tasks, threads):
            if reply.fatal:
                raise ModelFailureError(
                    f"the judge {endpoint.model} at {endpoint.url} cannot be asked: {reply.error}"
                )
            yield task, _as_row(endpoint, task, reply)
            failed, succeeded = failed + bool(reply.error), succeeded + (not reply.error)
            if failed >= _GIVE_UP and not succeeded:
                raise ModelFailureError(
                    f"the judge {endpoint.model} at {endpoint.url} has answered none of {failed} "
                    f"questions ({reply.error}); run the same command again to continue."
                )


def _ask_in_threads(session: Session, tasks: Sequence[_Task], threads: int) -> Iterator[tuple[_Task, Reply]]:
    """Replies in the order of their arrival, from daemon threads, so that an interrupt need not wait."""
    todo: SimpleQueue[_Task] = SimpleQueue()
    replies: SimpleQueue[tuple[_Task, Reply | Exception]] = SimpleQueue()
    for task in tasks:
        todo.put(task)

    def work() -> None:
        while not session.stopped:
            try:
                task = todo.get_nowait()
            except Empty:
                return
            try:
                reply = session.ask(task.prompt.system, task.prompt.user)
            except Exception as error:  # raised again in the thread that reads the replies
                replies.put((task, error))
                continue
            replies.put((task, reply))
            if reply.fatal:  # no further question can be answered
                return

    for _ in range(min(threads, len(tasks))):
        Thread(target=work, daemon=True).start()
    for _ in tasks:
        task, reply = replies.get()
        if isinstance(reply, Exception):
            raise reply
        yield task, reply


def _as_row(endpoint: Endpoint, task: _Task, reply: Reply) -> dict[str, Any]:
    rating, missing = (None, reply.error) if reply.error else parse_rating(reply.text)
    return {
        "question_id": task.question.question_id,
        "model": task.model,
        "judge": [endpoint.model, task.prompt.name],
        "user_prompt": task.prompt.user,
        "judgment": reply.text,
        "score": NO_RATING if rating is None else rating,
        "turn": task.turn,
        "tstamp": time.time(),
        "error": missing,
    }


def _as_ratings(
    endpoint: Endpoint, tasks: Sequence[_Task], rows: Mapping[tuple[Any, ...], Mapping[str, Any]]
) -> Ratings:
    found = []
    for task in tasks:
        row = rows[_key(endpoint, task)]
        score = float(row["score"])
        found.append(
            {
                "model": task.model,
                "question_id": str(task.question.question_id),
                "category": task.question.category,
                "turn": task.turn,
                "score": float("nan") if score == NO_RATING else score,
                "error": str(row.get("error", "")),
            }
        )
    return Ratings.from_rows(found, {"judge": endpoint.model, "url": endpoint.url})


__all__ = ["NO_RATING", "judge_answers", "judgments_path"]
