"""The distribution of context-dependency scores, and what a threshold selects."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from ctxlens.errors import InputError
from ctxlens.plots.theme import INK, PATTERNS, SERIES, plain, style
from ctxlens.results import Scores, Selection

if TYPE_CHECKING:
    import pandas as pd

KINDS = {
    "document": "answered from the document",
    "memory": "document there, answered from memory",
    "closed": "no document",
}
"""What the kinds of labelled turns are called in figures."""


@dataclass(frozen=True)
class SelectionQuality:
    """How well the selection finds the turns that truly depend on context."""

    precision: float
    recall: float
    n_selected: int
    n_turns: int
    n_true: int


def score_histogram(
    scores: Scores,
    selection: Selection | None = None,
    *,
    layer: int | None = None,
    reduction: str | None = None,
    bins: int = 40,
) -> go.Figure:
    """Draw the distribution of scores with the threshold; stacked by `kind` where it is known.

    Args:
        scores: scored turns.
        selection: gives layer, reduction and threshold.
        layer: the layer, if no selection gives it; by default the first one scored.
        reduction: one of `Scores.REDUCTIONS`, if no selection gives it.
        bins: number of bars between 0 and 1.

    Raises:
        InputError: no such layer or reduction, or no scores.
    """
    layer, reduction = read_from(scores, selection, layer, reduction)
    rows = scores.frame[scores.frame["layer"] == layer]
    scores.layer(layer, reduction)
    rows = rows[rows[reduction].notna()]
    if rows.empty:
        raise InputError("there are no scores to draw.")
    threshold = selection.meta.get("threshold") if selection is not None else None
    return _histogram(rows, reduction, f"score (layer {layer})", threshold, bins)


def selection_histogram(selection: Selection, *, bins: int = 40) -> go.Figure:
    """Draw the scores that a selection was made from, where the score table itself is not at hand."""
    name = f"score (layer {selection.meta['layer']})" if "layer" in selection.meta else "score"
    return _histogram(selection.frame, "score", name, selection.meta.get("threshold"), bins)


def _histogram(rows: pd.DataFrame, column: str, axis: str, threshold: float | None, bins: int) -> go.Figure:
    edges = np.linspace(0, 1, bins + 1)
    middles = np.round((edges[:-1] + edges[1:]) / 2, 4)
    figure = go.Figure()
    kinds = _kinds(rows["kind"].fillna("unknown").unique()) if "kind" in rows else [None]
    for i, kind in enumerate(kinds):
        values = rows[column] if kind is None else rows.loc[rows["kind"].fillna("unknown") == kind, column]
        counts, _ = np.histogram(np.clip(values, 0, 1), edges)
        name = "turns" if kind is None else plain(KINDS.get(kind, kind))
        figure.add_trace(
            go.Bar(
                x=middles.tolist(), y=counts.tolist(), name=f"{name} ({len(values)})", width=1 / bins,
                marker={"color": SERIES[i % len(SERIES)].built, "line": {"width": 0},
                        "pattern": {"shape": PATTERNS[i % len(PATTERNS)], "size": 6, "solidity": 0.2,
                                    "fillmode": "overlay", "fgopacity": 0.55}},
                showlegend=kind is not None,
                hovertemplate=f"score near %{{x:.2f}}<br><b>%{{y}}</b> turns: {name}<extra></extra>",
            )
        )  # fmt: skip
    style(figure, height=360)
    figure.update_layout(bargap=0.04, legend={"orientation": "v", "y": 1.02})
    figure.update_xaxes(title_text=axis, range=[0, 1])
    figure.update_yaxes(title_text="assistant turns")
    if threshold is not None and math.isfinite(threshold):
        figure.add_vline(x=threshold, line={"color": INK.built, "width": 2, "dash": "dash"})
        figure.add_annotation(
            x=threshold, y=1, yref="paper", yanchor="top", text=f"β = {threshold:.2f}", showarrow=False,
            xanchor="left", xshift=5, font={"color": INK.built},
        )  # fmt: skip
    return figure


def read_from(
    scores: Scores, selection: Selection | None, layer: int | None = None, reduction: str | None = None
) -> tuple[int, str]:
    """The layer and reduction to show: as given, as selected, as scored, else the first."""
    sources = [dict(selection.meta) if selection else {}, dict(scores.meta)]
    for source in sources:
        layer = source.get("layer") if layer is None else layer
        reduction = source.get("reduction") if reduction is None else reduction
    if layer is None:
        if not len(scores):
            raise InputError("there are no scores to draw.")
        layer = int(scores.frame["layer"].min())
    return int(layer), reduction or "mean_of_best"


def selection_quality(scores: Scores | None, selection: Selection) -> SelectionQuality | None:
    """Precision and recall of the selection against the known kinds; None where kinds are unknown.

    Kinds are taken from the scores, else from the selection. A turn is truly context-dependent if its
    `kind` is among `scores.meta["positive_kinds"]` (by default `document`).
    """
    frame = selection.frame
    if scores is not None and "kind" in scores.frame:
        kinds = scores.frame.drop_duplicates(["conversation", "turn"])[["conversation", "turn", "kind"]]
        frame = frame.drop(columns="kind", errors="ignore").merge(kinds, on=["conversation", "turn"])
    if "kind" not in frame or frame["kind"].isna().all():
        return None
    frame = frame[frame["kind"].notna()]
    meta = scores.meta if scores is not None else selection.meta
    true = frame["kind"].isin(list(meta.get("positive_kinds", ["document"])))
    chosen = frame["selected"].astype(bool)
    hits = int((true & chosen).sum())
    return SelectionQuality(
        precision=hits / int(chosen.sum()) if chosen.any() else float("nan"),
        recall=hits / int(true.sum()) if true.any() else float("nan"),
        n_selected=int(chosen.sum()),
        n_turns=len(frame),
        n_true=int(true.sum()),
    )


def _kinds(found: object) -> list[str]:
    names = [str(kind) for kind in found]  # pyright: ignore[reportGeneralTypeIssues]
    return [kind for kind in KINDS if kind in names] + sorted(set(names) - set(KINDS))
