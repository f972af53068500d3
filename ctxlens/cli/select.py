"""`ctxlens select`: choose the turns whose answers depend on the context."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctxlens.cli import _outcomes, _screen, _tables
from ctxlens.cli._inputs import parse_threshold
from ctxlens.cli._options import LayoutOption, RunOptions, verb
from ctxlens.cli._output import OutputOptions
from ctxlens.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from ctxlens.chat.data import ConversationSet
    from ctxlens.results import Scores

_META = ("selected", "turns", "threshold", "rule", "layer", "reduction")


# long: one verb with its steps in order
@verb(
    "ctxlens select --scores runs/scores --threshold mixture",
    "ctxlens select --scores runs/scores --dataset data.jsonl --threshold 0.6 --layer 15 --out runs/selected",
    "ctxlens select --scores runs/scores --dataset data.jsonl --per-length-quantile 0.9",
    "ctxlens select --scores runs/scores --top-share 0.3 --layer residual",
    "ctxlens select --undo runs/selected/selected.jsonl",
    "ctxlens train --config recipe.yaml selection=runs/selected",
)
def select(
    store: RunOptions,
    output: OutputOptions,
    scores: Annotated[Path | None, typer.Option(help="Run folder of ctxlens score.", metavar="DIR")] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            help="β, from 0 to 1 (paper: 0.6): scores above it are selected. Or a rule that estimates β from "
            "the scores: mixture, valley or otsu. [dim]default: mixture[/dim]",
            metavar="BETA",
        ),
    ] = None,
    top_share: Annotated[
        float | None, typer.Option(help="Select this share of the turns instead, 0 to 1.", metavar="SHARE")
    ] = None,
    per_length_quantile: Annotated[
        float | None,
        typer.Option(
            help="Select turns above this quantile among turns of similar context length instead.",
            metavar="Q",
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Layer whose scores decide: its number, or a rule that finds it: middle (depth 15 of 22, "
            "as in the paper), needle, needle-mean, residual or gap. [dim]default: middle[/dim]",
            metavar="LAYER",
        ),
    ] = None,
    reduction: Annotated[
        str,
        typer.Option(
            help="mean_of_best (paper's code), best_of_mean (paper's text), mean_heads or lp_gap.",
            metavar="NAME",
        ),
    ] = "mean_of_best",
    dataset: Annotated[
        str | None,
        typer.Option(
            help="The scored data. They are written to selected.jsonl (or .parquet) in their own layout, "
            "with the indicator.",
            metavar="DATA",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Split of a folder or Hub data set. [dim]default: as scored[/dim]", metavar="NAME"),
    ] = None,
    layout: LayoutOption = None,
    indicator: Annotated[str, typer.Option(help="The indicator to append.", metavar="TEXT")] = "[IND]",
    allow_existing: Annotated[
        bool, typer.Option("--allow-existing", help="Accept data that already contain the indicator's text.")
    ] = False,
    source_column: Annotated[
        str | None,
        typer.Option(help="Column with the source of each row, for the data card.", metavar="NAME"),
    ] = None,
    undo: Annotated[
        Path | None,
        typer.Option(help="File that select wrote; restores its original rows.", metavar="FILE"),
    ] = None,
) -> None:
    """Select context-dependent answers by their scores; with --dataset, also write the marked data."""
    if undo is None:
        check_scores(scores)
    from ctxlens.chat.data import describe_reading
    from ctxlens.chat.data.annotate import annotate_messages
    from ctxlens.chat.data.marked_files import check_unmarked, marked_suffix, write_marked
    from ctxlens.files import write_atomic
    from ctxlens.results import Scores
    from ctxlens.scoring.card import card_markdown, make_card
    from ctxlens.scoring.selection import check_scored, select_turns

    if undo is not None:
        choices = (scores, threshold, top_share, per_length_quantile, layer, dataset, split, layout)
        _undo(undo, store, alone=all(choice is None for choice in choices))
        return
    assert scores is not None
    path = scores / "scores.parquet" if scores.is_dir() else scores
    table = Scores.load(path)
    deciding = _deciding_layer(table, layer, reduction, path.parent)
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
        data, read = scored_data(scores, dataset, split, layout)
        config |= {**read, "content": check_scored(table, data), "indicator": indicator}
        if not allow_existing:
            check_unmarked(data, indicator)
        marked = annotate_messages(data, chosen.turns)
    card = make_card(table, chosen, data, source_column=source_column)
    run = store.open("select", {**config, "source_column": source_column})
    if data is not None:
        run = run.record("rows", describe_reading(data))
    if dataset is not None and data is not None:
        place = run.path(f"selected{marked_suffix(dataset)}")
        write_marked(place, dataset, marked, layout=data.layout, split=config["split"], indicator=indicator)
    run.save("selection.parquet", chosen)
    run.write_json("card.json", card)
    write_atomic(run.path("card.md"), card_markdown(card))
    meta = chosen.meta
    output.show(
        lambda: _outcomes.records_outcome(
            "select",
            [{key: meta.get(key) for key in _META}],
            f"{meta['selected']} of {meta['turns']} answers are selected.", None, run.folder,
        ),
        lambda: _tables.show_selection(chosen),
    )  # fmt: skip
    _tables.note_rows(run.manifest.get("rows") or {})
    _screen.say_where(run.folder)


def check_scores(scores: Path | None) -> None:
    """Refuse scores that are not there, before anything heavy is imported."""
    if scores is None:
        raise InputError("give the run folder of ctxlens score as --scores, or a file to restore as --undo.")
    path = scores / "scores.parquet" if scores.is_dir() or not scores.suffix else scores
    if not path.exists():
        raise InputError(f"{path} does not exist; give the folder that `ctxlens score` wrote with --out.")


def _deciding_layer(table: Scores, layer: str | None, reduction: str, folder: Path) -> int | None:
    """The given layer, or the one that a rule finds; None if the score has no layers or no turns."""
    from ctxlens.parsing import check_choice
    from ctxlens.scoring.layers import (
        DEFAULT_LAYER_RULE,
        LAYER_RULES,
        NEEDLE_RULES,
        default_rule,
        find_layer,
    )
    from ctxlens.scoring.selection import LP_GAP

    if layer is not None and layer.lstrip("-").isdecimal():
        return int(layer)
    if layer is not None:
        check_choice(layer, LAYER_RULES, "layer")
    if reduction == LP_GAP or table.frame.empty:
        return None
    shares = _needle_shares(folder) if (layer or DEFAULT_LAYER_RULE) in NEEDLE_RULES else None
    rule = layer or default_rule(table, needle_shares=shares)
    return find_layer(table, rule, reduction=reduction, needle_shares=shares)


def _needle_shares(folder: Path) -> np.ndarray | None:
    """The attention of every head to a hidden fact, if the scores were made with --needle-layer."""
    import json

    import numpy as np

    from ctxlens.scoring.layers import NEEDLE_LAYERS

    path = folder / NEEDLE_LAYERS
    if not path.is_file():
        return None
    try:
        return np.array([one["by_head"] for one in json.loads(path.read_text(encoding="utf-8"))], dtype=float)
    except (KeyError, TypeError):
        return None  # of another study
    except ValueError:
        raise InputError(f"{path} is damaged; score again with --needle-layer.") from None


def scored_data(
    scores: Path, dataset: str, split: str | None, layout: str | None
) -> tuple[ConversationSet, dict[str, Any]]:
    """The data set and how it was read: by default as it was read for the scores."""
    from ctxlens.chat.data import load_conversations
    from ctxlens.runs import MANIFEST, Run

    known = Run.read(scores).manifest.get("config") or {} if (scores / MANIFEST).is_file() else {}
    read = {"split": split or known.get("split") or "train", "limit": known.get("limit")}
    if known.get("drop_refusals"):
        read["drop_refusals"] = True
    data = load_conversations(dataset, layout=layout or known.get("layout"), **read)
    return data, {**read, "layout": data.layout}


def _undo(file: Path, store: RunOptions, *, alone: bool) -> None:
    """Restore the rows of a file that `select` wrote; `alone` says whether no other choice was given."""
    from ctxlens.chat.data.marked_files import check_marked, marked_suffix, unmark_file
    from ctxlens.cli._inputs import describe_file

    if not alone:
        raise InputError("--undo restores a file that select wrote; give it alone, or with --out.")
    check_marked(file)
    run = store.open("undo", describe_file(file))
    marks = unmark_file(file, run.path(f"original{marked_suffix(file)}"))
    _screen.say(f"removed {marks.indicators} indicators from {marks.marked_rows} of {marks.rows} rows")
    _screen.note(f"the original rows are in {run.folder}")
