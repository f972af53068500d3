"""Steering sweeps as figures: recall and side effects over α."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ctxlens.errors import InputError
from ctxlens.report.plots.theme import DASHES, MARKERS, SERIES, plain, style
from ctxlens.results import Ability, NeedleGrid
from ctxlens.stats import Interval, bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd

LINES = {"all": "all heads", "retrieval": "retrieval heads", "random": "equally many random heads"}
"""Names of the head sets of a sweep in figures."""


@dataclass(frozen=True)
class SteeringPoint:
    """One point of a steering curve."""

    heads: str
    alpha: float
    interval: Interval


def steering_points(table: NeedleGrid | Ability, column: str = "recall") -> list[SteeringPoint]:
    """Mean and bootstrap interval for every head set and α, in falling order of α.

    The units are cells, or questions for closed-book answers; random draws are first averaged within a unit.
    Rows with α = 1 are not steered; they are the starting point of every line.
    """
    frame = table.frame
    unit = "cell" if "cell" in frame else "question"
    start = frame[frame["alpha"] == 1.0]
    steered = frame[frame["alpha"] != 1.0]
    points = []
    for heads in _in_order(steered["heads"].unique()):
        rows = steered[steered["heads"] == heads]
        if len(start):
            points.append(SteeringPoint(heads, 1.0, _mean(start, unit, column)))
        points += [
            SteeringPoint(heads, float(alpha), _mean(rows[rows["alpha"] == alpha], unit, column))
            for alpha in sorted(rows["alpha"].unique(), reverse=True)
        ]
    return points


def steering_curves(grid: NeedleGrid, ability: Ability | None = None) -> go.Figure:
    """Draw recall over α (log scale, stronger steering to the right) with bootstrap bands.

    There is one line for each set of steered heads. Where the data are available, further panels show how
    often the model answers from memory instead and the closed-book recall under the same steering.

    Args:
        grid: a grid with several values of `alpha`.
        ability: closed-book answers with the additional columns `alpha` and `heads`.

    Raises:
        InputError: no row of the grid is steered.
    """
    rows = [("recall from context", steering_points(grid))]
    if not rows[0][1]:
        raise InputError("the grid has no steered rows (alpha below 1); run a steering sweep first.")
    if grid.frame["memory_recall"].notna().any():
        rows.append(("answered from memory", steering_points(grid, "memory_recall")))
    if ability is not None and {"alpha", "heads"} <= set(ability.frame.columns):
        rows.append(("closed-book recall", steering_points(ability)))
    figure = make_subplots(len(rows), 1, shared_xaxes=True, vertical_spacing=0.07)
    for row, (_, points) in enumerate(rows, start=1):
        for trace in _lines(points, legend=row == 1):
            figure.add_trace(trace, row=row, col=1)
    style(figure, height=240 * len(rows) + 90)
    alphas = sorted({point.alpha for point in rows[0][1]})
    figure.update_xaxes(
        type="log", tickvals=_apart(alphas), ticktext=[f"{a:g}" for a in _apart(alphas)],
        range=[np.log10(max(alphas)) + 0.06, np.log10(min(alphas)) - 0.06],
    )  # fmt: skip
    figure.update_xaxes(title_text="α (1: not steered)", row=len(rows))
    for row, (name, _) in enumerate(rows, start=1):
        figure.update_yaxes(title_text=name, range=[-0.03, 1.03], row=row)
    return figure


def _lines(points: list[SteeringPoint], *, legend: bool) -> Iterator[go.Scatter]:
    for i, heads in enumerate(_in_order({point.heads for point in points})):
        own = [point for point in points if point.heads == heads]
        alphas = [point.alpha for point in own]
        shade = SERIES[i % len(SERIES)]
        group = {"legendgroup": heads, "name": plain(LINES.get(heads, heads))}
        yield go.Scatter(
            x=alphas + alphas[::-1],
            y=[round(p.interval.high, 4) for p in own] + [round(p.interval.low, 4) for p in own[::-1]],
            fill="toself", fillcolor=shade.faded(), line={"width": 0}, mode="lines", hoverinfo="skip",
            showlegend=False, **group,
        )  # fmt: skip
        yield go.Scatter(
            x=alphas,
            y=[round(p.interval.estimate, 4) for p in own],
            customdata=[[round(p.interval.low, 4), round(p.interval.high, 4), p.interval.n] for p in own],
            mode="lines+markers",
            line={"color": shade.built, "width": 2.5, "dash": DASHES[i % len(DASHES)]},
            marker={"color": shade.built, "size": 8, "symbol": MARKERS[i % len(MARKERS)]},
            hovertemplate=(
                f"{group['name']}, α %{{x}}<br><b>%{{y:.3f}}</b> [%{{customdata[0]:.3f}}, "
                "%{customdata[1]:.3f}]<br>%{customdata[2]} units<extra></extra>"
            ),
            showlegend=legend,
            **group,
        )


def _mean(rows: pd.DataFrame, unit: str, column: str) -> Interval:
    return bootstrap_mean(rows.groupby(unit)[column].mean().to_numpy())


def _in_order(heads: object) -> list[str]:
    found = [str(one) for one in heads]  # pyright: ignore[reportGeneralTypeIssues]
    known = [name for name in LINES if name in found]
    return known + sorted(set(found) - set(known))


def _apart(alphas: list[float], ratio: float = 1.35) -> list[float]:
    """The values, largest first, that are far enough apart for labels on a log axis."""
    kept: list[float] = []
    for alpha in sorted(alphas, reverse=True):
        if not kept or kept[-1] / alpha >= ratio:
            kept.append(alpha)
    return kept
