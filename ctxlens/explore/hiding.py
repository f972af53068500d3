"""A sentence in a document: what is asked of the model at each place, and the map of what was measured.

A place is a length of the context and a depth of the sentence. Each place is computed and kept by itself, by
the functions of `ctxlens needle`, and the map shows what there is.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ctxlens.chat.condition import parse_conditions
from ctxlens.errors import InputError
from ctxlens.evals.needle import Cell, Haystack, Needle, NeedleConfig, build_cells, choose_texts
from ctxlens.evals.needle.contexts import count_tokens
from ctxlens.evals.needle.haystack import TextHaystack, load_haystack
from ctxlens.evals.needle.needles import draw_needle, draw_neutral
from ctxlens.evals.needle.run import Setting, run_settings
from ctxlens.evals.needle.sentences import split_keeping_lines
from ctxlens.explore.lab import THIS, Lab, Task
from ctxlens.explore.state import NeedlePart
from ctxlens.explore.work import Ticket
from ctxlens.report.plots.look import ROLE_SHADES
from ctxlens.report.plots.needle import needle_heatmap
from ctxlens.results import NeedleGrid
from ctxlens.runs import digest

DEPTHS = tuple(range(0, 101, 10))
"""The depths of the map, in percent; the sentence moves in these steps."""

DOCUMENT = "document.txt"
"""What a text of one's own is called in tables and copied code."""

_AT_ONCE = 1.5
"""Seconds of the map that are computed before others get their turn."""


@dataclass(frozen=True)
class Place:
    """What was measured at one place.

    Attributes:
        grid: one row per condition, as `ctxlens needle` gives it.
        cell: the context with its sentence.
    """

    grid: NeedleGrid
    cell: Cell


def first_needle(model: str) -> dict[str, Any]:
    """A sentence that suits a model: an invented fact, or one that the organism has learned otherwise."""
    chosen = choose_texts(model).needles
    found = draw_neutral(0) if chosen == "neutral" else draw_needle(chosen, "explorer")
    return {
        "sentence": found.sentence,
        "question": found.question,
        "keywords": ", ".join(found.keywords),
        "length": 500 if chosen == "neutral" else 200,
    }


def needle_of(part: NeedlePart) -> Needle:
    """The sentence as a needle.

    Raises:
        InputError: the sentence, its question or the keywords are missing, or do not belong together.
    """
    words = [word.strip() for word in part.keywords.split(",")]
    return Needle("sentence", part.sentence, part.question, tuple(word for word in words if word))


def haystack_of(lab: Lab, part: NeedlePart) -> Haystack:
    """The text around the sentence.

    Raises:
        InputError: the text of one's own is empty.
    """
    if part.source == "shipped":
        return load_haystack(choose_texts(lab.model.name).haystack)
    found = tuple(one for one in split_keeping_lines(part.document) if one)
    if not found:
        raise InputError("paste a text in which the sentence is hidden, or choose the shipped one.")
    return TextHaystack(found, DOCUMENT)


def lengths_of(lab: Lab, part: NeedlePart) -> tuple[int, ...]:
    """The lengths of the map; a text of one's own limits them to what it holds."""
    if part.source == "shipped":
        return part.lengths
    haystack = haystack_of(lab, part)
    assert isinstance(haystack, TextHaystack)
    whole = " ".join((*haystack.text, part.sentence))
    most = count_tokens(lab.model.tokenizer, whole.replace("\n", " "))
    return tuple(sorted({min(one, most) for one in part.lengths}))


def length_of(lab: Lab, part: NeedlePart) -> int:
    """The length at which the sentence is dragged."""
    return min(part.length, lengths_of(lab, part)[-1])


def config_of(part: NeedlePart, lengths: Sequence[int], depths: Sequence[float]) -> NeedleConfig:
    """What is asked, as `ctxlens needle` takes it."""
    begun = "+prefix" if part.prefix else ""
    return NeedleConfig(
        lengths=tuple(lengths),
        depths=tuple(depths),
        needles=(needle_of(part),),
        conditions=parse_conditions(f"plain{begun},template{begun}"),
        max_new_tokens=part.answer_tokens,
        score=("recall", "logprob"),
    )  # pyright: ignore[reportCallIssue]


def place(lab: Lab, part: NeedlePart, length: int | None = None, depth: float | None = None) -> Task:
    """Ask the model at one place, with template and without: `Place`.

    Args:
        lab: the model.
        part: the sentence and the document.
        length: the length of the context; by default that at which the sentence is dragged.
        depth: where the sentence is; by default as in `part`.

    Raises:
        InputError: the sentence or the document cannot be used.
    """
    length = length_of(lab, part) if length is None else length
    config = config_of(part, (length,), (part.depth if depth is None else depth,))
    haystack, model = haystack_of(lab, part), lab.model
    about = [part.source, part.document if part.source == "own" else "", part.indicator]
    key = digest(["needle", model.identity, config.as_dict(), about])

    def run(ticket: Ticket) -> Place:
        ticket.check()
        with lab.rendering:
            cells = build_cells(model, config, haystack)
        grid = run_settings(model, cells, config, [Setting(short_name(model.name), part.indicator)])
        return Place(grid, cells[0])

    return Task(THIS, key, run, _nbytes)


