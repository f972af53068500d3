"""`ctxlens needle`: recall of a sentence hidden in long texts, with and without template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctxlens.cli import _outcomes, _screen, _tables
from ctxlens.cli._inputs import (
    BatchOption,
    HeadsOption,
    Mode,
    ModeOption,
    NewTokensOption,
    check_steering,
    resolve_heads,
)
from ctxlens.cli._options import ModelOptions, RunOptions, note_choice, verb
from ctxlens.cli._output import OutputOptions, count
from ctxlens.cli._plan import tell_plan
from ctxlens.parsing import parse_spread

if TYPE_CHECKING:
    from ctxlens.evals.needle.config import NeedleConfig
    from ctxlens.evals.needle.prompts import Cell
    from ctxlens.models import Model
    from ctxlens.models.attention.steering import Steering
    from ctxlens.runs import Run

_READ_CELLS = 64


# long: one verb with its steps in order
@verb(
    "ctxlens needle --needle known --lengths x3 --depths x3",
    "ctxlens needle -m TinyLlama/TinyLlama-1.1B-Chat-v1.0 --haystack essays/ --needle sf --lengths x20",
    "accelerate launch --multi_gpu --num_processes 4 -m ctxlens needle -m HuggingFaceH4/zephyr-7b-beta",
    "ctxlens needle -m runs/train --indicator --conditions template+prefix --out runs/with-indicator",
)
def needle(
    model: ModelOptions,
    store: RunOptions,
    output: OutputOptions,
    haystack: Annotated[
        str | None,
        typer.Option(
            help="Folder of .txt or .md files, data set (file, folder or Hub id), [b]neutral[/b] (everyday "
            "prose) or [b]organism[/b] (texts of the built-in world). [dim]default: organism for "
            "the built-in "
            "model, else neutral[/dim]",
            metavar="DATA",
        ),
    ] = None,
    haystack_split: Annotated[str, typer.Option(help="Split of the data set.", metavar="NAME")] = "train",
    haystack_column: Annotated[
        str | None,
        typer.Option(
            help="Text column of the data set. [dim]default: text, content, document or the only one[/dim]",
            metavar="NAME",
        ),
    ] = None,
    needle: Annotated[
        str | None,
        typer.Option(
            help="Needles, separated by commas: neutral (invented facts), sf, pizza, pizza-short (after the "
            "paper), known, unknown (facts of the built-in world), or YAML files. [dim]default: known in the "
            "built-in world, else neutral[/dim]",
            metavar="NEEDLES",
        ),
    ] = None,
    lengths: Annotated[
        str,
        typer.Option(
            help="Context lengths in tokens, such as 200,1000; x5 spreads five over the window.",
            metavar="LENGTHS",
        ),
    ] = "x5",
    depths: Annotated[
        str,
        typer.Option(
            help="Depths of the needle in percent, such as 0,50,100; x5 spreads five.", metavar="DEPTHS"
        ),
    ] = "x5",
    conditions: Annotated[
        str,
        typer.Option(
            help="Conditions, separated by commas: plain (no chat template), template, or assistant (context "
            "in the assistant's turn), then +prefix as needed (the answer starts with the needle's first "
            "words). --indicator and --alpha apply to all of them.",
            metavar="CONDITIONS",
        ),
    ] = "plain+prefix,template+prefix",
    cases: Annotated[
        int, typer.Option(min=1, help="Number of contexts for each length and depth.", metavar="N")
    ] = 1,
    wording: Annotated[
        str,
        typer.Option(
            help="bare, document, passage, only, or a text with {context} and {question}.", metavar="WORDING"
        ),
    ] = "bare",
    indicator: Annotated[
        bool, typer.Option("--indicator", help="Append the model's indicator to the question.")
    ] = False,
    alpha: Annotated[
        float, typer.Option(help="Steer to the user's tokens; 1 means no steering.", metavar="A")
    ] = 1.0,
    mode: ModeOption = Mode.PAPER,
    heads: HeadsOption = "all",
    score: Annotated[
        str,
        typer.Option(
            help="Scores, separated by commas: recall (share of the keywords), contains (word for word), "
            "logprob (nats per token of the needle; if it is the only score, no answer is generated).",
            metavar="SCORES",
        ),
    ] = "recall,contains",
    max_new_tokens: NewTokensOption = 100,
    batch_tokens: BatchOption = 8192,
    repeat: Annotated[bool, typer.Option("--repeat", help="Repeat the haystack if it is too short.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the first prompts and stop.")] = False,
) -> None:
    """Hide a sentence in long texts and measure how well a model recalls it, with and without template."""
    from ctxlens.chat.condition import parse_conditions
    from ctxlens.evals.needle.cells import build_cells
    from ctxlens.evals.needle.study import plan_needles
    from ctxlens.processes import Processes

    study = plan_needles(
        model.model,
        haystack=haystack,
        needles=needle,
        split=haystack_split,
        column=haystack_column,
        repeat=repeat,
        lengths=parse_spread(lengths, int, "--lengths"),
        depths=parse_spread(depths, float, "--depths"),
        conditions=parse_conditions(conditions),
        cases_per_cell=cases,
        wording=wording,
        max_new_tokens=max_new_tokens,
        seed=store.seed,
        score=tuple(score.split(",")),
    )
    config = study.config
    _check(model, store, {"indicator": indicator, **config.as_dict()}, alpha, mode, heads)
    processes = Processes.join(cpu=model.device.value == "cpu")
    straw = study.load_haystack()
    from ctxlens.evals.needle.run import run_needle
    from ctxlens.models.indicator_token import require_indicator

    lm = model.load()
    if indicator:
        require_indicator(lm)
    cells = build_cells(lm, config, straw)
    if dry_run:
        _print_prompts(lm, cells[0], config, indicator)
        return
    steering = _steering(lm, cells, config, alpha, mode, heads)
    settings = {
        "model": lm.identity, "haystack": study.describe_source(), "indicator": indicator,
        "steering": steering.describe(), **config.as_dict(),
    }  # fmt: skip
    run = store.open_together("needle", settings, processes, lm)
    if not run.has("needle.parquet"):
        asked = len(cells) * len(config.conditions)
        tokens = sum(cell.context_tokens for cell in cells) * len(config.conditions)
        writes = 0 if config.score == ("logprob",) else asked * max_new_tokens
        what = f"{count(len(cells), 'cell')} under {count(len(config.conditions), 'condition')}"
        tell_plan(lm, what, tokens, lambda some: lm.generate(some, max_new_tokens=1), written=writes)
    with _screen.stage("needles") as progress:
        grid = run_needle(
            lm, config, haystack=straw, indicator=indicator,
            steering=None if steering.changes_nothing else steering,
            batch_tokens=batch_tokens, out=run, processes=processes, progress=progress,
        )  # fmt: skip
    if processes.is_first:
        output.show(
            lambda: _outcomes.needle_outcome(grid, lm.name, run.folder),
            lambda: (_tables.show_needles(grid), _screen.say_wrapped([_outcomes.say_needles(grid)])),
        )
        _note_results(cells, study.texts.note, run)


def _check(
    model: ModelOptions, store: RunOptions, known: Mapping[str, Any], alpha: float, mode: Mode, heads: str
) -> None:
    """Refuse a model, run folder or steering that cannot be used, before anything heavy is imported."""
    model.check()
    store.check("needle", {"model": model.known, **known})
    check_steering(alpha, heads, mode=mode)


def _print_prompts(model: Model, cell: Cell, config: NeedleConfig, indicator: bool) -> None:
    """Print the prompt of one cell under every condition."""
    from ctxlens.evals.needle.prompts import describe_cell

    note_choice(model)
    for condition in config.conditions:
        _screen.say(
            _screen.printable(describe_cell(model, cell, config, replace(condition, indicator=indicator)))
        )


def _steering(
    model: Model, cells: Sequence[Cell], config: NeedleConfig, alpha: float, mode: Mode, heads: str
) -> Steering:
    """The steering of --alpha, --mode and --heads; retrieval heads come from about 64 plain prompts."""
    from ctxlens.evals.needle.prompts import render_cell
    from ctxlens.models.attention.steering import Steering

    read = cells[:: max(1, len(cells) // _READ_CELLS)]
    plain = [render_cell(model, cell, config, "plain+prefix") for cell in read]
    steering = Steering(alpha, heads=resolve_heads(model, heads, plain), mode=mode.value)
    steering.check_heads(model.n_layers, model.n_heads)
    return steering


def _note_results(cells: Sequence[Cell], chosen: str, run: Run) -> None:
    """Print the texts that were chosen by default, and where the results are."""
    _screen.note_texts(chosen)
    _note_repeated(cells)
    _screen.say_where(run.folder)


def _note_repeated(cells: Sequence[Cell]) -> None:
    if repeated := sum(cell.context.repeated for cell in cells):
        _screen.note(
            f"{repeated} of {len(cells)} contexts are longer than the haystack, which is repeated in them"
        )
