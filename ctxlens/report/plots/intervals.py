"""Estimates with their intervals: one line per case, one symbol per series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from ctxlens.report.plots.theme import MARKERS, SERIES, plain, style
from ctxlens.stats import Interval

_ROW = 30
_SPREAD = 0.22


def interval_rows(
    labels: Sequence[str],
    series: Mapping[str, Sequence[Interval]],
    *,
    ticks: Sequence[str] | None = None,
    digits: int = 2,
) -> go.Figure:
    """Draw intervals on horizontal lines.

    Args:
        labels: the name of each line.
        series: by name of the series, one interval per line.
        ticks: labels of the axis, in plotly's markup; by default `labels`.
        digits: number of decimals in the text that hovering shows.
    """
    figure = go.Figure()
    for number, (name, means) in enumerate(series.items()):
        shade, shown = SERIES[number % len(SERIES)], plain(name)
        shift = _SPREAD * (2 * number - len(series) + 1) / max(1, len(series) - 1)
        figure.add_trace(
            go.Scatter(
                x=[round(mean.estimate, 4) for mean in means],
                y=[place + shift for place in range(len(labels))],
                error_x={
                    "type": "data", "symmetric": False, "thickness": 1.5, "width": 0, "color": shade.built,
                    "array": [round(mean.high - mean.estimate, 4) for mean in means],
                    "arrayminus": [round(mean.estimate - mean.low, 4) for mean in means],
                },
                mode="markers",
                marker={"color": shade.built, "size": 9, "symbol": MARKERS[number % len(MARKERS)]},
                name=shown,
                customdata=[
                    [plain(label), mean.format(digits)] for label, mean in zip(labels, means, strict=True)
                ],
                hovertemplate=f"%{{customdata[0]}}<br>{shown} <b>%{{customdata[1]}}</b><extra></extra>",
            )
        )  # fmt: skip
    style(figure, height=_ROW * max(1, len(series)) * len(labels) // 2 + 110)
    figure.update_yaxes(
        tickvals=list(range(len(labels))),
        ticktext=list(ticks) if ticks is not None else [plain(label) for label in labels],
        autorange="reversed",
        showgrid=False,
    )
    figure.update_xaxes(title_text="mean")
    figure.update_layout(legend={"y": 1.0, "yanchor": "bottom"}, margin={"t": 34, "b": 40})
    return figure


__all__ = ["interval_rows"]
