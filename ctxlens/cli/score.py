"""`ctxlens score`: context-dependency scores of every turn in a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctxlens.cli import _outcomes, _screen, _tables
from ctxlens.cli._options import LayoutOption, ModelOptions, RunOptions, verb
from ctxlens.cli._output import OutputOptions
from ctxlens.cli._plan import tell_plan_later
from ctxlens.errors import InputError
from ctxlens.parsing import check_part, parse_numbers

if TYPE_CHECKING:
    from ctxlens.chat.data import Conversation
    from ctxlens.models import Model
    from ctxlens.runs import Run


# long: one verb with its steps in order
@verb(
    "ctxlens score --dataset data.jsonl",
    "ctxlens score -m seed-model --dataset HuggingFaceH4/ultrachat_200k --split train_sft --limit 5000",
    "accelerate launch --multi_gpu --num_processes 8 -m ctxlens score -m seed-model --dataset data.jsonl",
    "ctxlens score -m seed-model --dataset data.jsonl --part 0/16 --out shared/scores",
    "ctxlens score --merge shared/scores",
)
def score(
    model: ModelOptions,
    store: RunOptions,
    output: OutputOptions,
    dataset: Annotated[
        str | None, typer.Option(help="Conversations: file, folder or Hub id.", metavar="DATA")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers to score, such as 10,15, or all. [dim]default: up to depth 15 of 22[/dim]",
            metavar="LAYERS",
        ),
    ] = None,
    layout: LayoutOption = None,
    split: Annotated[str, typer.Option(help="Split of a folder or Hub data set.", metavar="NAME")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N rows.", metavar="N")] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read the data while scoring, without loading them first.")
    ] = False,
    drop_refusals: Annotated[
        bool, typer.Option("--drop-refusals", help="Leave out conversations with a refusal.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Truncate conversations to N tokens. [dim]default: the window[/dim]", metavar="N"
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Padded tokens of one batch. [dim]default: 1024 on a CPU, else 8192[/dim]",
            metavar="N",
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Number format of stored scores: float32 or float16.", metavar="DTYPE")
    ] = ("float32"),
    lp_gap: Annotated[
        bool,
        typer.Option(
            "--lp-gap",
            help="Add how much likelier the user's text makes each answer (two more full passes).",
        ),
    ] = False,
    sinks: Annotated[
        bool,
        typer.Option(
            "--sinks", help="Also store what of each role's share rests on attention sinks; the score stays."
        ),
    ] = False,
    needle_layer: Annotated[
        bool,
        typer.Option(
            "--needle-layer",
            help="Also find the layer whose heads attend to a hidden fact (24 short texts), for "
            "select --layer needle.",
        ),
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(help="Score part K of N, such as 0/16, as one of N jobs.", metavar="K/N"),
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option(help="Merge the parts in this folder into one table.", metavar="DIR"),
    ] = None,
) -> None:
    """Score how much every answer in a data set attends to the user's text, with a fine-tuned seed model."""
    from ctxlens.chat.data import open_conversations
    from ctxlens.processes import Processes
    from ctxlens.results.scores import check_precision
    from ctxlens.runs import Run

    if merge is not None:
        run = Run.read(merge)
        from ctxlens.scoring import merge_shards

        _show_scores(run, merge_shards(run), output)
        return
    if dataset is None:
        raise InputError("give a data set to score as --dataset, or a folder of scored parts as --merge.")
    if lp_gap and part is not None:
        raise InputError("--lp-gap needs all scores: merge the parts first, then give it without --part.")
    if needle_layer and part is not None:
        raise InputError("--needle-layer is found once: give it without --part, when the parts are merged.")
    check_precision(precision)
    model.check()
    wanted = layers if layers in (None, "all") else parse_numbers(layers, int, "--layers")
    piece = _parse_part(part)
    processes = Processes.join(cpu=model.device.value == "cpu")
    read = {"split": split, "limit": limit, "drop_refusals": drop_refusals}
    store.check("score", {"model": model.known, "dataset": dataset, **read, "precision": precision})
    data = open_conversations(dataset, layout=layout, streaming=streaming, **read)

    from ctxlens.scoring import Settings, score_to_run
    from ctxlens.scoring.layers import DEFAULT_LAYER_RULE, NEEDLE_RULES

    lm = model.load()
    settings = Settings.of(
        lm, layers=wanted, max_tokens=max_tokens, batch_tokens=batch_tokens, precision=precision,
        sinks=sinks,
    )  # fmt: skip
    config = {
        "model": lm.identity, "dataset": dataset, **read, "layout": data.layout,
        "layers": list(settings.layers), "max_tokens": settings.max_tokens, "precision": precision,
        **({"sinks": True} if sinks else {}),
    }  # fmt: skip
    run = store.open_together("score", config, processes, lm)
    rows = f"first {limit:,} rows" if limit else "all rows"
    tell_plan_later(
        lm, f"{rows} of {dataset}, {len(settings.layers)} layers, at most {settings.max_tokens:,} tokens each"
    )
    with _screen.stage("scores") as progress:
        meta = score_to_run(
            lm, data, settings, run,
            progress=progress if processes.is_first else None,
            processes=processes, part=piece, notice=_screen.note,
        )  # fmt: skip
    if not processes.is_first:
        return
    if meta is None:
        _screen.note(f"part {part} is done; when all parts are done, run: ctxlens score --merge {run.folder}")
        return
    if lp_gap:
        _add_lp_gap(run, lm, data, settings.batch_tokens)
    if needle_layer or DEFAULT_LAYER_RULE in NEEDLE_RULES:
        _find_needle_layers(run, lm, settings.batch_tokens)
    _show_scores(run, meta, output)


