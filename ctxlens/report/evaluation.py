"""The section on evaluations: means, differences, and answers side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ctxlens.report.blocks import (
    Answers,
    Block,
    Cell,
    Figure,
    Figures,
    Note,
    bounds,
    chance,
    figure_json,
    number,
)
from ctxlens.report.collect import RunContents, short_name
from ctxlens.report.empties import explain_empties
from ctxlens.report.plots.conditions import explain_conditions
from ctxlens.report.plots.evaluation import evaluation_means
from ctxlens.results import Evaluation

_MOST_EXAMPLES = 80
"""Upper bound on the examples of one task on the page; the file holds all of them."""
_CONTEXT_END = 700
_RESPONSE = 700
_QUESTION = 300
_MARKERS = re.compile(r"<\|[^|<>\n]*\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>")
"""Markers of common templates; a prompt is shown without them where only its question matters."""
_MOST_METRICS = 4


def evaluation_blocks(run: RunContents) -> list[Block]:
    """Figures, a table with filters, and answers side by side for every evaluation of a run."""
    blocks: list[Block] = []
    for evaluation in run.all(Evaluation).values():
        if not len(evaluation):
            continue
        blocks.append(_figures(evaluation))
        if sentence := explain_empties(evaluation):
            blocks.append(Note(sentence))
        blocks.append(_answers(evaluation))
        for one in evaluation.meta.get("left_out", ()):
            name, why = short_name(one["model"]), one["reason"]
            blocks.append(Note(f"{name} was not asked under the condition {one['condition']}: {why}."))
    return blocks


def _figures(evaluation: Evaluation) -> Figures:
    figures = []
    for task in evaluation.tasks:
        metrics = evaluation.metrics(task)[:_MOST_METRICS]
        examples = evaluation.frame[evaluation.frame["task"] == task]["example"].nunique()
        label = (
            f"Means of {', '.join(metrics)} on {task} by model and condition; the table holds the numbers."
        )
        figure = figure_json(evaluation_means(evaluation, task, metrics))
        figures.append(Figure(figure, label, f"{task}, {examples} examples"))
    caption = (
        "Mean over the examples of each task, with its 95 % bootstrap interval over the texts that the "
        "questions are about (examples about the same text are drawn together). Overlapping intervals do not "
        "show that two conditions are equal; the table below compares them pair by pair. "
        + explain_conditions(condition for _, condition in evaluation.variants)
    )
    return Figures(figures, caption, title="Scores by model and condition")


def _answers(evaluation: Evaluation) -> Answers:
    first = evaluation.variants[0]
    rows: list[dict[str, Any]] = []
    for task, metric, variant in evaluation.rows():
        cells = _mean_cells(evaluation, task, metric, variant)
        labels = {"task": task, "model": variant[0], "condition": variant[1], "metric": metric}
        rows.append({**labels, "cells": cells})
    baseline = ", ".join(first)
    caption = (
        f"Each difference is the value of the row minus that of {baseline}, paired by example, with a 95 % "
        "bootstrap interval and a sign-flip test over the texts. “No difference shown” means that the "
        "interval contains zero or that p is above 0.05. McNemar's test is for metrics of 0 and 1: it "
        f"counts the examples that are right only with {baseline} and those that are right only in this "
        "row, and gives the exact two-sided p (examples count as independent)."
    )
    return Answers(rows=rows, data=_examples(evaluation), caption=caption, title="Differences and answers")


def _mean_cells(evaluation: Evaluation, task: str, metric: str, variant: tuple[str, str]) -> list[Cell]:
    first = evaluation.variants[0]
    mean = evaluation.mean(task, metric, variant)
    cells = [Cell(number(mean.estimate), bounds(mean))]
    if variant == first:
        cells += [Cell("–")] * 3
    else:
        pair = evaluation.compare(task, metric, first, variant)
        cells.append(Cell(number(pair.difference.estimate, signed=True), bounds(pair.difference)))
        cells.append(Cell(pair.reading, "" if math.isnan(pair.p_value) else f"p {chance(pair.p_value)}"))
        cells.append(_mcnemar_cell(evaluation, task, metric, variant))
    examples = len(evaluation.where(task=task, model=variant[0], condition=variant[1]))
    spoiled = [
        f"{count} {name} ({evaluation.share(name, task, variant):.0%})"
        for name in evaluation.FAULTS
        if (count := evaluation.count(name, task, variant))
    ]
    return [*cells, Cell(str(examples), ", ".join([f"{mean.n} texts", *spoiled]))]


def _mcnemar_cell(evaluation: Evaluation, task: str, metric: str, variant: tuple[str, str]) -> Cell:
    if not evaluation.is_binary(task, metric):
        return Cell("–")
    test = evaluation.mcnemar(task, metric, evaluation.variants[0], variant)
    return Cell(f"{test.only_first} : {test.only_second}", f"p {chance(test.p_value)}")


def _examples(evaluation: Evaluation) -> dict[str, Any]:
    """The examples of each task for the page's script, those that differ most first."""
    tasks = {}
    for task in evaluation.tasks:
        metrics = list(evaluation.metrics(task))
        examples = _gather(evaluation, task, metrics)
        better = bool(evaluation.meta.get("higher_is_better", {}).get(metrics[0], True)) if metrics else True
        examples.sort(key=lambda one, better=better: -_spread(one, better))
        tasks[task] = {
            "metrics": metrics,
            "better": [bool(evaluation.meta.get("higher_is_better", {}).get(m, True)) for m in metrics],
            "total": len(examples),
            "examples": examples[:_MOST_EXAMPLES],
        }
    return {"variants": [", ".join(variant) for variant in evaluation.variants], "tasks": tasks}


