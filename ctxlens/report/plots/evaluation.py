"""Means of an evaluation's metrics with their intervals, by model and condition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from ctxlens.report.plots.intervals import interval_rows
from ctxlens.report.plots.theme import plain
from ctxlens.results import Evaluation


def evaluation_means(evaluation: Evaluation, task: str, metrics: Sequence[str] | None = None) -> go.Figure:
    """Draw the means of one task's metrics, one line per model and condition, with 95 % intervals.

    The intervals are over contexts: the texts that the questions are about.

    Args:
        evaluation: the answers.
        task: one of its tasks.
        metrics: the metrics to draw; by default all metrics of the task.

    Raises:
        InputError: the evaluation does not have the task or a metric.
    """
    metrics = evaluation.metrics(task) if metrics is None else metrics
    found = {metric: [v for t, m, v in evaluation.rows() if (t, m) == (task, metric)] for metric in metrics}
    variants = list(dict.fromkeys(variant for these in found.values() for variant in these))
    figure = interval_rows(
        [", ".join(variant) for variant in variants],
        {metric: [evaluation.mean(task, metric, variant) for variant in variants] for metric in metrics},
        ticks=[f"{plain(model)}<br>{plain(condition)}" for model, condition in variants],
        digits=3,
    )
    values = evaluation.frame.loc[evaluation.frame["task"] == task, list(metrics)].to_numpy(dtype=float)
    if np.nanmin(values) >= 0 and np.nanmax(values) <= 1:
        figure.update_xaxes(range=[-0.04, 1.04])
    return figure


__all__ = ["evaluation_means"]