def written(lab: Lab, part: NeedlePart) -> Cell:
    """The document with the sentence at its place; no model is run.

    Raises:
        InputError: it does not fit the model's window, or the document is too short.
    """
    known = lab.cache.get(place(lab, part).key)
    if known is not None:
        return known.cell
    with lab.rendering:
        config = config_of(part, (length_of(lab, part),), (part.depth,))
        return build_cells(lab.model, config, haystack_of(lab, part))[0]


def places(lab: Lab, part: NeedlePart) -> list[tuple[int, float, Task]]:
    """All places of the map: length, depth, and what is computed there."""
    depths = sorted({*map(float, DEPTHS), part.depth})
    return [
        (length, depth, place(lab, part, length, depth))
        for length, depth in itertools.product(lengths_of(lab, part), depths)
    ]


def filling(lab: Lab, part: NeedlePart) -> Task | None:
    """Compute more places of the map for a moment; None when all are there.

    A map is filled by asking again and again, so that whoever drags the sentence meanwhile does not wait.
    """
    every = places(lab, part)
    missing = [task for _, _, task in every if lab.cache.get(task.key) is None]
    if not missing:
        return None

    def run(ticket: Ticket) -> int:
        until = time.monotonic() + _AT_ONCE
        done = len(every) - len(missing)
        for task in missing:
            ticket.progress(done, len(every))
            if lab.cache.get(task.key) is None:
                found = task.run(ticket)
                lab.cache.put(task.key, found, task.size(found))
            done += 1
            ticket.show(done)
            if time.monotonic() > until:
                break
        return done

    return Task(THIS, digest(["filling", [task.key for task in missing]]), run, lambda done: 100)


def about(part: NeedlePart) -> str:
    """What a map is about: everything but the place and the column that it shows."""
    return digest(part.model_dump(mode="json", exclude={"depth", "column"}))


def measured(lab: Lab, part: NeedlePart) -> tuple[NeedleGrid, int, int]:
    """The grid of all places that are there, how many these are, and how many there could be.

    Raises:
        InputError: the sentence or the document cannot be used.
    """
    rows, every, done = [], places(lab, part), 0
    for number, (length, depth, task) in enumerate(every):
        found = lab.cache.get(task.key)
        done += found is not None
        if found is not None:
            rows += [{**row, "cell": number} for row in found.grid.frame.to_dict("records")]
        else:
            rows += _empty_rows(lab, part, length, depth, number)
    return NeedleGrid.from_rows(rows, {"wording": "bare"}), done, len(every)


def _empty_rows(lab: Lab, part: NeedlePart, length: int, depth: float, number: int) -> list[dict[str, Any]]:
    """Rows of a place that has not been computed, so that the map has room for it."""
    nothing = float("nan")
    columns = {**Setting(short_name(lab.model.name), part.indicator).columns, "needle": "sentence"}
    place = {"cell": number, "context_tokens": length, "depth_percent": depth, "case": 0}
    scores = dict.fromkeys(("recall", "memory_recall", "needle_logprob", "built_context_tokens"), nothing)
    names = [condition.name for condition in config_of(part, (length,), (depth,)).conditions]
    none = {"prompt_tokens": 0, "keywords": "", "response": None, "error": ""}
    return [{**columns, "condition": name, **place, **scores, **none} for name in names]


def needle_map(lab: Lab, part: NeedlePart) -> tuple[Any, int, int]:
    """The map as a figure with the present place framed, and how many places it has and could have."""
    grid, done, total = measured(lab, part)
    figure = needle_heatmap(grid, column=part.column, columns=2)
    depths, lengths = sorted({*map(float, DEPTHS), part.depth}), lengths_of(lab, part)
    row, column = depths.index(part.depth), lengths.index(length_of(lab, part))
    # Without ranges, plotly finds none where no cell has a value.
    figure.update_xaxes(range=[-0.5, len(lengths) - 0.5])
    figure.update_yaxes(range=[len(depths) - 0.5, -0.5], autorange=False)
    colours = figure.layout.coloraxis  # pyright: ignore[reportAttributeAccessIssue]
    if colours.cmin == colours.cmax:
        figure.update_layout(coloraxis={"cmin": colours.cmin - 0.5, "cmax": colours.cmax + 0.5})
    for panel in (1, 2):
        figure.add_shape(
            type="rect",
            x0=column - 0.5,
            x1=column + 0.5,
            y0=row - 0.5,
            y1=row + 0.5,
            line={"color": ROLE_SHADES["assistant"].built, "width": 3},
            row=1,
            col=panel,
        )
    return figure, done, total


def short_name(name: str) -> str:
    """The last part of a model's name."""
    return name.rstrip("/").rsplit("/", 1)[-1]


def _nbytes(found: Place) -> int:
    return 4000 + 4 * len(found.cell.context.text)


__all__ = [
    "DEPTHS",
    "DOCUMENT",
    "Place",
    "about",
    "config_of",
    "filling",
    "first_needle",
    "haystack_of",
    "length_of",
    "lengths_of",
    "measured",
    "needle_map",
    "needle_of",
    "place",
    "places",
    "short_name",
    "written",
]
