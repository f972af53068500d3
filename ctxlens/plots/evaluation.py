"""Means of an evaluation's metrics with their intervals, by model and condition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from ctxlens.plots.theme import MARKERS, SERIES, plain, style
from ctxlens.results import Evaluation

_ROW = 30
_SPREAD = 0.22


def evaluation_means(evaluation: Evaluation, task: str, metrics: Sequence[str] | None = None) -> go.Figure:
    """Draw the mean of metrics of one task, a line a model and condition, with 95 % intervals over contexts.

    Args:
        evaluation: the answers.
        task: one of its tasks.
        metrics: those to draw; all of the task by default.

    Raises:
        InputError: there is no such task or metric.
    """
    metrics = evaluation.metrics(task) if metrics is None else metrics
    found = {metric: [v for t, m, v in evaluation.rows() if (t, m) == (task, metric)] for metric in metrics}
    variants = list(dict.fromkeys(variant for these in found.values() for variant in these))
    figure = go.Figure()
    for number, metric in enumerate(metrics):
        shade, name = SERIES[number % len(SERIES)], plain(metric)
        means = [evaluation.mean(task, metric, variant) for variant in variants]
        shift = _SPREAD * (2 * number - len(metrics) + 1) / max(1, len(metrics) - 1)
        told = [
            [plain(", ".join(variant)), mean.format(3)] for variant, mean in zip(variants, means, strict=True)
        ]
        figure.add_trace(
            go.Scatter(
                x=[round(mean.estimate, 4) for mean in means],
                y=[place + shift for place in range(len(variants))],
                error_x={
                    "type": "data", "symmetric": False, "thickness": 1.5, "width": 0, "color": shade.built,
                    "array": [round(mean.high - mean.estimate, 4) for mean in means],
                    "arrayminus": [round(mean.estimate - mean.low, 4) for mean in means],
                },
                mode="markers",
                marker={"color": shade.built, "size": 9, "symbol": MARKERS[number % len(MARKERS)]},
                name=name,
                customdata=told,
                hovertemplate=f"%{{customdata[0]}}<br>{name} <b>%{{customdata[1]}}</b><extra></extra>",
            )
        )  # fmt: skip
    style(figure, height=_ROW * max(1, len(metrics)) * len(variants) // 2 + 110)
    figure.update_yaxes(
        tickvals=list(range(len(variants))),
        ticktext=[f"{plain(model)}<br>{plain(condition)}" for model, condition in variants],
        autorange="reversed",
        showgrid=False,
    )
    figure.update_xaxes(title_text="mean")
    values = evaluation.frame.loc[evaluation.frame["task"] == task, list(metrics)].to_numpy(dtype=float)
    if np.nanmin(values) >= 0 and np.nanmax(values) <= 1:
        figure.update_xaxes(range=[-0.04, 1.04])
    figure.update_layout(legend={"y": 1.0, "yanchor": "bottom"}, margin={"t": 34, "b": 40})
    return figure


__all__ = ["evaluation_means"]
