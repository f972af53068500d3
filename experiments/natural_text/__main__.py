"""Does a real model on real text use a needle, and does the template or steering change how much?

Question: by how many nats per token does a needle in an essay make its own sentence likelier, with and
          without chat template, and under steering? The control is the same essay without the needle: what
          the template alone does to the sentence's probability does not count.
Run:      python -m experiments.natural_text --model stories260K/hf --template chatml.jinja --essays essays/
Expected: (written beforehand) the needle helps a little (a model of 260 thousand parameters, trained on
          children's stories, window 512), less under a template that it never saw. The reading is in
          docs/findings.md.
Cost:     4 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.prompts import Cell
from ctxlens.evals.needle.run import Setting, run_settings
from ctxlens.models import load_model
from ctxlens.models.attention.steering import Steering
from ctxlens.results import NeedleGrid
from ctxlens.runs import Run
from experiments.common import markdown, run_experiment

CONDITIONS = ("plain+prefix", "template+prefix")
ALPHAS = (0.5, 0.3, 0.1)
NEEDLE = "sf"


def without_needle(cell: Cell) -> Cell:
    """The same cell with its needle removed from the text."""
    start, end = cell.context.needle_span
    text = f"{cell.context.text[:start].rstrip()} {cell.context.text[end:].lstrip()}".strip()
    return replace(cell, context=replace(cell.context, text=text, needle_span=(0, 0)))


def ask(args: argparse.Namespace) -> tuple[NeedleGrid, NeedleGrid]:
    """The needle's probability with the needle in the text and without it, by condition and steering."""
    model = load_model(args.model, backend="native", chat_template=args.template or None)
    config = NeedleConfig(
        lengths=(128,) if args.smoke else 6,
        depths=(50.0,) if args.smoke else (0.0, 25.0, 50.0, 75.0, 100.0),
        needles=(NEEDLE,),
        conditions=CONDITIONS,
        cases_per_cell=2 if args.smoke else 5,
        score=("logprob",),
        seed=args.seeds[0],
    )
    run = Run.open(args.out, study="needle", config={"model": model.identity, **config.as_dict()})
    cells = build_cells(model, config, load_haystack(args.essays, seed=config.seed))
    settings = [Setting("stories260K")]
    settings += [Setting("stories260K", steering=Steering(alpha), heads="all") for alpha in ALPHAS]

    def answer(asked: Sequence[Cell], name: str) -> NeedleGrid:
        return run_settings(model, asked, config, settings, out=run, name=name)

    return answer(cells, "needle.parquet"), answer(list(map(without_needle, cells)), "control.parquet")


def study(args: argparse.Namespace) -> dict[str, Any]:
    """What the needle adds, by condition and α, and its paired differences."""
    grid, control = ask(args)

    def added(**chosen: Any) -> Any:
        return grid.recall("needle_logprob", **chosen) - control.recall("needle_logprob", **chosen)

    plain = added(condition="plain+prefix", alpha=1.0)
    table: dict[str, Any] = {}
    for condition in CONDITIONS:
        unsteered = added(condition=condition, alpha=1.0)
        for alpha in (1.0, *ALPHAS):
            values = added(condition=condition, alpha=alpha)
            table[f"{condition} | {alpha:g}"] = {
                "with needle": _as_list(
                    grid.mean(grid.recall("needle_logprob", condition=condition, alpha=alpha))
                ),
                "without": _as_list(
                    grid.mean(control.recall("needle_logprob", condition=condition, alpha=alpha))
                ),
                "added": _as_list(grid.mean(values)),
                "added, minus unsteered": _as_list(grid.difference(unsteered, values)),
                "added, minus plain unsteered": _as_list(grid.difference(plain, values)),
            }
    lengths = grid.frame.drop_duplicates("cell")[["context_tokens"]].value_counts().sort_index()
    print(tables(table))
    return {
        "model": "stories260K under ChatML, 260 thousand parameters, window 512",
        "lengths": [int(length) for (length,) in lengths.index],
        "cells": int(lengths.sum()),
        "nats per token": table,
    }


def _as_list(interval: Any) -> list[float]:
    return [interval.estimate, interval.low, interval.high]


def tables(table: dict[str, Any]) -> str:
    """The figures in Markdown."""
    columns = list(next(iter(table.values())))

    def show(values: Sequence[float]) -> str:
        return f"{values[0]:+.3f} [{values[1]:+.3f}, {values[2]:+.3f}]"

    rows = [
        [*name.split(" | "), *(show(found[column]) for column in columns)] for name, found in table.items()
    ]
    return markdown(("condition", "α, all heads", *columns), rows)


if __name__ == "__main__":
    assert __doc__
    run_experiment(__doc__, Path(__file__).parent, study, model="organism", template="", essays="organism")
