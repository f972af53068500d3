"""Verbs that trace the bias to its source: score, select."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctxlens.cli import _screen, _tables
from ctxlens.cli._inputs import parse_threshold
from ctxlens.cli._options import Backend, ModelOptions, RunOptions, verb
from ctxlens.errors import InputError
from ctxlens.parsing import parse_numbers

if TYPE_CHECKING:
    from ctxlens.chat.data import Conversation, ConversationSet
    from ctxlens.models import Model
    from ctxlens.results import Scores
    from ctxlens.runs import Run

LayoutOption = Annotated[
    str | None, typer.Option(help="messages, sharegpt, alpaca or prompt-completion; found out by default.")
]


@dataclass(frozen=True)
class ScoringOptions(ModelOptions):
    """Which model, and how it is run; on the backend that needs no L×L pattern unless told otherwise."""

    backend: Annotated[
        Backend,
        typer.Option(help="transformers itself (native: fast, little memory), or TransformerLens (lens)."),
    ] = Backend.native


@verb(
    "ctxlens score --dataset data.jsonl",
    "ctxlens score -m seed-model --dataset HuggingFaceH4/ultrachat_200k --split train_sft --limit 5000",
    "accelerate launch --multi_gpu --num_processes 8 -m ctxlens score -m seed-model --dataset data.jsonl",
    "ctxlens score -m seed-model --dataset data.jsonl --part 0/16 --out shared/scores",
    "ctxlens score --merge shared/scores",
)
def score(
    model: ScoringOptions,
    store: RunOptions,
    dataset: Annotated[
        str | None, typer.Option(help="File, folder or Hub id of conversations.", metavar="PATH_OR_HUB_ID")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to score, such as 10,15, or all; by default all up to depth 15 of 22."),
    ] = None,
    layout: LayoutOption = None,
    split: Annotated[str, typer.Option(help="Split of a folder or Hub data set.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first N rows.", metavar="N")] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read a Hub data set or table while scoring it.")
    ] = False,
    drop_refusals: Annotated[
        bool, typer.Option("--drop-refusals", help="Leave out conversations in which an answer is a refusal.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Truncate to fewer tokens than the model's window.", metavar="N")
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Padded tokens in one forward pass; 1024 on a CPU, else 8192 by default.", metavar="N"
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="Number format of stored scores: float32, float16.")] = (
        "float32"
    ),
    lp_gap: Annotated[
        bool,
        typer.Option(
            "--lp-gap",
            help="Add how much likelier each answer is for what the user wrote; two full passes more.",
        ),
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(help="Score only this part, such as 0/16, as one of several jobs.", metavar="K/N"),
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option(help="Put together what all parts have scored into this folder.", metavar="DIR"),
    ] = None,
) -> None:
    """Score how much every answer of a data set attends to what the user wrote (with a seed SFT model)."""
    from ctxlens.chat.data import open_conversations
    from ctxlens.processes import Processes
    from ctxlens.runs import Run
    from ctxlens.scoring import Settings, merge_shards, score_to_run

    if merge is not None:
        run = Run.read(merge)
        _show_scores(run, merge_shards(run))
        return
    if dataset is None:
        raise InputError("give the data set to score as --dataset, or the folder of scored parts as --merge.")
    if lp_gap and part is not None:
        raise InputError("--lp-gap is added to merged scores: merge the parts, then give it without --part.")
    wanted = layers if layers in (None, "all") else parse_numbers(layers, int, "--layers")
    piece = _parse_part(part)
    processes = Processes.join(cpu=model.device.value == "cpu")
    read = {"split": split, "limit": limit, "drop_refusals": drop_refusals}
    data = open_conversations(dataset, layout=layout, streaming=streaming, **read)
    lm = model.load()
    settings = Settings.of(
        lm, layers=wanted, max_tokens=max_tokens, batch_tokens=batch_tokens, precision=precision
    )
    config = {
        "model": lm.identity, "dataset": dataset, **read, "layout": data.layout,
        "layers": list(settings.layers), "max_tokens": settings.max_tokens, "precision": precision,
    }  # fmt: skip
    if processes.is_first:
        store.open("score", config)
    processes.wait()
    run = replace(store, overwrite=False).open("score", config)
    with _screen.stage("scores") as progress:
        meta = score_to_run(
            lm, data, settings, run,
            progress=progress if processes.is_first else None,
            processes=processes, part=piece, notice=_screen.note,
        )  # fmt: skip
    if not processes.is_first:
        return
    if meta is None:
        _screen.note(f"part {part} is done; when all are: ctxlens score --merge {run.folder}")
        return
    if lp_gap:
        _add_lp_gap(run, lm, data, settings.batch_tokens)
    _show_scores(run, meta)


def _add_lp_gap(run: Run, lm: Model, data: Iterable[Conversation], batch_tokens: int) -> None:
    """Add the gap to a run's scores, once."""
    from ctxlens.results import Scores
    from ctxlens.scoring.lp_gap import add_lp_gap
    from ctxlens.scoring.selection import LP_GAP

    scores = Scores.load(run.path("scores.parquet"))
    if LP_GAP in scores.frame:
        return
    with _screen.stage("lp_gap") as progress:
        scores = add_lp_gap(lm, data, scores, batch_tokens=batch_tokens, progress=progress)
    run.save("scores.parquet", scores)


