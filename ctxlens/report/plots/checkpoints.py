"""Loss, bias and recall over the checkpoints of a training run."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ctxlens.report.plots.theme import DASHES, GRID, MARKERS, SERIES, plain, style
from ctxlens.results.checkpoints import Checkpoints

_PANELS = (
    ("recall", (("recall without template", "without template"), ("recall with template", "with template"))),
    ("loss", (("loss", "recall with minus without template"),)),
    ("bias", (("bias", "user's share with minus without template"),)),
)
"""Each panel's axis title, and its curves as quantity and name."""
_WIDE = 100
"""From this ratio of the last to the first step on, the axis is logarithmic."""


def checkpoint_curves(found: Checkpoints) -> go.Figure:
    """Draw recall, loss and bias against the training step, with 95 % intervals; one panel below the other.

    Checkpoints whose names state no step that can be compared stand side by side in their order.
    """
    figure = make_subplots(rows=len(_PANELS), cols=1, shared_xaxes=True, vertical_spacing=0.07)
    number = 0
    for row, (title, curves) in enumerate(_PANELS, start=1):
        for quantity, name in curves:
            figure.add_trace(_curve(found, quantity, name, number), row=row, col=1)
            number += 1
        figure.update_yaxes(title_text=title, row=row, col=1)
    style(figure, height=640)
    figure.update_yaxes(range=[-0.04, 1.04], row=1, col=1)
    for row in (2, 3):
        figure.add_hline(y=0, line={"width": 1, "dash": "dot", "color": GRID.built}, row=row, col=1)  # pyright: ignore
    figure.update_xaxes(**_axis(found))
    figure.update_xaxes(title_text=found.steps[1] if found.steps else "checkpoint", row=len(_PANELS), col=1)
    figure.update_layout(legend={"y": 1.02, "yanchor": "bottom"}, margin={"t": 64})
    return figure


def _axis(found: Checkpoints) -> dict[str, Any]:
    """The axis of the steps; of the names where there are no steps."""
    if found.steps is None:
        return {"type": "category", "ticktext": [plain(one) for one in found.models],
                "tickvals": list(found.models)}  # fmt: skip
    steps = found.steps[0]
    return {"type": "log" if steps[0] > 0 and steps[-1] / steps[0] >= _WIDE else "linear"}


def _curve(found: Checkpoints, quantity: str, name: str, number: int) -> go.Scatter:
    """One quantity with its intervals."""
    shade, values = SERIES[number % len(SERIES)], found.values(quantity)
    return go.Scatter(
        x=found.steps[0] if found.steps else found.models,
        y=[round(one.estimate, 4) for one in values],
        error_y={
            "type": "data", "symmetric": False, "thickness": 1.5, "width": 4, "color": shade.built,
            "array": [round(one.high - one.estimate, 4) for one in values],
            "arrayminus": [round(one.estimate - one.low, 4) for one in values],
        },
        mode="lines+markers",
        line={"color": shade.built, "width": 2, "dash": DASHES[number % len(DASHES)]},
        marker={"color": shade.built, "size": 8, "symbol": MARKERS[number % len(MARKERS)]},
        name=name,
        showlegend=quantity.startswith("recall"),  # the titles of the axes name the others
        customdata=[
            [plain(model), one.format()] for model, one in zip(found.models, values, strict=True)
        ],
        hovertemplate=f"%{{customdata[0]}}<br>{name} <b>%{{customdata[1]}}</b><extra></extra>",
    )  # fmt: skip


__all__ = ["checkpoint_curves"]
