"""`ctxlens needle`: recall of a hidden sentence, with and without template."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from ctxlens.cli import _screen, _tables
from ctxlens.cli._inputs import (
    HeadsOption,
    NewTokensOption,
    check_indicator,
    check_steering,
    resolve_heads,
)
from ctxlens.cli._options import ModelOptions, RunOptions, verb
from ctxlens.parsing import parse_spread


@verb(
    "ctxlens needle --needle known --lengths x3 --depths x3",
    "ctxlens needle -m TinyLlama/TinyLlama-1.1B-Chat-v1.0 --haystack essays/ --needle sf --lengths x20",
    "accelerate launch --multi_gpu --num_processes 4 -m ctxlens needle -m HuggingFaceH4/zephyr-7b-beta",
    "ctxlens needle -m runs/train --indicator --conditions template+prefix --out runs/with-indicator",
)
def needle(
    model: ModelOptions,
    store: RunOptions,
    haystack: Annotated[
        str,
        typer.Option(
            help="Folder of .txt files, a data set (file, folder or Hub id), or [b]organism[/b] (filler of "
            "the built-in world).",
            metavar="DIR_OR_HUB_ID",
        ),
    ] = "organism",
    haystack_split: Annotated[str, typer.Option(help="Split of a data set.", metavar="NAME")] = "train",
    haystack_column: Annotated[
        str | None,
        typer.Option(
            help="Column of texts of a data set. [dim]default: text, content, document or the only one[/dim]",
            metavar="NAME",
        ),
    ] = None,
    needle: Annotated[
        str,
        typer.Option(
            help="One or several of sf, pizza, pizza-short (after the paper), known, unknown (facts of the "
            "built-in world) and YAML files, separated by commas."
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
    score: Annotated[
        str,
        typer.Option(
            help="Of recall (share of keywords), contains (word for word), logprob (nats per token of the "
            "needle; alone: nothing is generated)."
        ),
    ] = "recall,contains",
    max_new_tokens: NewTokensOption = 100,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt and new tokens worked on at once.", metavar="N")
    ] = 8192,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="Start the haystack over where it is too short.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the first prompts and stop.")] = False,
) -> None:
    """Hide a sentence in a long text and ask for it: recall with and without chat template."""
    from ctxlens.chat.condition import parse_conditions
    from ctxlens.evals.needle.cells import build_cells
    from ctxlens.evals.needle.config import NeedleConfig
    from ctxlens.evals.needle.haystack import load_haystack
    from ctxlens.evals.needle.needles import parse_needles
    from ctxlens.evals.needle.prompts import describe_cell, render_cell
    from ctxlens.evals.needle.run import run_needle
    from ctxlens.models.attention.steering import Steering
    from ctxlens.processes import Processes

    check_steering(alpha, heads)
    config = NeedleConfig(
        lengths=parse_spread(lengths, int, "--lengths"),
        depths=parse_spread(depths, float, "--depths"),
        needles=parse_needles(needle),
        conditions=parse_conditions(conditions),
        cases_per_cell=cases,
        wording=wording,
        max_new_tokens=max_new_tokens,
        seed=store.seed,
        score=tuple(score.split(",")),
    )
    processes = Processes.join(cpu=model.device.value == "cpu")
    straw = load_haystack(
        haystack, seed=store.seed, repeat=repeat, split=haystack_split, column=haystack_column
    )
    lm = model.load()
    check_indicator(lm, indicator)
    cells = build_cells(lm, config, straw)
    if dry_run:
        for condition in config.conditions:
            _screen.say(
                _screen.printable(
                    describe_cell(lm, cells[0], config, replace(condition, indicator=indicator))
                )
            )
        return
    plain = [render_cell(lm, cell, config, "plain+prefix") for cell in cells[:: max(1, len(cells) // 64)]]
    steering = Steering(alpha, heads=resolve_heads(lm, heads, plain))
    steering.check_heads(lm.n_layers, lm.n_heads)
    settings = {
        "model": lm.identity,
        "haystack": {
            "source": haystack,
            "split": haystack_split,
            "column": haystack_column,
            "repeat": repeat,
        },
        "indicator": indicator,
        "steering": steering.describe(),
        **config.as_dict(),
    }
    if processes.is_first:
        store.open("needle", settings)
    processes.wait()
    run = replace(store, overwrite=False).open("needle", settings)
    with _screen.stage("needles") as progress:
        grid = run_needle(
            lm,
            config,
            haystack=straw,
            indicator=indicator,
            steering=None if steering.changes_nothing else steering,
            batch_tokens=batch_tokens,
            out=run,
            processes=processes,
            progress=progress,
        )
    if processes.is_first:
        _tables.show_needles(grid)
        if repeated := sum(cell.context.repeated for cell in cells):
            _screen.note(
                f"{repeated} of {len(cells)} contexts are longer than the haystack, which started over"
            )
        _screen.say_where(run.folder)
