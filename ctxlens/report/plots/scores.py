"""The distribution of context-dependency scores, and what a threshold selects."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from ctxlens.errors import InputError
from ctxlens.report.plots.theme import INK, PATTERNS, SERIES, plain, style
from ctxlens.results import Scores, Selection

if TYPE_CHECKING:
    import pandas as pd

KINDS = {
    "document": "answered from the document",
    "memory": "has a document, answered from memory",
    "closed": "no document",
}
"""Names of the kinds of labelled turns in figures."""

LENGTHS = {
    "context_tokens": "user tokens before the response",
    "response_tokens": "response tokens",
}
"""Names of the lengths in figures."""

LP_GAP = "lp_gap"


@dataclass(frozen=True)
class SelectionQuality:
    """How well a selection finds the turns that truly depend on context."""

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
    """Draw the distribution of scores and the threshold, stacked by `kind` where it is known.

    Args:
        scores: scored turns.
        selection: the selection from which layer, reduction and threshold are taken.
        layer: the layer if there is no selection; by default the highest scored layer.
        reduction: one of `Scores.REDUCTIONS`, or `lp_gap`, if there is no selection.
        bins: number of bars.

    Raises:
        InputError: an unknown layer or reduction, or an empty table.
    """
    layer, reduction = read_from(scores, selection, layer, reduction)
    rows = rows_of(scores, layer, reduction)
    rows = rows[rows["score"].notna()]
    if rows.empty:
        raise InputError("there are no scores to draw.")
    threshold = selection.meta.get("threshold") if selection is not None else None
    return _histogram(rows, axis_title(layer, reduction), threshold, bins, bounded=layer is not None)


def selection_histogram(selection: Selection, *, bins: int = 40) -> go.Figure:
    """Draw the scores of a selection when the table of scores itself is not available."""
    layer, reduction = selection.meta.get("layer"), selection.meta.get("reduction", "")
    bounded = reduction != LP_GAP
    name = axis_title(layer, reduction) if layer is not None or not bounded else "score"
    return _histogram(selection.frame, name, selection.meta.get("threshold"), bins, bounded=bounded)


def rows_of(scores: Scores, layer: int | None, reduction: str) -> pd.DataFrame:
    """The turns, one row each, with the chosen score in the column `score`.

    Raises:
        InputError: an unknown layer or reduction.
    """
    if reduction == LP_GAP and LP_GAP in scores.frame:
        turns = scores.frame.drop_duplicates(["conversation", "turn"])
        return turns.assign(score=turns[LP_GAP])
    if layer is None:
        raise InputError(f"the table of scores has no column {reduction}; score the data with it first.")
    values = scores.layer(layer, reduction)
    return scores.frame[scores.frame["layer"] == layer].assign(score=values.to_numpy())


def axis_title(layer: int | None, reduction: str) -> str:
    """The title of an axis that shows the score."""
    if reduction == LP_GAP:
        return "gain in log-probability by the user's text (nats per token)"
    return f"score (layer {layer})"


def length_histogram(
    scores: Scores, selection: Selection | None = None, *, column: str = "context_tokens", bins: int = 30
) -> go.Figure:
    """Draw the lengths of contexts or responses, with selected turns as a group of their own (paper B.7).

    The bars of each group sum to 1, so that groups of different size can be compared. The axis is
    logarithmic.

    Args:
        scores: scored turns.
        selection: the turns that were selected; without it there is one group.
        column: `context_tokens` or `response_tokens`.
        bins: number of bars.

    Raises:
        InputError: another column, or an empty table.
    """
    if column not in LENGTHS:
        raise InputError(f"column must be {' or '.join(LENGTHS)}, got {column!r}.")
    turns = scores.frame.drop_duplicates(["conversation", "turn"])
    if turns.empty:
        raise InputError("there are no scores to draw.")
    lengths = np.maximum(turns[column].to_numpy(dtype=float), 1)
    groups = {"turns": np.ones(len(turns), dtype=bool)}
    if selection is not None:
        place = ["conversation", "turn"]
        merged = turns[place].merge(selection.frame[[*place, "selected"]], on=place, how="left")
        chosen = (merged["selected"] == True).to_numpy()  # noqa: E712  (missing: not selected)
        groups = {"selected": chosen, "not selected": ~chosen}
    low, high = math.floor(math.log2(lengths.min())), math.ceil(math.log2(lengths.max() + 1))
    edges = np.linspace(low, max(high, low + 1), bins + 1)
    figure = go.Figure()
    for i, (name, inside) in enumerate(groups.items()):
        counts, _ = np.histogram(np.log2(lengths[inside]), edges)
        figure.add_trace(
            go.Bar(
                x=np.round((edges[:-1] + edges[1:]) / 2, 4).tolist(),
                y=np.round(counts / max(inside.sum(), 1), 5).tolist(), width=(edges[1] - edges[0]),
                name=f"{name} ({int(inside.sum())})", opacity=0.75, showlegend=len(groups) > 1,
                marker={"color": SERIES[i].built, "line": {"width": 0},
                        "pattern": {"shape": PATTERNS[i], "size": 6, "solidity": 0.2,
                                    "fillmode": "overlay", "fgopacity": 0.55}},
                customdata=np.round(2 ** ((edges[:-1] + edges[1:]) / 2)).tolist(),
                hovertemplate=f"near %{{customdata:.0f}} tokens: <b>%{{y:.1%}}</b> of {name}<extra></extra>",
            )
        )  # fmt: skip
    style(figure, height=300)
    ticks = range(low, max(high, low + 1) + 1, max(1, (high - low) // 8))
    figure.update_layout(barmode="overlay", bargap=0.04)
    figure.update_xaxes(title_text=LENGTHS[column], tickvals=list(ticks), ticktext=[f"{2**k}" for k in ticks])
    figure.update_yaxes(title_text="share of the group's turns", tickformat=".0%", rangemode="tozero")
    return figure


def _histogram(
    rows: pd.DataFrame, axis: str, threshold: float | None, bins: int, *, bounded: bool
) -> go.Figure:
    low, high = (0.0, 1.0) if bounded else (float(rows["score"].min()), float(rows["score"].max()))
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    middles = np.round((edges[:-1] + edges[1:]) / 2, 4)
    figure = go.Figure()
    kinds = _kinds(rows["kind"].fillna("unknown").unique()) if "kind" in rows else [None]
    for i, kind in enumerate(kinds):
        values = rows["score"] if kind is None else rows.loc[rows["kind"].fillna("unknown") == kind, "score"]
        counts, _ = np.histogram(np.clip(values, low, high), edges)
        name = "turns" if kind is None else plain(KINDS.get(kind, kind))
        figure.add_trace(
            go.Bar(
                x=middles.tolist(), y=counts.tolist(), name=f"{name} ({len(values)})",
                width=float(edges[1] - edges[0]),
                marker={"color": SERIES[i % len(SERIES)].built, "line": {"width": 0},
                        "pattern": {"shape": PATTERNS[i % len(PATTERNS)], "size": 6, "solidity": 0.2,
                                    "fillmode": "overlay", "fgopacity": 0.55}},
                showlegend=kind is not None,
                hovertemplate=f"score near %{{x:.2f}}<br><b>%{{y}}</b> turns: {name}<extra></extra>",
            )
        )  # fmt: skip
    style(figure, height=360)
    figure.update_layout(bargap=0.04, legend={"orientation": "v", "y": 1.02})
    figure.update_xaxes(title_text=axis, range=[float(edges[0]), float(edges[-1])])
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
) -> tuple[int | None, str]:
    """The layer and the reduction to show.

    They are taken from the arguments, else from the selection, else from the scores; the last choice is the
    highest scored layer. `lp_gap` has no layer.
    """
    sources = [dict(selection.meta) if selection else {}, dict(scores.meta)]
    for source in sources:
        layer = source.get("layer") if layer is None else layer
        reduction = source.get("reduction") if reduction is None else reduction
    if reduction == LP_GAP:
        return None, reduction
    if layer is None:
        if not len(scores):
            raise InputError("there are no scores to draw.")
        layer = int(scores.frame["layer"].max())
    return int(layer), reduction or "mean_of_best"


def selection_quality(scores: Scores | None, selection: Selection) -> SelectionQuality | None:
    """Precision and recall of a selection against the known kinds; None if the kinds are unknown.

    The kinds come from the scores, else from the selection. A turn is truly context-dependent if its
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
