"""Answers to questions of several turns: how each model was asked, counts, and the answers side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ctxlens.report.blocks import (
    Block,
    Cell,
    Dialogue,
    Judged,
    Said,
    SideBySide,
    Table,
    Turn,
    bounds,
    number,
)
from ctxlens.results import Dialogues, Ratings
from ctxlens.stats import Interval, bootstrap_mean

_MOST_QUESTIONS = 120
"""Upper bound on the questions on the page; the files hold all of them."""
_LONGEST = 4000
_PREVIEW = 70
_FAULTS = {"prompt truncated": "truncated", "answer cut": "cut"}
"""What a page says beside an answer, and the column that is true for it."""


def answer_blocks(dialogues: Dialogues, ratings: Mapping[str, Ratings], settings: Any) -> list[Block]:
    """A table of counts by model, and the folded questions with all answers and judgments.

    Args:
        dialogues: the answers.
        ratings: the ratings of these answers, by judge.
        settings: how each model was asked, as `ctxlens mt-bench` writes it; None if that is not known.
    """
    return [_counts(dialogues, settings), _side_by_side(dialogues, ratings)]


def ways_of_asking(settings: Any) -> list[tuple[str, str]]:
    """Pairs of names that stand for the same weights: asked without indicator and steering, and with one."""
    groups: dict[str, list[str]] = {}
    for name, one in settings.items() if isinstance(settings, dict) else ():
        if isinstance(one, dict) and one.get("model"):
            groups.setdefault(json.dumps(one["model"], sort_keys=True), []).append(name)
    pairs = []
    for names in groups.values():
        plain = [name for name in names if not _describe(settings[name])]
        pairs += [(plain[0], name) for name in names if plain and name != plain[0]]
    return pairs


def _describe(settings: Any) -> str:
    """The indicator and the steering with which a model was asked; empty if it was asked without both."""
    if not isinstance(settings, dict):
        return ""
    steering = settings.get("steering")
    alpha = steering.get("alpha", 1.0) if isinstance(steering, dict) else 1.0
    ways = ["with the indicator"] if settings.get("indicator") else []
    return ", ".join(ways + ([f"steered, α {alpha}"] if alpha != 1.0 else []))


def _counts(dialogues: Dialogues, settings: Any) -> Table:
    settings = settings if isinstance(settings, dict) else {}
    frame, models = dialogues.frame, dialogues.models
    turns = sorted(frame["turn"].unique())
    first = frame[frame["model"] == models[0]].set_index(["question_id", "turn"])["answer"]
    rows = []
    for model in models:
        own = frame[frame["model"] == model]
        empty = int((own["answer"].str.strip() == "").sum())
        lengths = [[len(text.split()) for text in own["answer"][own["turn"] == turn]] for turn in turns]
        cells = [Cell(f"{len(own)}", f"{own['question_id'].nunique()} questions")]
        cells += [_words(bootstrap_mean(length)) for length in lengths]
        cells += [Cell(str(empty)), Cell(str(int(own["truncated"].sum())))]
        cells.append(Cell(str(int(own["cut"].sum())) if own["cut"].notna().any() else "–"))
        if len(models) > 1:
            other = own.set_index(["question_id", "turn"])["answer"]
            both = first.index.intersection(other.index)
            same = int((first[both] == other[both]).sum())
            cells.append(Cell("–" if model == models[0] else f"{same} of {len(both)}"))
        rows.append([Cell(model, _describe(settings.get(model))), *cells])
    head = ["model", "answers", *(f"words, turn {turn}" for turn in turns), "empty", "prompt truncated"]
    head += ["answer cut"]
    head += ["identical to the first model"] if len(models) > 1 else []
    caption = (
        "Number of answers and mean number of words, with a 95 % bootstrap interval over questions. Empty "
        "answers, truncated prompts, and answers that were cut off at their longest make ratings hard to "
        "compare. A dash means that the file does not say which answers were cut."
    )
    return Table(head, rows, caption, title="The answers")


def _words(mean: Interval) -> Cell:
    if math.isnan(mean.estimate):
        return Cell("–")
    low, high = (f"{bound:.0f}" for bound in (mean.low, mean.high))
    return Cell(f"{mean.estimate:.0f}", bounds(mean) if math.isnan(mean.low) else f"[{low}, {high}]")


def _side_by_side(dialogues: Dialogues, ratings: Mapping[str, Ratings]) -> SideBySide:
    answers: dict[str, dict[int, dict[str, Any]]] = {}
    for row in dialogues.frame.to_dict(orient="records"):
        answers.setdefault(row["question_id"], {}).setdefault(row["turn"], {})[row["model"]] = row
    judged: dict[tuple[str, str, int], list[tuple[str, Mapping[Any, Any]]]] = {}
    for judge, table in ratings.items():
        for row in table.frame.to_dict(orient="records"):
            key = (str(row["model"]), str(row["question_id"]), int(row["turn"]))
            judged.setdefault(key, []).append((judge, row))
    means = _mean_ratings(next(iter(ratings.values()), None))
    questions = sorted(answers, key=lambda question: _order(means.get(question, {})))
    shown = [
        Dialogue(
            _title(question, answers[question]),
            " · ".join(f"{model} {number(mean)}" for model, mean in means.get(question, {}).items()),
            [
                _turn(question, turn, said, dialogues.models, judged)
                for turn, said in answers[question].items()
            ],
        )
        for question in questions[:_MOST_QUESTIONS]
    ]
    return SideBySide(shown, _caption(ratings, len(questions), dialogues.models), "Questions and answers")


def _caption(ratings: Mapping[str, Ratings], questions: int, models: Sequence[str]) -> str:
    caption = "Click a question to open it. "
    if ratings:
        caption += f"The numbers beside a question are the mean ratings by {next(iter(ratings))}. "
        caption += (
            "The questions whose ratings differ most come first. "
            if len(models) > 1
            else "The questions with the lowest ratings come first. "
        )
    if questions > _MOST_QUESTIONS:
        caption += f"The page shows {_MOST_QUESTIONS} of {questions} questions; the files hold all of them. "
    return caption + f"Texts of more than {_LONGEST:,} characters are shortened."


def _mean_ratings(ratings: Ratings | None) -> dict[str, dict[str, float]]:
    """Mean rating over the turns, by question and model."""
    if ratings is None:
        return {}
    found: dict[str, dict[str, float]] = {}
    for (question, model), score in ratings.frame.groupby(["question_id", "model"], sort=False)["score"]:
        found.setdefault(str(question), {})[str(model)] = float(score.mean())
    return found


def _order(means: Mapping[str, float]) -> float:
    known = [mean for mean in means.values() if not math.isnan(mean)]
    if not known:
        return math.inf
    return min(known) - max(known) if len(means) > 1 else known[0]


def _title(question: str, turns: Mapping[int, Mapping[str, Any]]) -> str:
    row = next(iter(next(iter(turns.values())).values()))
    asked = " ".join(row["asked"].split())
    preview = asked[:_PREVIEW] + ("…" if len(asked) > _PREVIEW else "")
    return f"{question}, {row['category']}" + (f": {preview}" if preview else "")


def _turn(
    question: str,
    turn: int,
    said: Mapping[str, Mapping[str, Any]],
    models: Sequence[str],
    judged: Mapping[tuple[str, str, int], Sequence[tuple[str, Mapping[Any, Any]]]],
) -> Turn:
    asked = next(iter(said.values()))["asked"]
    boxes = []
    for model in models:
        row = said.get(model)
        if row is None:
            boxes.append(Said(model, "(the folder holds no answer)"))
            continue
        text = _cut(row["answer"]) if row["answer"].strip() else "(empty)"
        marks = [_as_judged(judge, one) for judge, one in judged.get((model, question, turn), ())]
        told = [what for what, column in _FAULTS.items() if row[column] == 1]
        boxes.append(Said(model, text, ", ".join(told), marks))
    return Turn(_cut(asked), boxes)


def _as_judged(judge: str, row: Mapping[Any, Any]) -> Judged:
    score = float(row["score"])
    told = f"no rating, {_cut(str(row['error']))}" if math.isnan(score) else f"{score:g} of 10"
    return Judged(f"{judge}: {told}", _cut(str(row.get("judgment") or "")))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"


__all__ = ["answer_blocks", "ways_of_asking"]
