"""The section on MT-Bench: ratings by turn and category, and answers with judgments side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ctxlens.report.answers import answer_blocks, ways_of_asking
from ctxlens.report.blocks import (
    Block,
    Cell,
    Figure,
    Figures,
    Note,
    Table,
    chance,
    figure_json,
    interval_cell,
    number,
)
from ctxlens.report.collect import RunContents
from ctxlens.report.plots.ratings import rating_means
from ctxlens.results import Dialogues, Ratings

_REASON = 160


def mt_bench_blocks(run: RunContents) -> list[Block]:
    """Each judge's ratings, then the answers themselves."""
    dialogues, ratings = run.dialogues(), run.ratings()
    blocks: list[Block] = []
    for judge, table in ratings.items():
        blocks += _judge_blocks(judge, table, dialogues, ways_of_asking(run.extras.get("models")))
    if dialogues is not None:
        if not ratings:
            blocks.append(
                Note(
                    "No judge has rated these answers, so this page does not say how good they are. Run "
                    "ctxlens mt-bench --judge-only to have them rated."
                )
            )
        blocks += answer_blocks(dialogues, ratings, run.extras.get("models"))
    return blocks


def _judge_blocks(
    judge: str, ratings: Ratings, dialogues: Dialogues | None, ways: Sequence[tuple[str, str]]
) -> Iterator[Block]:
    yield _figures(judge, ratings)
    yield _by_turn(judge, ratings, dialogues)
    if len(ratings.models) > 1:
        yield _differences(judge, ratings, ways)
    if ratings.frame["category"].nunique() > 1:
        yield _by_category(judge, ratings)
    if len(ratings.unrated):
        yield _reasons(judge, ratings)


def _figures(judge: str, ratings: Ratings) -> Figures:
    figures = []
    for by in ("turn", "category"):
        if by == "turn" or ratings.frame["category"].nunique() > 1:
            label = f"Mean ratings of {judge} by {by} and model; the table holds the numbers."
            figures.append(Figure(figure_json(rating_means(ratings, by)), label, f"by {by}"))
    caption = (
        "Mean rating from 1 (worst) to 10 (best), with its 95 % bootstrap interval over questions (the "
        "turns of one question are drawn together). The intervals do not cover the choice of the judge."
    )
    return Figures(figures, caption, title=f"Ratings by {judge}")


def _by_turn(judge: str, ratings: Ratings, dialogues: Dialogues | None) -> Table:
    turns = sorted(ratings.frame["turn"].unique())
    rows = []
    for model in ratings.models:
        of_model = ratings.where(model=model)
        cells = [interval_cell(of_model.mean(turn=turn)) for turn in turns]
        cells += [interval_cell(of_model.mean())] if len(turns) > 1 else []
        answers = len(of_model) if dialogues is None else len(dialogues.where(model=model))
        failed, answers = len(of_model.unrated), max(answers, len(of_model))
        spoiled = [
            f"{count} {what}"
            for count, what in ((failed, "failed"), (answers - len(of_model), "not yet judged"))
            if count
        ]
        rows.append(
            [
                Cell(model),
                *cells,
                Cell(f"{len(of_model) - failed} of {answers}", ", ".join(spoiled)),
                Cell(str(of_model.mean().n)),
            ]
        )
    head = ["model", *(f"turn {turn}" for turn in turns), *(["all turns"] if len(turns) > 1 else [])]
    caption = "Answers that the judge failed to rate are left out of the means."
    return Table([*head, "answers rated", "questions"], rows, caption, title=f"Mean ratings by {judge}")


def _differences(judge: str, ratings: Ratings, ways: Sequence[tuple[str, str]]) -> Table:
    models = ratings.models
    pairs = [(models[0], other) for other in models[1:]]
    pairs += [pair for pair in ways if pair not in pairs and set(pair) <= set(models)]
    turns = sorted(ratings.frame["turn"].unique())
    chosen: list[tuple[str, dict[str, Any]]] = [("all turns", {})]
    chosen += [(f"turn {turn}", {"turn": turn}) for turn in turns] if len(turns) > 1 else []
    rows = []
    for first, second in pairs:
        for name, where in chosen:
            found = ratings.compare(first, second, **where)
            test = "" if math.isnan(found.p_value) else f"p {chance(found.p_value)}"
            rows.append(
                [
                    Cell(second, f"minus {first}"),
                    Cell(name, f"{found.pairs} answers, {found.difference.n} questions"),
                    Cell(f"{number(found.first.estimate)}\u00a0→\u00a0{number(found.second.estimate)}"),
                    interval_cell(found.difference, signed=True),
                    Cell(found.reading if found.pairs else "no pairs", test),
                ]
            )
    caption = (
        "Differences are paired by question and turn, over the answers that are rated for both models, "
        "with a 95 % bootstrap interval and a sign-flip test over questions. “No difference shown” means "
        "that the interval contains zero or that p is above 0.05."
    )
    head = ["models", "turns", "means", "difference", "reading"]
    return Table(head, rows, caption, title=f"Differences in the ratings of {judge}")


def _by_category(judge: str, ratings: Ratings) -> Table:
    models = ratings.models
    rows = []
    for category in dict.fromkeys(ratings.frame["category"]):
        of_category = ratings.where(category=category)
        cells = [interval_cell(of_category.mean(model=model)) for model in models]
        if len(models) == 2:
            cells.append(interval_cell(of_category.compare(*models).difference, signed=True))
        questions = of_category.frame["question_id"].nunique()
        rows.append([Cell(str(category), f"{questions} question{'s' * (questions != 1)}"), *cells])
    head = ["category", *models, *([f"{models[1]} minus {models[0]}"] if len(models) == 2 else [])]
    caption = "Mean over both turns. Each category has few questions, so its intervals are rough."
    return Table(head, rows, caption, title=f"Ratings of {judge} by category")


def _reasons(judge: str, ratings: Ratings) -> Table:
    models = ratings.models
    unrated = ratings.unrated
    rows = [
        [
            Cell(str(reason)[:_REASON] + ("…" if len(str(reason)) > _REASON else "")),
            *(Cell(str(int((group["model"] == model).sum()))) for model in models),
        ]
        for reason, group in unrated.groupby("error", sort=False)
    ]
    caption = "Run the same command again to ask the judge for these ratings."
    head = ["reason", *models]
    return Table(head, rows, caption, title=f"Answers that {judge} failed to rate: {len(unrated)}")


__all__ = ["mt_bench_blocks"]
