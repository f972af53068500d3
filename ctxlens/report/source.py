"""The section on the source: context-dependency scores and the turns that they select."""

from __future__ import annotations

import math

import numpy as np

from ctxlens.report.blocks import Block, Cell, Figure, Figures, Table, figure_json, interval_cell, number
from ctxlens.report.card import card_blocks
from ctxlens.report.collect import RunContents
from ctxlens.report.plots.score_layers import (
    BETAS,
    TOP_SHARE,
    layer_disagreement,
    score_density,
    threshold_shares,
)
from ctxlens.report.plots.scores import (
    KINDS,
    length_histogram,
    read_from,
    rows_of,
    score_histogram,
    selection_histogram,
    selection_quality,
)
from ctxlens.results import Scores, Selection
from ctxlens.stats import Interval, auroc

_REDUCTIONS = {
    "best_of_mean": "each head's share is averaged over the answer, and the largest of these means counts",
    "mean_of_best": "for each token of the answer, the head with the largest share counts; the mean over "
    "the tokens is the score",
    "mean_heads": "the mean of the shares over all heads and all tokens of the answer",
}
"""How shares become one score, in words."""


def source_blocks(run: RunContents) -> list[Block]:
    """Score histograms, the quality of the selection, and what other layers and thresholds would select."""
    blocks: list[Block] = []
    for name, scores, selection in run.scored():
        blocks.append(_histogram(name, scores, selection))
        if selection is not None:
            blocks.append(_selected(scores, selection))
        if scores is not None:
            blocks += _choices(scores, selection)
        if scores is not None and "kind" in scores.frame and scores.frame["layer"].nunique() > 1:
            blocks.append(_layers(scores, read_from(scores, selection)[1]))
    probe = run.extras.get("layer")
    if isinstance(probe, list) and probe and all(isinstance(one, dict) for one in probe):
        blocks.append(_probe(probe))
    card = run.extras.get("card")
    if isinstance(card, dict):
        blocks += card_blocks(card)
    return blocks


def _histogram(name: str, scores: Scores | None, selection: Selection | None) -> Figures:
    caption = "The share of attention that each assistant turn pays to the user's tokens (0 to 1). "
    if scores is not None:
        layer, reduction = read_from(scores, selection)
        if layer is None:
            caption = "How much likelier the user's text makes each answer, in nats per token. "
        else:
            caption += f"The score is read from layer {layer}: {_REDUCTIONS[reduction]}. "
        figure, turns = score_histogram(scores, selection), len(rows_of(scores, layer, reduction))
    elif selection is not None:
        figure, turns = selection_histogram(selection), len(selection)
    else:
        raise AssertionError("every name has scores or a selection")
    label = f"Histogram of context-dependency scores of {turns} assistant turns"
    if selection is not None:
        label += f", {int(selection.frame['selected'].sum())} selected"
        dashed = selection.meta.get("threshold") is not None
        caption += "Turns to the right of the dashed line are" if dashed else "Some turns are"
        caption += " selected as context-dependent. "
        caption += f"Rule: {selection.meta['rule']}. " if "rule" in selection.meta else ""
    if "kind" in (scores or selection).frame:  # pyright: ignore[reportOptionalMemberAccess]
        caption += "The less the bars of the kinds overlap, the better the score tells them apart."
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
        "Share of attention that the best head of each layer gives to the needle while the model repeats it: "
        "mean over cells, with a 95 % bootstrap interval. The scores are read from the layer with the "
        "highest value. It was chosen on other needles than those in the figures above. “If uniform” is "
        "the share if every token got the same attention.",
        title="Which layer carries the needle",
    )


