"""What steering gains against what it costs, in one picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ctxlens.errors import InputError
from ctxlens.report.plots.steering import LINES
from ctxlens.report.plots.theme import DASHES, MARKERS, SERIES, plain, style
from ctxlens.results import Ability, NeedleGrid
from ctxlens.stats import Interval, bootstrap_mean


@dataclass(frozen=True)
class TradeOffPoint:
    """Needle recall under one steering, and what the same steering does where no context is needed."""

    heads: str
    alpha: float
    recall: Interval
    closed_book: Interval | None
    nats: Interval | None


def trade_off_points(grid: NeedleGrid, ability: Ability | None) -> list[TradeOffPoint]:
    """One point for every head set and α, by falling α; α = 1 is the common start of all.

    Intervals are over texts (recall) and questions; random draws are averaged within a cell or question.

    Args:
        grid: a steering sweep.
        ability: closed-book answers with the columns `alpha`, `heads` and, if known, `nats_per_token`.
    """
    frame = grid.frame
    found = []
    steered = frame[frame["alpha"] != 1.0]
    for heads in dict.fromkeys(steered["heads"]):
        for alpha in sorted({1.0, *steered["alpha"][steered["heads"] == heads]}, reverse=True):
            start = alpha == 1.0
            cells = grid.recall(alpha=1.0) if start else grid.recall(heads=heads, alpha=alpha)
            costs: list[Interval | None] = [None, None]
            if ability is not None and {"alpha", "heads"} <= set(ability.frame):
                table = ability.where(alpha=1.0) if start else ability.where(alpha=alpha, heads=heads)
                for i, column in enumerate(("recall", "nats_per_token")):
                    if column in table.frame and len(table):
                        costs[i] = bootstrap_mean(table.frame.groupby("question")[column].mean().to_numpy())
            found.append(TradeOffPoint(str(heads), float(alpha), grid.mean(cells), *costs))
    return found


def trade_off(grid: NeedleGrid, ability: Ability) -> go.Figure:
    """Draw needle recall (up) against closed-book recall and against nats per token, α by α.

    Better is up, and to the right on the left panel, to the left on the right panel. Bars are 95 %
    intervals.

    Raises:
        InputError: nothing is steered, or there are no side effects for it.
    """
    points = trade_off_points(grid, ability)
    panels = [
        (name, title)
        for name, title in (
            ("closed_book", "closed-book recall (more is better)"),
            ("nats", "nats per token of closed-book answers (less is better)"),
        )
        if any(getattr(point, name) is not None for point in points)
    ]
    if not panels:
        raise InputError("there is no trade-off to draw: it takes a steering sweep with its side effects.")
    figure = make_subplots(1, len(panels), shared_yaxes=True, horizontal_spacing=0.06)
    for column, (name, title) in enumerate(panels, start=1):
        for i, heads in enumerate(dict.fromkeys(point.heads for point in points)):
            own = [p for p in points if p.heads == heads and getattr(p, name) is not None]
            shade = SERIES[i % len(SERIES)]
            costs = [getattr(p, name) for p in own]
            label = plain(LINES.get(heads, heads))
            figure.add_trace(
                go.Scatter(
                    x=[round(c.estimate, 4) for c in costs],
                    y=[round(p.recall.estimate, 4) for p in own],
                    error_x=_bars(costs, shade.built),
                    error_y=_bars([p.recall for p in own], shade.built),
                    text=[f"α {p.alpha:g}" if p is own[-1] else "" for p in own],
                    textposition="top center",
                    textfont={"size": 11},
                    mode="lines+markers+text",
                    line={"color": shade.built, "width": 2, "dash": DASHES[i % len(DASHES)]},
                    marker={"color": shade.built, "size": 8, "symbol": MARKERS[i % len(MARKERS)]},
                    name=label,
                    legendgroup=heads,
                    showlegend=column == 1,
                    customdata=[
                        [p.recall.format(), c.format(), f"{p.alpha:g}"]
                        for p, c in zip(own, costs, strict=True)
                    ],
                    hovertemplate=f"{label}, α %{{customdata[2]}}<br>needle recall <b>%{{customdata[0]}}</b>"
                    f"<br>{title.split(' (')[0]} <b>%{{customdata[1]}}</b><extra></extra>",
                ),
                row=1,
                col=column,
            )
        figure.update_xaxes(title_text=title, col=column)
    style(figure, height=420)
    figure.update_yaxes(title_text="needle recall", range=[-0.03, 1.08], col=1)
    figure.update_layout(legend={"y": -0.22, "yanchor": "top"}, margin={"t": 12, "b": 24})
    return figure


def _bars(intervals: list[Interval], colour: str) -> dict:
    above = [i.high - i.estimate if np.isfinite(i.high) else 0.0 for i in intervals]
    below = [i.estimate - i.low if np.isfinite(i.low) else 0.0 for i in intervals]
    return {
        "type": "data",
        "symmetric": False,
        "array": np.round(above, 4).tolist(),
        "arrayminus": np.round(below, 4).tolist(),
        "thickness": 1,
        "width": 0,
        "color": colour,
    }


__all__ = ["TradeOffPoint", "trade_off", "trade_off_points"]
