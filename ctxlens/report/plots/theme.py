"""Layout shared by all plotly figures; their colours are those of `ctxlens.report.plots.look`.

Backgrounds are transparent. Figures are built with the shade `built` of each colour (text with a grey that is
readable on light and dark pages), and a page that knows its colour scheme replaces the shades with
`colour_schemes`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from ctxlens.report.plots.look import (
    DASHES,
    DIVERGING,
    FONT,
    GRID,
    INK,
    MARKERS,
    MUTED,
    PATTERNS,
    ROLE_PATTERNS,
    ROLE_SHADES,
    SEQUENTIAL,
    SERIES,
    Shade,
    colour_schemes,
)


def colorscale(stops: Sequence[Shade]) -> list[list[float | str]]:
    """A plotly colour scale with evenly spaced stops."""
    return [[round(i / (len(stops) - 1), 4), stop.built] for i, stop in enumerate(stops)]


def style(figure: go.Figure, *, height: int, title: str = "") -> go.Figure:
    """Give a figure the shared layout: fonts, transparent background, light axes, small margins."""
    figure.update_layout(
        template="none",
        height=height,
        title={"text": title, "x": 0, "xref": "container", "font": {"size": 15}, "automargin": True,
               "pad": {"b": 12, "l": 4}} if title else None,
        font={"family": FONT, "size": 13, "color": INK.built},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 56, "r": 12, "t": 44 if title else 16, "b": 48},
        hoverlabel={"font": {"family": FONT, "size": 13}, "align": "left"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left",
                "font": {"size": 12}},
        dragmode=False,
        barmode="relative",
    )  # fmt: skip
    axis = {"gridcolor": GRID.built, "linecolor": GRID.built, "zeroline": False, "automargin": True,
            "fixedrange": True, "tickfont": {"size": 12}, "title": {"standoff": 8}}  # fmt: skip
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def plain(text: object) -> str:
    """Text from data, escaped so that plotly does not read markup in a title, legend or hover text."""
    return html.escape(str(text), quote=False).replace("%{", "%&#123;")


def colorbar(title: str = "") -> dict:
    """A slim colour bar beside a heatmap."""
    return {"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 11}, "xpad": 6,
            "title": {"text": title, "side": "right", "font": {"size": 12}}}  # fmt: skip


__all__ = [
    "DASHES", "DIVERGING", "FONT", "GRID", "INK", "MARKERS", "MUTED", "PATTERNS", "ROLE_PATTERNS",
    "ROLE_SHADES", "SEQUENTIAL", "SERIES", "Shade", "colorbar", "colorscale", "colour_schemes", "plain",
    "style",
]  # fmt: skip