def question_of(prompt: str) -> str:
    """What a prompt asks: its last line with a question mark, up to that mark; else its last line of words.

    Of a line that also holds the text, only the end remains. Markers of a chat template are left out.
    """
    lines = [text for line in prompt.splitlines() if (text := _MARKERS.sub(" ", line).strip())]
    asking = [line for line in lines if "?" in line]
    if asking:
        line = asking[-1]
        found = line[: line.rindex("?") + 1]
    else:
        found = next((line for line in reversed(lines) if len(line.split()) > 1), lines[-1] if lines else "")
    return found if len(found) <= _QUESTION else "… " + found[-_QUESTION:].partition(" ")[2]


def _gather(evaluation: Evaluation, task: str, metrics: list[str]) -> list[dict[str, Any]]:
    """One record per example, with its answers by variant."""
    places = {variant: place for place, variant in enumerate(evaluation.variants)}
    found: dict[tuple[Any, Any], dict[str, Any]] = {}
    for row in evaluation.frame[evaluation.frame["task"] == task].to_dict(orient="records"):
        prompt = str(row["prompt"])
        one = found.setdefault(
            (row["example"], row["filter"]),
            {
                "name": f"example {row['example']}"
                + ("" if row["filter"] == "none" else f", {row['filter']}"),
                "question": question_of(prompt),
                "gold": str(row["gold"])[:_RESPONSE],
                "context": ("… " if len(prompt) > _CONTEXT_END else "") + prompt[-_CONTEXT_END:],
                "answers": [None] * len(places),
            },
        )
        response = str(row["response"])
        one["answers"][places[row["model"], row["condition"]]] = {
            "text": response[:_RESPONSE] + (" …" if len(response) > _RESPONSE else ""),
            "scores": [_score(row, metric) for metric in metrics],
            "truncated": bool(row["truncated"]),
            "empty": bool(row["empty"]),
            "cut": bool(row.get("cut", False)),
        }
    return list(found.values())


def _score(row: Mapping[Any, Any], metric: str) -> float | None:
    value = float(row[metric])
    return None if math.isnan(value) else value


def _spread(example: Mapping[str, Any], better: bool) -> float:
    """How much worse the worst answer is than that of the first variant, by the first metric."""
    scores = [answer["scores"][0] for answer in example["answers"] if answer and answer["scores"]]
    first = example["answers"][0]
    known = [score for score in scores if score is not None]
    if not known or not first or first["scores"][0] is None:
        return -1.0
    return first["scores"][0] - min(known) if better else max(known) - first["scores"][0]


__all__ = ["evaluation_blocks"]
