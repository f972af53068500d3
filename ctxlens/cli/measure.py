"""The verb that measures recall: needle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxlens.cli import _screen, _tables
from ctxlens.cli._inputs import (
    HeadsOption,
    NewTokensOption,
    check_indicator,
    check_steering,
    parse_spread,
    resolve_heads,
)
from ctxlens.cli._options import ModelOptions, RunOptions, verb


@verb(
    "ctxlens needle --needle known --lengths x3 --depths x3",
    "ctxlens needle -m TinyLlama/TinyLlama-1.1B-Chat-v1.0 --haystack essays/ --needle sf --lengths x20",
    "ctxlens needle -m runs/train --indicator --conditions template+prefix --out runs/with-indicator",
)
def needle(
    model: ModelOptions,
    store: RunOptions,
    haystack: Annotated[
        str,
        typer.Option(
            help="Folder of .txt files, or [b]organism[/b] (filler of the built-in world).", metavar="DIR"
        ),
    ] = "organism",
    needle: Annotated[
        str,
        typer.Option(
            help="sf or pizza (the paper's), known or unknown (facts of the built-in world), or a YAML file."
        ),
    ] = "known",
    lengths: Annotated[
        str,
        typer.Option(help="Context lengths in tokens, such as 200,1000; x5: five, spread over the window."),
    ] = "x5",
    depths: Annotated[
        str, typer.Option(help="Depths of the needle in percent, such as 0,50,100; x5: five from 0 to 100.")
    ] = "x5",
    conditions: Annotated[
        str, typer.Option(help="Of plain+prefix, template+prefix, template, assistant+prefix.")
    ] = "plain+prefix,template+prefix",
    cases: Annotated[int, typer.Option(min=1, help="Contexts of each length and depth.")] = 1,
    wording: Annotated[
        str, typer.Option(help="bare, document, passage, only, or a text with {context} and {question}.")
    ] = "bare",
    indicator: Annotated[bool, typer.Option("--indicator", help="Append the model's indicator.")] = False,
    alpha: Annotated[float, typer.Option(help="Steer to the user's tokens; 1: not at all.")] = 1.0,
    heads: HeadsOption = "all",
    max_new_tokens: NewTokensOption = 100,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="Start the haystack over where it is too short.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the first prompts and stop.")] = False,
) -> None:
    """Hide a sentence in a long text and ask for it: recall with and without chat template."""
    from ctxlens.cells import NeedleConfig, build_cells, describe_cell, render_cell
    from ctxlens.haystack import load_haystack
    from ctxlens.needle import run_needle
    from ctxlens.recall import load_needles
    from ctxlens.steering import Steering

    check_steering(alpha, heads)
    config = NeedleConfig(
        lengths=parse_spread(lengths, int, "--lengths"),
        depths=parse_spread(depths, float, "--depths"),
        needles=load_needles(needle)
        if Path(needle).suffix in (".yaml", ".yml")
        else tuple(needle.split(",")),
        conditions=tuple(conditions.split(",")),
        cases_per_cell=cases,
        wording=wording,
        max_new_tokens=max_new_tokens,
        seed=store.seed,
    )
    straw = load_haystack(haystack, seed=store.seed)
    lm = model.load()
    check_indicator(lm, indicator)
    cells = build_cells(lm, config, straw)
    if dry_run:
        for condition in config.conditions:
            _screen.say(
                _screen.printable(describe_cell(lm, cells[0], config, condition, indicator=indicator))
            )
        return
    plain = [render_cell(lm, cell, config, "plain+prefix") for cell in cells[:: max(1, len(cells) // 64)]]
    steering = Steering(alpha, heads=resolve_heads(lm, heads, plain))
    steering.check_heads(lm.n_layers, lm.n_heads)
    settings = {"indicator": indicator, "steering": steering.describe()}
    run = store.open("needle", {"model": lm.identity, "haystack": haystack, **settings, **config.as_dict()})
    with _screen.stage("needles") as progress:
        grid = run_needle(
            lm,
            config,
            haystack=straw,
            indicator=indicator,
            steering=None if steering.changes_nothing else steering,
            out=run,
            progress=progress,
        )
    _tables.show_recall(grid)
    _screen.say_where(run.folder)
