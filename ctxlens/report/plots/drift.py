"""Attention drift as figures: by layer, by layer and head, and by role with a slider over layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ctxlens.chat.roles import Role
from ctxlens.report.plots.allocation import (
    MOST_LABELLED_HEADS,
    add_remark,
    choose_view,
    head_frames,
    mean_over_queries,
)
from ctxlens.report.plots.heads import head_map
from ctxlens.report.plots.theme import DIVERGING, INK, MUTED, SEQUENTIAL, SERIES, colorscale, plain, style
from ctxlens.results import Drift
from ctxlens.stats import Interval

HEADS = {"mean": "mean over heads", "retrieval": "retrieval head"}
_SIDES = (("circle", "solid"), ("square", "dash"))


def drift_by_layer(drift: Drift, role: str = "user", view: str | None = None) -> go.Figure:
    """Draw the share of one role by layer on both sides: the mean over heads, and the retrieval head.

    The grey lines show the shares if attention were uniform, which follow from token counts alone. Bands are
    95 % intervals over the texts of the conversations.

    Args:
        drift: what to draw.
        role: the role whose share is shown.
        view: a name of `ctxlens.results.VIEWS`; by default `without sinks`, or `raw` where sinks were not
            measured, and the figure then says so.

    Raises:
        InputError: an unknown view, or a role that the view leaves out.
    """
    view, remark = choose_view([drift], view)
    figure = make_subplots(
        1, 2, shared_yaxes=True, horizontal_spacing=0.05, subplot_titles=list(HEADS.values())
    )
    uniform = drift.uniform(role, view).mean(1)
    for column, heads in enumerate(HEADS, start=1):
        by_layer = drift.by_layer(role, view, heads=heads)
        for side, name in enumerate(drift.sides):
            found = [one[side] for one in by_layer]
            changes = [one[2] for one in by_layer]
            curve = _curve(drift.layers, found, changes, side, plain(name), HEADS[heads])
            baseline = _baseline(drift.layers, float(uniform[side]), side, plain(name))
            figure.add_trace(_band(drift.layers, found, side), row=1, col=column)
            figure.add_trace(curve.update(showlegend=column == 1), row=1, col=column)
            figure.add_trace(baseline.update(showlegend=column == 1), row=1, col=column)
    style(figure, height=380)
    figure.update_xaxes(title_text="layer", dtick=max(1, -(-len(drift.layers) // 12)))
    figure.update_yaxes(title_text=f"share of {role}", range=[0, 1.02], col=1)
    figure.update_annotations(font={"size": 13})
    figure.update_layout(legend={"y": -0.24, "yanchor": "top"}, margin={"t": 32, "b": 24})
    return add_remark(figure, remark)


def _band(layers: Sequence[int], found: Sequence[Interval], side: int) -> go.Scatter:
    """The 95 % intervals of one side as a band."""
    return go.Scatter(
        x=[*layers, *reversed(layers)],
        y=[_edge(one.high, one) for one in found] + [_edge(one.low, one) for one in reversed(found)],
        fill="toself",
        fillcolor=SERIES[side].faded(),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=str(side),
    )


def _curve(
    layers: Sequence[int],
    found: Sequence[Interval],
    changes: Sequence[Interval],
    side: int,
    name: str,
    heads: str,
) -> go.Scatter:
    """The shares of one side by layer; hovering also shows the change between the sides."""
    colour, (symbol, dash) = SERIES[side].built, _SIDES[side]
    return go.Scatter(
        x=list(layers),
        y=[round(one.estimate, 4) for one in found],
        customdata=[
            [share.format(3), change.format(3)] for share, change in zip(found, changes, strict=True)
        ],
        mode="lines+markers",
        line={"color": colour, "width": 2.5, "dash": dash},
        marker={"color": colour, "size": 8, "symbol": symbol},
        name=name,
        legendgroup=str(side),
        hovertemplate=f"{name}, {heads}, layer %{{x}}<br><b>%{{customdata[0]}}</b><br>"
        "second minus first: %{customdata[1]}<extra></extra>",
    )


def _baseline(layers: Sequence[int], uniform: float, side: int, name: str) -> go.Scatter:
    """The share of one side if attention were uniform."""
    return go.Scatter(
        x=[layers[0], layers[-1]],
        y=[round(uniform, 4)] * 2,
        mode="lines",
        line={"color": MUTED.built, "width": 1.5, "dash": ("dot", "dashdot")[side]},
        name=f"uniform: {name}",
        legendgroup=f"uniform {side}",
        hovertemplate=f"{name}, if attention were uniform: %{{y:.3f}}<extra></extra>",
    )


def drift_map(
    drift: Drift, role: str = "user", view: str | None = None, *, excess: bool = False
) -> go.Figure:
    """Draw the second side minus the first, by layer and head, with frames around the retrieval heads.

    Args:
        drift: what to draw.
        role: the role whose share is shown.
        view: a name of `ctxlens.results.VIEWS`; by default `without sinks`, or `raw` where sinks were not
            measured, and the figure then says so.
        excess: first subtract the share that each side would have if attention were uniform.
    """
    view, remark = choose_view([drift], view)
    found = drift.excess(role, view) if excess else drift.difference(role, view)
    figure = head_map(found, layers=drift.layers)
    figure.update_layout(shapes=head_frames(drift.layers, drift.retrieval))
    return add_remark(figure, remark)


def drift_slider(drift: Drift, view: str | None = None) -> go.Figure:
    """Draw role by head on both sides and their difference, one layer at a time, with a slider."""
    view, remark = choose_view([drift], view)
    roles = [name for name in drift.shown_roles() if Role.parse(name) not in drift.left_out(view)]
    means = np.stack([mean_over_queries(drift.share(role, view)) for role in roles], axis=2)
    # [side, layer, role, head]
    change = means[1] - means[0]
    top = max(0.05, float(np.nanmax(np.abs(change))))
    n_heads = means.shape[-1]
    panels = [means[0], means[1], change]
    titles = [*(plain(name) for name in drift.sides), "second minus first"]
    figure = make_subplots(1, 3, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03)
    for column, (values, title) in enumerate(zip(panels, titles, strict=True), start=1):
        signed = column == 3
        number = "%{z:+.2f}" if signed else "%{z:.2f}"
        figure.add_trace(
            go.Heatmap(
                z=np.round(values[0], 4).tolist(),
                x=list(range(n_heads)),
                y=roles,
                zmin=-top if signed else 0.0,
                zmax=top if signed else 1.0,
                colorscale=colorscale(DIVERGING if signed else SEQUENTIAL),
                showscale=False,
                xgap=2,
                ygap=2,
                texttemplate=number if n_heads <= MOST_LABELLED_HEADS else "",
                hovertemplate=f"{title}<br>head %{{x}}, <b>%{{y}}</b>: <b>{number}</b><extra></extra>",
            ),
            row=1,
            col=column,
        )
    style(figure, height=max(300, 40 * len(roles) + 170))
    figure.update_xaxes(title_text="head", showgrid=False, dtick=max(1, -(-n_heads // 16)))
    figure.update_yaxes(showgrid=False, autorange="reversed", col=1)
    figure.update_yaxes(autorange="reversed")
    steps = [
        {"label": str(layer), "method": "restyle",
         "args": [{"z": [np.round(values[i], 4).tolist() for values in panels]}]}
        for i, layer in enumerate(drift.layers)
    ]  # fmt: skip
    figure.update_annotations(font={"size": 13})
    figure.update_layout(
        sliders=[{"active": 0, "steps": steps, "currentvalue": {"prefix": "layer "}, "pad": {"t": 48, "b": 8},
                  "bordercolor": INK.built, "bgcolor": MUTED.built, "activebgcolor": INK.built,
                  "tickcolor": INK.built, "font": {"color": INK.built}}],
        margin={"t": 32},
    )  # fmt: skip
    return add_remark(figure, remark)


def _edge(value: float, interval: Interval) -> float:
    return round(interval.estimate if np.isnan(value) else value, 4)


__all__ = ["drift_by_layer", "drift_map", "drift_slider"]
