"""Colours and layout shared by all figures.

Colour-blind readers can tell the colours apart (after Okabe and Ito). Scales change steadily in lightness, so
that they survive a greyscale print. Everything that a colour shows is also shown by a shape, a pattern or a
number. Backgrounds are transparent. Each colour has one shade for light pages and one for dark pages. Figures
are built with the light shade (text with a grey that is readable on both), and a page that knows its colour
scheme replaces the shades with `colour_schemes`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Shade:
    """One colour: the shade that figures are built with, and the shades for light and dark pages."""

    built: str
    light: str
    dark: str

    def faded(self, opacity: float = 0.18) -> str:
        """The built shade with some transparency, for bands behind a line."""
        return _rgba(self.built, opacity)


INK = Shade("#6b7280", "#2a3038", "#dfe3e8")
MUTED = Shade("#7b828d", "#5d6570", "#a3abb6")
GRID = Shade("#9aa0a833", "#e3e6ea", "#313843")

ROLE_SHADES: dict[str, Shade] = {
    "bos": Shade("#4d5561", "#4d5561", "#c3c9d1"),
    "system": Shade("#b5568f", "#b5568f", "#e29cc6"),
    "user": Shade("#0068a8", "#0068a8", "#56aee8"),
    "assistant": Shade("#d55e00", "#d55e00", "#f39245"),
    "tool": Shade("#a67c00", "#a67c00", "#e3bf4a"),
    "template": Shade("#8a929d", "#8a929d", "#8f98a5"),
    "indicator": Shade("#00865f", "#00865f", "#3ccb9d"),
    "pad": Shade("#c2c7ce", "#c2c7ce", "#4b535f"),
    "sink": Shade("#6a4fa0", "#6a4fa0", "#ab8fe0"),
}
ROLE_PATTERNS: dict[str, str] = {
    "user": "", "assistant": "/", "template": ".", "bos": "x", "system": "\\", "tool": "-",
    "indicator": "+", "pad": "", "sink": "|",
}  # fmt: skip

SERIES = (ROLE_SHADES["user"], ROLE_SHADES["assistant"], ROLE_SHADES["template"],
          ROLE_SHADES["indicator"], ROLE_SHADES["system"], ROLE_SHADES["tool"])  # fmt: skip
PATTERNS = ("", "/", ".", "x", "\\", "-")

SEQUENTIAL = tuple(
    Shade(light, light, dark)
    for light, dark in (
        ("#f1f5f9", "#1d2632"), ("#c6daec", "#1f4165"), ("#8ab6da", "#28659a"),
        ("#4489c0", "#4693cd"), ("#175a96", "#8ac3ea"), ("#0a2d57", "#e2f1fc"),
    )
)  # fmt: skip
DIVERGING = tuple(
    Shade(light, light, dark)
    for light, dark in (
        ("#7c3a02", "#ffc588"), ("#c8690f", "#dd8a36"), ("#f2bd83", "#87531f"), ("#f6f4f1", "#2a2f37"),
        ("#a4c8e4", "#2a5a85"), ("#3a80ba", "#4b94cf"), ("#083a6b", "#aad8fb"),
    )
)  # fmt: skip


DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross")
"""Line styles and symbols that tell curves apart without colour."""


def colorscale(stops: Sequence[Shade]) -> list[list[float | str]]:
    """A plotly colour scale with evenly spaced stops."""
    return [[round(i / (len(stops) - 1), 4), stop.built] for i, stop in enumerate(stops)]


def colour_schemes() -> dict[str, tuple[str, str]]:
    """Every colour that figures are built with, and its shades on light and on dark pages."""
    shades = [INK, MUTED, GRID, *ROLE_SHADES.values(), *SERIES, *SEQUENTIAL, *DIVERGING]
    schemes = {shade.built: (shade.light, shade.dark) for shade in shades}
    schemes |= {s.faded(): (_rgba(s.light, 0.18), _rgba(s.dark, 0.18)) for s in SERIES}
    return schemes


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


def _rgba(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
