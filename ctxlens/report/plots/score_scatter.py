"""Scores against the length of the context, turn by turn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from ctxlens.errors import InputError
from ctxlens.report.plots.scores import KINDS, axis_title
from ctxlens.report.plots.theme import INK, SERIES, plain, style
from ctxlens.results import Selection

if TYPE_CHECKING:
    import pandas as pd

MOST_POINTS = 4000
"""The most turns that are drawn; of more, evenly spaced ones are drawn."""

_SYMBOLS = ("circle", "square", "diamond", "triangle-up")


def score_scatter(rows: pd.DataFrame, selection: Selection) -> go.Figure:
    """Draw every turn by the length of its context and its score; selected turns are filled.

    Args:
        rows: one row per turn with `context_tokens`, `score`, `selected`, and optionally `kind`.
            The index is given to each point as `customdata`.
        selection: the selection of these turns, for the axis and the threshold.

    Raises:
        InputError: there is no turn with a score.
    """
    drawn = rows[rows["score"].notna()]
    if drawn.empty:
        raise InputError("there are no scores to draw.")
    if len(drawn) > MOST_POINTS:
        drawn = drawn.iloc[np.linspace(0, len(drawn) - 1, MOST_POINTS).round().astype(int)]
    figure = go.Figure()
    labelled = "kind" in drawn and drawn["kind"].notna().any()
    kinds = drawn["kind"].fillna("unknown") if labelled else None
    names: list[Any] = [None] if kinds is None else sorted(kinds.unique(), key=_order)
    for i, kind in enumerate(names):
        group = drawn if kinds is None else drawn[kinds == kind]
        for is_chosen in (True, False):
            inside = group[group["selected"].astype(bool) == is_chosen]
            if len(inside):
                figure.add_trace(_points(inside, kind, i, is_chosen))
    style(figure, height=420)
    # Above the plot, where a legend of several lines makes its own room on a narrow page.
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "entrywidth": 0}
    figure.update_layout(dragmode="select", clickmode="event+select", legend=legend)
    figure.update_xaxes(title_text="user tokens before the response", type="log", dtick="D2")
    title = axis_title(selection.meta.get("layer"), selection.meta.get("reduction", ""))
    figure.update_yaxes(title_text=title)
    threshold = selection.meta.get("threshold")
    if threshold is not None and math.isfinite(threshold):
        figure.add_hline(
            y=threshold,
            line={"color": INK.built, "width": 2, "dash": "dash"},
            annotation={"text": f"β = {threshold:.2f}", "font": {"color": INK.built}},
        )
    return figure


def _order(kind: str) -> tuple[int, str]:
    return list(KINDS).index(kind) if kind in KINDS else len(KINDS), kind


def _points(rows: pd.DataFrame, kind: str | None, i: int, is_chosen: bool) -> go.Scatter:
    colour = SERIES[i % len(SERIES)].built
    symbol = _SYMBOLS[i % len(_SYMBOLS)]
    state = "selected" if is_chosen else "not selected"
    name = state if kind is None else f"{plain(KINDS.get(kind, kind))}, {state}"
    return go.Scatter(
        x=np.maximum(rows["context_tokens"].to_numpy(), 1).tolist(),
        y=np.round(rows["score"].to_numpy(dtype=float), 4).tolist(),
        customdata=rows.index.tolist(),
        mode="markers",
        name=f"{name} ({len(rows)})",
        marker={
            "color": colour,
            "symbol": symbol if is_chosen else f"{symbol}-open",
            "size": 7,
            "opacity": 0.8 if is_chosen else 0.6,
        },
        hovertemplate=f"%{{x}} tokens, <b>%{{y:.3f}}</b><br>{name}<extra></extra>",
    )


__all__ = ["MOST_POINTS", "score_scatter"]
