"""What steering gains against what it costs, in one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    """Needle recall under one steering, and the effect of the same steering where no context is needed.

    Attributes:
        heads: the set of steered heads.
        alpha: factor of the steering; 1: not steered.
        recall: needle recall.
        closed_book: recall on questions without a document; None if it was not measured.
        nats: nats per token of the right closed-book answers; None if it was not measured.
    """

    heads: str
    alpha: float
    recall: Interval
    closed_book: Interval | None
    nats: Interval | None


_Cost = Literal["closed_book", "nats"]
_COSTS: tuple[tuple[_Cost, str, str], ...] = (
    ("closed_book", "closed-book recall", "more is better"),
    ("nats", "nats per token of closed-book answers", "less is better"),
)
"""The panels: field of a point, its name, and which way is better."""


def trade_off_points(grid: NeedleGrid, ability: Ability | None) -> list[TradeOffPoint]:
    """One point for every head set and α, in falling order of α; all sets start at α = 1.

    Intervals are over texts (recall) and over questions. Random draws are averaged within a cell or question.

    Args:
        grid: a steering sweep.
        ability: closed-book answers with the columns `alpha` and `heads` and, if known, `nats_per_token`.
    """
    steered = grid.frame[grid.frame["alpha"] != 1.0]
    found = []
    for heads in dict.fromkeys(steered["heads"]):
        for alpha in sorted({1.0, *steered["alpha"][steered["heads"] == heads]}, reverse=True):
            where: dict[str, Any] = {"alpha": 1.0} if alpha == 1.0 else {"heads": heads, "alpha": alpha}
            recall = grid.mean(grid.recall(**where))
            costs = [_cost(ability, column, where) for column in ("recall", "nats_per_token")]
            found.append(TradeOffPoint(str(heads), float(alpha), recall, *costs))
    return found


def _cost(ability: Ability | None, column: str, where: Mapping[str, Any]) -> Interval | None:
    """The mean of a column over the questions asked under one steering; None if it was not measured."""
    if ability is None or not {"alpha", "heads", column} <= set(ability.frame):
        return None
    rows = ability.where(**where).frame
    return bootstrap_mean(rows.groupby("question")[column].mean().to_numpy()) if len(rows) else None


def trade_off(grid: NeedleGrid, ability: Ability) -> go.Figure:
    """Draw needle recall (up) against closed-book recall and against nats per token, one point per α.

    Better is up in both panels, to the right in the left panel and to the left in the right panel. Bars are
    95 % intervals.

    Raises:
        InputError: nothing is steered, or the side effects of steering were not measured.
    """
    points = trade_off_points(grid, ability)
    panels = [panel for panel in _COSTS if any(getattr(point, panel[0]) is not None for point in points)]
    if not panels:
        raise InputError(
            "there is no trade-off to draw; give a steering sweep and closed-book answers under the same "
            "steering."
        )
    figure = make_subplots(1, len(panels), shared_yaxes=True, horizontal_spacing=0.06)
    for column, (field, name, better) in enumerate(panels, start=1):
        for number, heads in enumerate(dict.fromkeys(point.heads for point in points)):
            own = [p for p in points if p.heads == heads and getattr(p, field) is not None]
            line = _line(own, [getattr(p, field) for p in own], name, number)
            figure.add_trace(line.update(showlegend=column == 1), row=1, col=column)
        figure.update_xaxes(title_text=f"{name} ({better})", col=column)
    style(figure, height=420)
    figure.update_yaxes(title_text="needle recall", range=[-0.03, 1.08], col=1)
    figure.update_layout(legend={"y": -0.22, "yanchor": "top"}, margin={"t": 12, "b": 24})
    return figure


def _line(points: Sequence[TradeOffPoint], costs: Sequence[Interval], cost: str, number: int) -> go.Scatter:
    """The points of one head set, joined by falling α; the last one is labelled."""
    heads = points[0].heads
    colour, label = SERIES[number % len(SERIES)].built, plain(LINES.get(heads, heads))
    labels = [""] * (len(points) - 1) + [f"α {points[-1].alpha:g}"]
    return go.Scatter(
        x=[round(one.estimate, 4) for one in costs],
        y=[round(point.recall.estimate, 4) for point in points],
        error_x=_bars(costs, colour),
        error_y=_bars([point.recall for point in points], colour),
        text=labels,
        textposition="top center",
        textfont={"size": 11},
        mode="lines+markers+text",
        line={"color": colour, "width": 2, "dash": DASHES[number % len(DASHES)]},
        marker={"color": colour, "size": 8, "symbol": MARKERS[number % len(MARKERS)]},
        name=label,
        legendgroup=heads,
        customdata=[
            [point.recall.format(), one.format(), f"{point.alpha:g}"]
            for point, one in zip(points, costs, strict=True)
        ],
        hovertemplate=f"{label}, α %{{customdata[2]}}<br>needle recall <b>%{{customdata[0]}}</b>"
        f"<br>{cost} <b>%{{customdata[1]}}</b><extra></extra>",
    )


def _bars(intervals: Sequence[Interval], colour: str) -> dict:
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
