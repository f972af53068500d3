"""Verbs that trace the bias to its source: score, select."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxlens.cli import _screen, _tables
from ctxlens.cli._inputs import parse_numbers, parse_threshold
from ctxlens.cli._options import ModelOptions, RunOptions, verb

LayoutOption = Annotated[
    str | None, typer.Option(help="messages, sharegpt, alpaca or prompt-completion; found out by default.")
]


@verb(
    "ctxlens score --dataset data.jsonl",
    "ctxlens score -m seed-model --dataset HuggingFaceH4/ultrachat_200k --split train_sft --limit 5000",
    "ctxlens select --scores runs/scores --threshold valley",
)
def score(
    dataset: Annotated[
        str, typer.Option(help="File, folder or Hub id of conversations.", metavar="PATH_OR_HUB_ID")
    ],
    model: ModelOptions,
    store: RunOptions,
    layers: Annotated[
        str | None, typer.Option(help="Layers to score, such as 10,15; all by default.")
    ] = None,
    layout: LayoutOption = None,
    split: Annotated[str, typer.Option(help="Split of a folder or Hub data set.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first N rows.", metavar="N")] = None,
) -> None:
    """Score how much every answer of a data set attends to what the user wrote (with a seed SFT model)."""
    from ctxlens.data import load_conversations
    from ctxlens.dependency import check_layers, score_conversations

    wanted = parse_numbers(layers, int, "--layers") if layers else None
    data = load_conversations(dataset, split=split, layout=layout, limit=limit)
    lm = model.load()
    check_layers(lm, wanted)
    config = {
        "model": lm.identity, "dataset": dataset, "split": split, "layout": data.layout, "limit": limit,
        "layers": wanted,
    }  # fmt: skip
    run = store.open("score", config)
    with _screen.stage("scores") as progress:
        scores = score_conversations(lm, data, layers=wanted, out=run, progress=progress)
    unread = [{"conversation": name, "reason": reason} for name, reason in data.skipped]
    run.write_json("skipped.json", [*unread, *scores.meta["skipped"]])
    _tables.show_scores(scores, unread, data.dropped)
    _screen.say_where(run.folder)


@verb(
    "ctxlens select --scores runs/scores --threshold valley",
    "ctxlens select --scores runs/scores --dataset data.jsonl --threshold 0.6 --layer 15 --out runs/selected",
    "ctxlens train --config recipe.yaml selection=runs/selected",
)
def select(
    scores: Annotated[Path, typer.Option(help="Run folder of ctxlens score.", metavar="DIR")],
    store: RunOptions,
    threshold: Annotated[
        str,
        typer.Option(
            help="β: scores above it are chosen, 0 to 1 (the paper: 0.6); valley, otsu: from the data."
        ),
    ] = "valley",
    layer: Annotated[
        int | None, typer.Option(help="Layer whose scores decide; by default the paper's depth, 15 of 22.")
    ] = None,
    reduction: Annotated[
        str, typer.Option(help="mean_of_best (the paper's code), best_of_mean (its text) or mean_heads.")
    ] = "mean_of_best",
    top_share: Annotated[
        float | None, typer.Option(help="Choose this share of the turns instead, 0 to 1.", metavar="SHARE")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="The scored data: written to selected.jsonl with the indicator.", metavar="PATH_OR_HUB_ID"
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a folder or Hub data set.")] = "train",
    layout: LayoutOption = None,
    indicator: Annotated[str, typer.Option(help="The indicator to append.")] = "[IND]",
) -> None:
    """Choose the context-dependent answers by their scores; with --dataset also write the marked data."""
    from ctxlens.data import load_conversations
    from ctxlens.indicator import annotate_messages, write_annotated
    from ctxlens.results import Scores
    from ctxlens.selection import choose_layer, select_turns

    path = scores / "scores.parquet" if scores.is_dir() else scores
    table = Scores.load(path)
    scored = sorted(table.frame["layer"].unique().tolist())
    middle = choose_layer(max(scored) + 1, rule="middle")
    deciding = min(scored, key=lambda one: abs(one - middle)) if layer is None else layer
    chosen = select_turns(
        table, beta=parse_threshold(threshold), layer=deciding, reduction=reduction, top_share=top_share
    )
    marked = None
    if dataset:
        marked = annotate_messages(load_conversations(dataset, split=split, layout=layout), chosen.turns)
    run = store.open(
        "select", {"scores": str(path), **chosen.meta, "dataset": dataset, "indicator": indicator}
    )
    run.save("selection.parquet", chosen)
    if marked is not None:
        write_annotated(run.path("selected.jsonl"), marked, indicator)
    _tables.show_selection(chosen)
    _screen.say_where(run.folder)
