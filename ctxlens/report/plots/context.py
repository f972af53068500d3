"""How a model used its context while it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ctxlens.errors import InputError
from ctxlens.report.plots.theme import DASHES, MARKERS, SERIES, style
from ctxlens.stats import bootstrap_mean

_PANELS = (
    ("recall", (
        ("recall_plain", "without template"), ("recall_template", "with template"),
        ("recall_indicator", "with template and indicator"), ("closed_book", "questions without a text"),
    )),
    ("user's share", (
        ("user_share_plain", "without template"), ("user_share_template", "with template"),
    )),
)  # fmt: skip
"""Each panel's axis title, and its curves as quantity and name."""
_COLOURS = {"without template": 0, "with template": 1, "with template and indicator": 2}


def context_curves(readings: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Draw the readings of a training by step, with 95 % intervals over the texts.

    Args:
        readings: the lines of `context/readings.jsonl`; those without values are left out.

    Raises:
        InputError: no reading has values.
    """
    known = [one for one in readings if one.get("by_text")]
    if not known:
        raise InputError("there are no readings to draw.")
    figure = make_subplots(rows=len(_PANELS), cols=1, shared_xaxes=True, vertical_spacing=0.09)
    shown: set[str] = set()
    for row, (title, curves) in enumerate(_PANELS, start=1):
        for quantity, name in curves:
            if any(one.get(quantity) is not None for one in known):
                curve = _curve(known, quantity, name).update(showlegend=name not in shown)
                figure.add_trace(curve, row=row, col=1)
                shown.add(name)
        figure.update_yaxes(title_text=title, rangemode="tozero", row=row, col=1)
    style(figure, height=480)
    figure.update_yaxes(range=[-0.04, 1.04], row=1, col=1)
    figure.update_xaxes(title_text="optimizer step", row=len(_PANELS), col=1)
    return figure.update_layout(legend={"y": 1.02, "yanchor": "bottom"}, margin={"t": 64})


def _curve(readings: Sequence[Mapping[str, Any]], quantity: str, name: str) -> go.Scatter:
    """One quantity with its intervals."""
    number = _COLOURS.get(name, 3)
    shade = SERIES[number % len(SERIES)].built
    points = [one for one in readings if one.get(quantity) is not None]
    values = [bootstrap_mean(_known(one["by_text"], quantity)) for one in points]
    return go.Scatter(
        x=[one["step"] for one in points],
        y=[round(one.estimate, 4) for one in values],
        error_y={
            "type": "data", "symmetric": False, "thickness": 1.5, "width": 4, "color": shade,
            "array": [round(one.high - one.estimate, 4) for one in values],
            "arrayminus": [round(one.estimate - one.low, 4) for one in values],
        },
        mode="lines+markers",
        line={"color": shade, "width": 2, "dash": DASHES[number % len(DASHES)]},
        marker={"color": shade, "size": 7, "symbol": MARKERS[number % len(MARKERS)]},
        name=name,
        legendgroup=name,
        customdata=[one.format() for one in values],
        hovertemplate=f"step %{{x}}<br>{name} <b>%{{customdata}}</b><extra></extra>",
    )  # fmt: skip


def _known(by_text: Sequence[Mapping[str, Any]], quantity: str) -> list[float]:
    """The values of the texts that have one."""
    return [text[quantity] for text in by_text if text.get(quantity) is not None]


__all__ = ["context_curves"]
