"""AUROC of every score, one panel per study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ctxlens.report.plots.theme import INK, SERIES, style

_BASELINES = ("uniform", "prompt length", "response length", "overlap, words", "overlap, pairs of words")


def _colour(name: str) -> str:
    series = 1 if name == "lp_gap" else 2 if name in _BASELINES else 0
    return SERIES[series].built


def draw(studies: Mapping[str, Any]) -> go.Figure:
    """Points with 95 % intervals; hollow points use only pairs of prompts of similar length."""
    figure = make_subplots(
        1, len(studies), subplot_titles=list(studies), shared_yaxes=False, horizontal_spacing=0.16
    )
    rows = 0
    for column, one in enumerate(studies.values(), start=1):
        names = list(one["scores"])[::-1]
        rows = max(rows, len(names))
        summary = [one["scores"][name] for name in names]
        estimate, low, high = zip(*(s["auroc"] for s in summary), strict=True)
        colours = [
            SERIES[1].built
            if name == "lp_gap"
            else SERIES[2].built
            if name in _BASELINES
            else SERIES[0].built
            for name in names
        ]
        labels = [f"<b>{name}</b>" if name == one["paper"] else name for name in names]
        figure.add_trace(
            go.Scatter(
                x=[s["auroc_at_equal_length"] for s in summary], y=labels, mode="markers", showlegend=False,
                marker={"color": "rgba(0,0,0,0)", "size": 9, "line": {"color": colours, "width": 1.5}},
                hovertemplate="%{y}<br>%{x:.2f} at equal length<extra></extra>",
            ),
            1, column,
        )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=estimate, y=labels, mode="markers", marker={"color": colours, "size": 7}, showlegend=False,
                error_x={"type": "data", "symmetric": False, "thickness": 1.5, "width": 0,
                         "array": [h - e for h, e in zip(high, estimate, strict=True)],
                         "arrayminus": [e - w for e, w in zip(estimate, low, strict=True)]},
                hovertemplate="%{y}<br>AUROC %{x:.3f}<extra></extra>",
            ),
            1, column,
        )  # fmt: skip
    style(figure, height=110 + 24 * rows)
    figure.update_layout(margin={"t": 60}, paper_bgcolor="white", plot_bgcolor="white")
    figure.update_xaxes(range=[0, 1.02], title_text="AUROC")
    figure.add_vline(x=0.5, line={"color": INK.built, "width": 1, "dash": "dot"})
    return figure