def _selected(scores: Scores | None, selection: Selection) -> Table:
    n, chosen = len(selection), int(selection.frame["selected"].sum())
    rows = [[Cell("selected turns"), Cell(f"{chosen} of {n}", f"{chosen / max(n, 1):.1%}")]]
    if selection.meta.get("threshold") is not None:
        rows.append([Cell("threshold β"), Cell(number(float(selection.meta["threshold"])))])
    quality = selection_quality(scores, selection)
    if quality is not None:
        base = quality.n_true / max(quality.n_turns, 1)
        precision = "of the selected turns are truly context-dependent"
        recall = "of the truly context-dependent turns are selected"
        rows += [
            [Cell("precision", precision), Cell(_percent(quality.precision))],
            [Cell("recall", recall), Cell(_percent(quality.recall))],
            [Cell("base rate", "of all turns are truly context-dependent"), Cell(_percent(base))],
        ]
    caption = "How many turns the threshold selects."
    if quality is not None:
        caption = (
            "How many turns the threshold selects, and how many of them were made to need their context. A "
            "precision near the base rate would be no better than a random choice."
        )
    return Table(["selection", "value"], rows, caption, title="What was selected")


def _choices(scores: Scores, selection: Selection | None) -> list[Block]:
    """What other layers and thresholds would select, and the lengths of contexts and responses."""
    layer, reduction = read_from(scores, selection)
    reduction = reduction if layer is not None else "mean_of_best"
    n_turns = len(scores.frame.drop_duplicates(["conversation", "turn"]))
    n_layers = scores.frame["layer"].nunique()
    blocks: list[Block] = []
    if n_layers > 1:
        figures = [
            Figure(
                figure_json(score_density(scores, reduction=reduction)),
                f"Distribution of the scores of {n_turns} turns in each of {n_layers} layers.",
                "Scores by layer",
            )
        ]
        caption = "Scores by layer: each row shows how the scores of one layer are distributed. "
        if round(TOP_SHARE * n_turns):
            figures.append(
                Figure(
                    figure_json(layer_disagreement(scores, reduction=reduction)),
                    f"Share of the top {TOP_SHARE:.0%} of turns on which two layers differ, for each pair.",
                    "Disagreement of layers",
                )
            )
            caption += (
                f"Disagreement: each layer selects the {TOP_SHARE:.0%} of turns that it scores highest, and "
                "each square shows which share of one layer's selection the other layer does not select. Two "
                f"random selections would differ in {1 - TOP_SHARE:.0%} of their turns; a value near that "
                "means that the selection depends on which layer is chosen."
            )
        blocks.append(Figures(figures, caption, title="The choice of the layer"))
    rows = [
        [Cell(str(one)), *(Cell(f"{share:.1%}") for share in shares)]
        for one, shares in threshold_shares(scores, reduction=reduction)
    ]
    caption = (
        f"Share of the turns whose score is above β. Score: {_REDUCTIONS[reduction]}. Where the shares "
        "differ much between layers, a fixed β cannot be carried over to another layer or model."
    )
    head = ["layer", *(f"β = {beta:g}" for beta in BETAS)]
    blocks.append(Table(head, rows, caption, title="What fixed thresholds would select"))
    blocks.append(_lengths(scores, selection))
    return blocks


def _lengths(scores: Scores, selection: Selection | None) -> Figures:
    """The lengths of contexts and responses, with selected turns as a group of their own."""
    lengths = [
        Figure(
            figure_json(length_histogram(scores, selection, column=column)),
            f"Distribution of {column.replace('_', ' ')} over the turns.",
        )
        for column in ("context_tokens", "response_tokens")
    ]
    caption = "How long the contexts (left) and the responses (right) are, on a logarithmic axis. "
    if selection is not None:
        caption += (
            "The bars of each group sum to 100 %. If the selected turns lie further to the right, the score "
            "may simply follow length."
        )
    return Figures(lengths, caption, title="Lengths of contexts and responses")


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
        "How well the scores of each layer tell the kinds of turn apart. AUROC is the probability that a "
        "context-dependent turn scores higher than a turn of the other kind: 1 is perfect, 0.5 is chance.",
        title="Kinds of turn by layer",
    )


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"
