"""Head experiments as figures: maps by layer and head, curves over head sets, gradient against effect."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from ctxlens.report.plots.allocation import MOST_LABELLED_HEADS, heatmap_height
from ctxlens.report.plots.theme import (
    DASHES,
    DIVERGING,
    INK,
    MARKERS,
    SEQUENTIAL,
    SERIES,
    colorbar,
    colorscale,
    plain,
    style,
)
from ctxlens.results import HeadCurves, HeadMap

NAMES = {
    "zero": "head's output set to zero",
    "mean": "head's output set to its mean",
    "blind": "head blind to the user's tokens",
    "steer": "head steered to the user",
    "gradient": "gradient of the head's bias",
    "estimate": "estimate from the gradient",
    "copying": "copying score",
    "user share": "attention to the user",
    "random": "random heads",
    "drift": "drift",
}
"""Names of maps and rankings in figures."""

ABLATIONS = ("zero", "mean", "blind")
"""Maps in which the head that matters most has the lowest number."""

POSITIVE = ("copying", "user share")
"""Maps whose numbers are never negative."""


def head_map(found: HeadMap, *, layers: tuple[int, ...] | None = None) -> go.Figure:
    """Draw one number for every layer and head.

    A signed number stands in parentheses if its 95 % interval contains zero. Hovering shows the interval.

    Args:
        found: the map.
        layers: the model's layer numbers; by default they count from 0.
    """
    values, (low, high) = found.values, found.interval()
    signed = found.kind not in POSITIVE
    n_layers, n_heads = values.shape
    names = tuple(range(n_layers)) if layers is None else layers
    top = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    top = max(top, 1e-6)
    digits = max(2, min(4, int(np.ceil(-np.log10(top))) + 2))
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    undecided = signed & ~found.decided()
    text = [
        [_cell(value, unsure, form) for value, unsure in zip(row, unknown, strict=True)]
        for row, unknown in zip(values.tolist(), undecided.tolist(), strict=True)
    ]
    n_contexts = len(set(found.contexts.tolist()))
    figure = go.Figure(
        go.Heatmap(
            z=np.round(values, 5).tolist(),
            x=list(range(n_heads)),
            y=list(names),
            zmin=-top if signed else 0.0,
            zmax=top,
            colorscale=colorscale(DIVERGING if signed else SEQUENTIAL),
            colorbar=colorbar(),
            xgap=2,
            ygap=2,
            text=text,
            texttemplate="%{text}" if n_heads <= MOST_LABELLED_HEADS else "",
            customdata=np.round(np.stack([low, high], -1), 5).tolist(),
            hoverongaps=False,
            hovertemplate=(
                f"layer %{{y}}, head %{{x}}<br>{plain(found.meta.get('quantity', found.kind))}: "
                f"<b>%{{z:{'+' if signed else ''}.4f}}</b><br>95 %: [%{{customdata[0]:.4f}}, "
                f"%{{customdata[1]:.4f}}]<br>{len(found.effects)} cells of {n_contexts} texts<extra></extra>"
            ),
        )
    )
    style(figure, height=heatmap_height(n_layers))
    figure.update_xaxes(title_text="head", showgrid=False, dtick=max(1, -(-n_heads // 16)), tick0=0)
    figure.update_yaxes(title_text="layer", showgrid=False, autorange="reversed",
                        tickvals=list(names)[:: max(1, -(-n_layers // 16))])  # fmt: skip
    return figure


def head_curves(curves: HeadCurves) -> go.Figure:
    """Draw the effect of acting on the first k heads of every ranking and on k random heads.

    Bands are 95 % intervals over texts; for random heads, over the means of the draws.
    """
    figure = go.Figure()
    names = sorted(dict.fromkeys(curves.frame["ranking"]), key=lambda name: name == "random")
    for i, name in enumerate(names):
        points = curves.points(name)
        sizes = [k for k, _ in points]
        shade = SERIES[i % len(SERIES)]
        group = {"legendgroup": name, "name": plain(_ranked_by(name))}
        figure.add_trace(
            go.Scatter(
                x=sizes + sizes[::-1],
                y=[_round(p.high, p.estimate) for _, p in points]
                + [_round(p.low, p.estimate) for _, p in points[::-1]],
                fill="toself",
                fillcolor=shade.faded(),
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
                **group,
            )
        )
        units = "draws" if name == "random" else "texts"
        figure.add_trace(
            go.Scatter(
                x=sizes,
                y=[round(p.estimate, 4) for _, p in points],
                customdata=[[_round(p.low), _round(p.high), p.n] for _, p in points],
                mode="lines+markers",
                line={"color": shade.built, "width": 2.5, "dash": DASHES[i % len(DASHES)]},
                marker={"color": shade.built, "size": 8, "symbol": MARKERS[i % len(MARKERS)]},
                hovertemplate=(
                    f"{group['name']}, %{{x}} heads<br><b>%{{y:+.3f}}</b> [%{{customdata[0]:.3f}}, "
                    f"%{{customdata[1]:.3f}}]<br>%{{customdata[2]}} {units}<extra></extra>"
                ),
                **group,
            )
        )
    style(figure, height=400)
    sizes = curves.sizes
    figure.update_xaxes(type="log", tickvals=sizes, ticktext=[str(k) for k in sizes],
                        title_text="number of heads", range=[np.log10(min(sizes)) - 0.05,
                                                             np.log10(max(sizes)) + 0.05])  # fmt: skip
    unit = "recall" if curves.meta.get("measure") == "recall" else "nats per token"
    figure.update_yaxes(title_text=f"change, {unit}", zeroline=True, zerolinecolor=INK.built)
    figure.update_layout(legend={"y": -0.22, "yanchor": "top"}, margin={"t": 12, "b": 24})
    return figure


def gradient_scatter(estimate: HeadMap, truth: HeadMap) -> go.Figure:
    """Draw the gradient of every head against the measured effect, one point per head."""
    x, y = estimate.values, truth.values
    low, high = truth.interval()
    n_layers = x.shape[0]
    figure = go.Figure()
    for layer in range(n_layers):
        figure.add_trace(
            go.Scatter(
                x=np.round(x[layer], 5).tolist(),
                y=np.round(y[layer], 5).tolist(),
                error_y={"type": "data", "symmetric": False, "thickness": 1, "width": 0,
                         "array": np.round(high[layer] - y[layer], 5).tolist(),
                         "arrayminus": np.round(y[layer] - low[layer], 5).tolist(),
                         "color": SERIES[layer % len(SERIES)].built},
                mode="markers",
                name=f"layer {layer}",
                marker={"size": 9, "symbol": MARKERS[layer % len(MARKERS)],
                        "color": SERIES[layer % len(SERIES)].built},
                customdata=list(range(x.shape[1])),
                hovertemplate=f"layer {layer}, head %{{customdata}}<br>estimate %{{x:+.4f}}<br>"
                "measured <b>%{y:+.4f}</b><extra></extra>",
                showlegend=n_layers <= 12,
            )
        )  # fmt: skip
    style(figure, height=400)
    figure.update_xaxes(title_text="gradient, nats per token per nat", zeroline=True,
                        zerolinecolor=INK.built)  # fmt: skip
    figure.update_yaxes(title_text="measured, nats per token", zeroline=True,
                        zerolinecolor=INK.built)  # fmt: skip
    figure.update_layout(legend={"y": -0.22, "yanchor": "top"}, margin={"t": 12, "b": 24})
    return figure


def _cell(value: float, undecided: bool, form: str) -> str:
    if np.isnan(value):
        return ""
    text = form.format(value)
    text = text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")
    return f"({text})" if undecided else text


def _ranked_by(name: str) -> str:
    if name == "random":
        return NAMES[name]
    return f"ranked by {NAMES.get(name, name)}"


def _round(value: float, otherwise: float = float("nan")) -> float | None:
    value = otherwise if np.isnan(value) else value
    return None if np.isnan(value) else round(float(value), 4)


__all__ = ["ABLATIONS", "NAMES", "POSITIVE", "gradient_scatter", "head_curves", "head_map"]
