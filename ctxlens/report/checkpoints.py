"""The section on several checkpoints: curves over training, a table with links, and what changed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from ctxlens.report.blocks import Block, Cell, Figure, Figures, Note, Table, bounds, figure_json, number
from ctxlens.report.collect import RunContents
from ctxlens.report.plots.checkpoints import checkpoint_curves
from ctxlens.results.checkpoints import QUANTITIES, Checkpoints
from ctxlens.stats import Interval


def checkpoint_blocks(run: RunContents) -> list[Block]:
    """The figure and the tables of a run over several checkpoints; empty for any other run."""
    blocks: list[Block] = []
    for found in run.all(Checkpoints).values():
        folders = found.meta.get("folders") or {}
        blocks += [_figure(found), _values(found, folders)]
        if len(found.models) > 1:
            blocks.append(_changes(found))
        blocks += [Note(str(found.meta["note"]))] if found.meta.get("note") else []
        failed = found.meta.get("failed") or {}
        blocks += [Note(f"{name} was not measured: {sentence}") for name, sentence in failed.items()]
    return blocks


def _figure(found: Checkpoints) -> Figures:
    label = f"Recall, loss and bias of {len(found.models)} checkpoints."
    caption = (
        "Recall of facts hidden in long texts without and with the chat template (top), the difference of "
        "the two (loss), and the change of the user's share of attention by the template, without sinks "
        "(bias). All checkpoints got the same texts. Bars are 95 % intervals over texts."
    )
    title = "Recall, loss and bias" if found.meta.get("against") else "Over training"
    return Figures([Figure(figure_json(checkpoint_curves(found)), label)], caption, title=title)


def _values(found: Checkpoints, folders: Mapping[str, str]) -> Table:
    rows = []
    for at, model in enumerate(found.models):
        link = f"{folders[model]}/report.html" if model in folders else ""
        cells = [Cell(model, link=link)]
        for quantity in QUANTITIES:
            one, answer = found.values(quantity)[at], found.answers(quantity)[at]
            text = number(one.estimate, signed=quantity in ("loss", "bias"))
            cells.append(Cell(f"{text} {answer}".strip(), bounds(one)))
        rows.append(cells)
    caption = (
        "“Yes”, “no” or “undecided” answers the question whether there is a loss or a bias, by the rules of "
        "the audit. The name of a checkpoint leads to its own page with all answers."
    )
    return Table(["checkpoint", *QUANTITIES], rows, caption, title="The checkpoints")


def _changes(found: Checkpoints) -> Table:
    names = found.models
    rows, first = [], found.meta.get("against")
    for at, (before, after) in enumerate(itertools.pairwise(names)):
        cells = [Cell(after, f"against {first}" if first else f"after {before}")]
        cells += [_change(*found.changes(quantity)[at]) for quantity in QUANTITIES]
        rows.append(cells)
    margins = ", ".join(f"{name} {margin:g}" for name, margin in QUANTITIES.items())
    caption = (
        f"Each checkpoint against {first or 'the one before it'}, paired by question (the bias by text), "
        "with a 95 % interval over texts. Higher or lower: the interval excludes 0. No change: the interval "
        f"lies within the margin ({margins}). Everything else is undecided."
    )
    title = f"What changed against {first}" if first else "What changed between checkpoints"
    return Table(["checkpoint", *QUANTITIES], rows, caption, title=title)


def _change(one: Interval, reading: str) -> Cell:
    if one.estimate != one.estimate:
        return Cell(reading or "–")
    return Cell(f"{number(one.estimate, signed=True)} {reading}", bounds(one))


__all__ = ["checkpoint_blocks"]
