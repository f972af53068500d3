"""Context-dependency scores by layer: their distributions, and which turns each layer would select."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from ctxlens.errors import InputError
from ctxlens.report.plots.allocation import heatmap_height
from ctxlens.report.plots.theme import SEQUENTIAL, colorbar, colorscale, style
from ctxlens.results import Scores

BETAS = (0.5, 0.6, 0.7, 0.8)
"""The thresholds of the paper's Table 10."""

TOP_SHARE = 0.1
"""The share of turns that each layer selects when two layers are compared (paper B.5)."""

_MOST_LABELLED = 12


def score_density(scores: Scores, *, reduction: str = "mean_of_best", bins: int = 50) -> go.Figure:
    """Draw the distribution of the scores of every layer, one row per layer.

    Args:
        scores: scored turns.
        reduction: one of `Scores.REDUCTIONS`.
        bins: number of intervals between 0 and 1.

    Raises:
        InputError: an unknown reduction, or an empty table.
    """
    layers = _layers(scores)
    edges = np.linspace(0, 1, bins + 1)
    middles = np.round((edges[:-1] + edges[1:]) / 2, 4)
    shares = []
    for layer in layers:
        values = scores.layer(layer, reduction).dropna().to_numpy(dtype=float)
        counts, _ = np.histogram(np.clip(values, 0, 1), edges)
        shares.append(counts / max(counts.sum(), 1))
    top = max(float(np.max(shares)), 1e-9)
    figure = go.Figure(
        go.Heatmap(
            z=np.round(shares, 5).tolist(), x=middles.tolist(), y=layers, zmin=0, zmax=top, ygap=2,
            colorscale=colorscale(SEQUENTIAL), colorbar={**colorbar("share of turns"), "tickformat": ".0%"},
            hovertemplate="layer %{y}, score near %{x:.2f}: <b>%{z:.1%}</b> of the turns<extra></extra>",
        )
    )  # fmt: skip
    _frame(figure, layers, "score")
    figure.update_xaxes(range=[0, 1])
    return figure


def layer_disagreement(
    scores: Scores, *, reduction: str = "mean_of_best", top_share: float = TOP_SHARE
) -> go.Figure:
    """Draw how much the selections of any two layers differ (paper B.5).

    Each layer selects the `top_share` of turns that it scores highest. A cell is the share of these turns
    that the other layer does not select. Two random selections would differ in `1 - top_share` of them.

    Raises:
        InputError: an unknown reduction, too few turns, or a share outside 0 to 1.
    """
    layers, differing = disagreement(scores, reduction=reduction, top_share=top_share)
    few = len(layers) <= _MOST_LABELLED
    figure = go.Figure(
        go.Heatmap(
            z=np.round(differing, 4).tolist(), x=layers, y=layers, zmin=0, zmax=1, xgap=2, ygap=2,
            colorscale=colorscale(SEQUENTIAL), colorbar={**colorbar(), "tickformat": ".0%"},
            texttemplate="%{z:.0%}" if few else "",
            hovertemplate="layers %{x} and %{y}: <b>%{z:.0%}</b> of the selected turns differ<extra></extra>",
        )
    )  # fmt: skip
    _frame(figure, layers, "layer")
    figure.update_xaxes(tickvals=_ticks(layers))
    return figure


def disagreement(
    scores: Scores, *, reduction: str = "mean_of_best", top_share: float = TOP_SHARE
) -> tuple[list[int], np.ndarray]:
    """The layers, and for each pair of them the share of top turns that they do not have in common.

    Among turns with equal scores, the earlier ones are taken.

    Raises:
        InputError: an unknown reduction, too few turns, or a share outside 0 to 1.
    """
    if not 0 < top_share < 1:
        raise InputError(f"top_share must be a share of the turns between 0 and 1, got {top_share}.")
    layers = _layers(scores)
    values = np.stack([scores.layer(layer, reduction).to_numpy(dtype=float) for layer in layers])
    count = round(top_share * values.shape[1])
    if not count:
        raise InputError(
            f"the top {top_share:g} of {values.shape[1]} turns is less than one turn; score more turns."
        )
    chosen = np.zeros(values.shape, dtype=bool)
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    np.put_along_axis(chosen, order, True, axis=1)
    return layers, 1 - (chosen.astype(int) @ chosen.T.astype(int)) / count


def threshold_shares(
    scores: Scores, *, reduction: str = "mean_of_best", betas: Sequence[float] = BETAS
) -> list[tuple[int, list[float]]]:
    """The share of turns whose score is above each threshold, for every layer (paper Table 10)."""
    rows = []
    for layer in _layers(scores):
        values = scores.layer(layer, reduction).to_numpy(dtype=float)
        rows.append((layer, [float((values > beta).mean()) for beta in betas]))
    return rows


def _layers(scores: Scores) -> list[int]:
    if not len(scores):
        raise InputError("there are no scores to draw.")
    return sorted(int(layer) for layer in scores.frame["layer"].unique())


def _ticks(layers: list[int]) -> list[int]:
    return layers[:: math.ceil(len(layers) / 16)]


def _frame(figure: go.Figure, layers: list[int], across: str) -> None:
    style(figure, height=heatmap_height(len(layers)))
    figure.update_xaxes(title_text=across, showgrid=False)
    figure.update_yaxes(title_text="layer", showgrid=False, autorange="reversed", tickvals=_ticks(layers))