def _add_lp_gap(run: Run, lm: Model, data: Iterable[Conversation], batch_tokens: int) -> None:
    """Add the gap to a run's scores, unless they have it."""
    from ctxlens.results import Scores
    from ctxlens.scoring.lp_gap import add_lp_gap
    from ctxlens.scoring.selection import LP_GAP

    scores = Scores.load(run.path("scores.parquet"))
    if LP_GAP in scores.frame:
        return
    with _screen.stage("lp_gap") as progress:
        scores = add_lp_gap(lm, data, scores, batch_tokens=batch_tokens, progress=progress)
    run.save("scores.parquet", scores)


def _find_needle_layers(run: Run, lm: Model, batch_tokens: int) -> None:
    """Write how much every layer's heads attend to a hidden fact, unless the run has it."""
    from ctxlens.heads import find_needle_layers
    from ctxlens.scoring.layers import NEEDLE_LAYERS

    if run.has(NEEDLE_LAYERS):
        return
    with _screen.stage("needle layer"):
        found = find_needle_layers(lm, batch_tokens=batch_tokens)
    rows = found.table.to_dict(orient="records")
    shares = found.shares.tolist()
    run.write_json(NEEDLE_LAYERS, [{**row, "by_head": one} for row, one in zip(rows, shares, strict=True)])


def _parse_part(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    try:
        number, jobs = map(int, text.split("/"))
    except ValueError:
        raise InputError(
            f"--part got {text!r}; expected the part's number and the number of parts, such as 0/16."
        ) from None
    check_part((number, jobs))
    return number, jobs


def _show_scores(run: Run, meta: Mapping[str, Any], output: OutputOptions) -> None:
    from ctxlens.chat.data import add_skipped

    skipped = run.read_json("skipped.json")
    read = meta["conversations"] + meta["data"]["rows_left_out"]
    reading = {key: meta["data"][key] for key in ("layout", "turns_dropped")}
    counts = add_skipped(
        {**reading, "rows_read": read}, [(entry["conversation"], entry["reason"]) for entry in skipped]
    )
    if run.manifest.get("rows") != counts:
        run.record("rows", counts)
    path = run.path("scores.parquet")
    output.show(
        lambda: _outcomes.records_outcome(
            "score", _tables.score_records(path, meta), _tables.say_scores(path, meta),
            str(run.manifest["config"]["model"]["name"]), run.folder,
        ),
        lambda: _tables.show_scores(path, meta, skipped),
    )  # fmt: skip
    _screen.say_where(run.folder)