def _parse_part(text: str | None) -> tuple[int, int]:
    from ctxlens.scoring import check_part

    if text is None:
        return 0, 1
    try:
        number, jobs = map(int, text.split("/"))
    except ValueError:
        raise InputError(
            f"--part got {text!r}; expected number and count of the parts, such as 0/16."
        ) from None
    check_part((number, jobs))
    return number, jobs


def _show_scores(run: Run, meta: Mapping[str, Any]) -> None:
    _tables.show_scores(run.path("scores.parquet"), meta, run.read_json("skipped.json"))
    _screen.say_where(run.folder)


@verb(
    "ctxlens select --scores runs/scores --threshold mixture",
    "ctxlens select --scores runs/scores --dataset data.jsonl --threshold 0.6 --layer 15 --out runs/selected",
    "ctxlens select --scores runs/scores --dataset data.jsonl --per-length-quantile 0.9",
    "ctxlens select --undo runs/selected/selected.jsonl",
    "ctxlens train --config recipe.yaml selection=runs/selected",
)
def select(
    store: RunOptions,
    scores: Annotated[Path | None, typer.Option(help="Run folder of ctxlens score.", metavar="DIR")] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            help="β: scores above it are chosen, 0 to 1 (the paper: 0.6); mixture (default), valley, otsu: "
            "from the scores."
        ),
    ] = None,
    top_share: Annotated[
        float | None, typer.Option(help="Choose this share of the turns instead, 0 to 1.", metavar="SHARE")
    ] = None,
    per_length_quantile: Annotated[
        float | None,
        typer.Option(
            help="Choose the turns above this quantile of those with as much context instead.", metavar="Q"
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Layer whose scores decide; by default the paper's depth, 15 of 22.")
    ] = None,
    reduction: Annotated[
        str,
        typer.Option(help="mean_of_best (the paper's code), best_of_mean (its text), mean_heads or lp_gap."),
    ] = "mean_of_best",
    dataset: Annotated[
        str | None,
        typer.Option(
            help="The scored data: written as selected.jsonl (or .parquet), in its own layout, with the "
            "indicator.",
            metavar="PATH_OR_HUB_ID",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of a folder or Hub data set. [dim]default: as scored[/dim]")
    ] = None,
    layout: LayoutOption = None,
    indicator: Annotated[str, typer.Option(help="The indicator to append.")] = "[IND]",
    allow_existing: Annotated[
        bool, typer.Option("--allow-existing", help="Accept data that hold the indicator's text already.")
    ] = False,
    source_column: Annotated[
        str | None, typer.Option(help="Column that says where a row came from, for the data card.")
    ] = None,
    undo: Annotated[
        Path | None,
        typer.Option(help="A file that select has written: give back its rows as they were.", metavar="FILE"),
    ] = None,
) -> None:
    """Choose the context-dependent answers by their scores; with --dataset also write the marked data."""
    from ctxlens.chat.data.marked_files import check_unmarked, marked_suffix, write_marked
    from ctxlens.models.indicator_token import annotate_messages
    from ctxlens.results import Scores
    from ctxlens.runs import write_atomic
    from ctxlens.scoring.card import card_markdown, make_card
    from ctxlens.scoring.selection import check_scored, select_turns

    if undo is not None:
        choices = (scores, threshold, top_share, per_length_quantile, layer, dataset, split, layout)
        _undo(undo, store, alone=all(choice is None for choice in choices))
        return
    if scores is None:
        raise InputError(
            "give the run folder of ctxlens score as --scores, or a file to take back as --undo."
        )
    path = scores / "scores.parquet" if scores.is_dir() else scores
    table = Scores.load(path)
    deciding = _deciding_layer(table, layer, reduction)
    chosen = select_turns(
        table,
        beta=None if threshold is None else parse_threshold(threshold),
        layer=deciding,
        reduction=reduction,
        top_share=top_share,
        per_length_quantile=per_length_quantile,
    )
    config: dict[str, Any] = {"scores": str(path), **chosen.meta, "dataset": dataset}
    data = None
    if dataset is not None:
        data, read = _scored_data(scores, dataset, split, layout)
        config |= {**read, "content": check_scored(table, data), "indicator": indicator}
        if not allow_existing:
            check_unmarked(data, indicator)
        marked = annotate_messages(data, chosen.turns)
    card = make_card(table, chosen, data, source_column=source_column)
    run = store.open("select", {**config, "source_column": source_column})
    if dataset is not None and data is not None:
        place = run.path(f"selected{marked_suffix(dataset)}")
        write_marked(place, dataset, marked, layout=data.layout, split=config["split"], indicator=indicator)
    run.save("selection.parquet", chosen)
    run.write_json("card.json", card)
    write_atomic(run.path("card.md"), card_markdown(card))
    _tables.show_selection(chosen)
    _screen.say_where(run.folder)


def _deciding_layer(table: Scores, layer: int | None, reduction: str) -> int | None:
    """The layer asked for; else, where the score has layers, the scored one nearest to the paper's depth."""
    from ctxlens.scoring.selection import LP_GAP, choose_layer

    if layer is not None or reduction == LP_GAP:
        return layer
    scored = sorted(table.frame["layer"].unique().tolist())
    if not scored:
        return None
    middle = choose_layer(table.meta.get("n_layers", max(scored) + 1), rule="middle")
    return min(scored, key=lambda one: abs(one - middle))


def _scored_data(
    scores: Path, dataset: str, split: str | None, layout: str | None
) -> tuple[ConversationSet, dict[str, Any]]:
    """The data set, read as it was for the scores unless told otherwise, and how it was read."""
    from ctxlens.chat.data import load_conversations
    from ctxlens.runs import MANIFEST, Run

    known = Run.read(scores).manifest.get("config") or {} if (scores / MANIFEST).is_file() else {}
    read = {"split": split or known.get("split") or "train", "limit": known.get("limit")}
    if known.get("drop_refusals"):
        read["drop_refusals"] = True
    data = load_conversations(dataset, layout=layout or known.get("layout"), **read)
    return data, {**read, "layout": data.layout}


def _undo(file: Path, store: RunOptions, *, alone: bool) -> None:
    from ctxlens.chat.data.marked_files import check_marked, marked_suffix, unmark_file
    from ctxlens.cli._inputs import describe_file

    if not alone:
        raise InputError("--undo takes back a file that select has written; give it alone, or with --out.")
    check_marked(file)
    run = store.open("undo", describe_file(file))
    marks = unmark_file(file, run.path(f"original{marked_suffix(file)}"))
    _screen.say(f"{marks.indicators} indicators taken out of {marks.marked_rows} of {marks.rows} rows")
    _screen.note(f"rows as they were in {run.folder}")
