"""The section on the source: context-dependency scores and what they select."""

from __future__ import annotations

import math

import numpy as np

from ctxlens.plots.scores import KINDS, read_from, score_histogram, selection_histogram, selection_quality
from ctxlens.report.blocks import Block, Cell, Figure, Figures, Table, figure_json, interval_cell, number
from ctxlens.report.collect import RunContents
from ctxlens.results import Scores, Selection
from ctxlens.stats import Interval, auroc

_REDUCTIONS = {
    "best_of_mean": "the head with most attention on the user over the whole answer",
    "mean_of_best": "for each token of the answer the head with most attention on the user, then the mean",
    "mean_heads": "the mean over heads",
}


def source_blocks(run: RunContents) -> list[Block]:
    """Score histograms with threshold, and the quality of the selection."""
    blocks: list[Block] = []
    for name, scores, selection in run.scored():
        blocks.append(_histogram(name, scores, selection))
        if selection is not None:
            blocks.append(_selected(scores, selection))
        if scores is not None and "kind" in scores.frame and scores.frame["layer"].nunique() > 1:
            blocks.append(_layers(scores, read_from(scores, selection)[1]))
    probe = run.extras.get("layer")
    if isinstance(probe, list) and probe and all(isinstance(one, dict) for one in probe):
        blocks.append(_probe(probe))
    return blocks


def _histogram(name: str, scores: Scores | None, selection: Selection | None) -> Figures:
    caption = "How much of its attention each assistant turn pays to the user's tokens (0 to 1). "
    if scores is not None:
        layer, reduction = read_from(scores, selection)
        caption += f"Read in layer {layer}: {_REDUCTIONS[reduction]}. "
        figure, turns = score_histogram(scores, selection), int((scores.frame["layer"] == layer).sum())
    elif selection is not None:
        figure, turns = selection_histogram(selection), len(selection)
    else:
        raise AssertionError("a name comes with scores or a selection")
    label = f"Histogram of context-dependency scores of {turns} assistant turns"
    if selection is not None:
        label += f", {int(selection.frame['selected'].sum())} selected"
        caption += "Turns to the right of the dashed line are chosen as context-dependent"
        caption += f": {selection.meta['rule']}. " if "rule" in selection.meta else ". "
    if "kind" in (scores or selection).frame:  # pyright: ignore[reportOptionalMemberAccess]
        caption += "The better the score tells the kinds of turn apart, the further apart their bars stand."
    title = "Context-dependency scores" if name in ("scores", "selection") else name
    return Figures([Figure(figure_json(figure), label + ".")], caption, title=title)


def _probe(probe: list[dict]) -> Table:
    rows = []
    for one in probe:
        share = Interval(*(float(one.get(key, math.nan)) for key in ("needle_share", "low", "high")), n=0)
        uniform = number(float(one.get("uniform", math.nan)))
        rows.append(
            [
                Cell(str(one.get("layer", ""))),
                Cell(str(one.get("head", ""))),
                interval_cell(share),
                Cell(uniform),
            ]
        )
    return Table(
        ["layer", "best head", "attention on the needle", "if uniform"],
        rows,
        "The rule for the layer: the one whose best head looks most at the needle while the needle is "
        "repeated, on needles apart from those of the figures above. Mean over cells and 95 % bootstrap "
        "interval.",
        title="Which layer carries the needle",
    )


def _selected(scores: Scores | None, selection: Selection) -> Table:
    n, chosen = len(selection), int(selection.frame["selected"].sum())
    rows = [[Cell("chosen turns"), Cell(f"{chosen} of {n}", f"{chosen / max(n, 1):.1%}")]]
    if "threshold" in selection.meta:
        rows.append([Cell("threshold β"), Cell(number(float(selection.meta["threshold"])))])
    quality = selection_quality(scores, selection)
    if quality is not None:
        base = quality.n_true / max(quality.n_turns, 1)
        precision = "of the chosen turns are truly context-dependent"
        recall = "of the truly context-dependent turns are chosen"
        rows += [
            [Cell("precision", precision), Cell(_percent(quality.precision))],
            [Cell("recall", recall), Cell(_percent(quality.recall))],
            [Cell("base rate", "of all turns are truly context-dependent"), Cell(_percent(base))],
        ]
    return Table(["selection", "figure"], rows, "")


def _layers(scores: Scores, reduction: str) -> Table:
    positive = set(scores.meta.get("positive_kinds", ["document"]))
    kinds = [kind for kind in KINDS if kind in set(scores.frame["kind"])]
    others = [kind for kind in kinds if kind not in positive]
    rows = []
    for layer, group in scores.frame.groupby("layer"):
        values = {kind: group.loc[group["kind"] == kind, reduction].to_numpy() for kind in kinds}
        true = np.concatenate([values[kind] for kind in kinds if kind in positive] or [np.array([])])
        cells = [Cell(str(layer))]
        cells += [Cell(number(float(values[kind].mean()))) for kind in kinds]
        cells += [Cell(number(auroc(true, values[kind]))) for kind in others]
        rows.append(cells)
    head = [
        "layer",
        *(f"mean: {KINDS[kind]}" for kind in kinds),
        *(f"AUROC against: {KINDS[k]}" for k in others),
    ]
    return Table(
        head,
        rows,
        "Which layer tells the kinds apart. AUROC is the chance that a context-dependent turn scores "
        "above one of the other kind: 1 is perfect, 0.5 is a coin.",
        title="By layer",
    )


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"
