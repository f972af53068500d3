"""The loss of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from ctxlens.report.plots.theme import SERIES, style


def loss_curve(log: Sequence[Mapping[str, float | int]]) -> go.Figure:
    """Draw the training loss by step.

    Args:
        log: one mapping per logged step, with `step` and `loss` (nats per trained token).
    """
    shade = SERIES[0].built
    figure = go.Figure(
        go.Scatter(
            x=[one.get("step", i) for i, one in enumerate(log)],
            y=[one["loss"] for one in log],
            mode="lines+markers" if len(log) <= 60 else "lines",
            line={"color": shade, "width": 2},
            marker={"color": shade, "size": 6},
            hovertemplate="step %{x}<br>loss <b>%{y:.4f}</b><extra></extra>",
        )
    )
    style(figure, height=280)
    figure.update_xaxes(title_text="optimizer step")
    figure.update_yaxes(title_text="loss (nats)", rangemode="tozero")
    return figure
