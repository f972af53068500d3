"""Needle-in-a-haystack grids as figures: context length × depth, one panel a model and condition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int
from plotly.subplots import make_subplots

from ctxlens.errors import InputError
from ctxlens.plots.theme import SEQUENTIAL, colorbar, colorscale, plain, style
from ctxlens.results import NeedleGrid

CONDITIONS = {
    "plain+prefix": "no template",
    "template+prefix": "template",
    "template": "template, answer not begun",
    "assistant+prefix": "context in the assistant's turn",
}
"""What the conditions are called in figures; the answer is begun where nothing else is said."""

_MOST_LABELLED_COLUMNS = 12


@dataclass(frozen=True)
class NeedlePanel:
    """The cells of one model and condition, as a matrix.

    Attributes:
        key: the values of `model`, `condition`, `indicator`, `alpha` and `heads` that the rows share.
        mean: mean of the shown column, NaN where there is no cell.
        count: number of rows behind each cell.
    """

    key: dict[str, Any]
    context_tokens: tuple[int, ...]
    depth_percent: tuple[float, ...]
    mean: Float[np.ndarray, "depth length"]
    count: Int[np.ndarray, "depth length"]

    @property
    def title(self) -> str:
        """The panel's heading."""
        return panel_title(**self.key)


def panel_title(
    model: str, condition: str, indicator: bool = False, alpha: float = 1.0, heads: str = "none"
) -> str:
    """Name one variant of the grid in words, for instance `vanilla: template + [IND]`."""
    name = f"{model}: {CONDITIONS.get(condition, condition)}"
    if indicator:
        name += " + [IND]"
    if alpha != 1.0:
        name += f", α {alpha:g} on {heads} heads"
    return name


def needle_panels(grid: NeedleGrid, column: str = "recall") -> list[NeedlePanel]:
    """Split a grid into its variants, in the order in which they stand in the table.

    Args:
        grid: the cells.
        column: `recall` or `memory_recall`.
    """
    names = ["model", "condition", "indicator", "alpha", "heads"]
    frame = grid.frame.assign(heads=grid.frame["heads"].where(grid.frame["alpha"] != 1.0, "none"))
    lengths = sorted({int(v) for v in frame["context_tokens"]})
    depths = sorted({float(v) for v in frame["depth_percent"]})
    panels = []
    for values, rows in frame.groupby(names, sort=False):
        cells = rows.groupby(["depth_percent", "context_tokens"])[column]
        mean = cells.mean().unstack().reindex(index=depths, columns=lengths)
        count = cells.count().unstack().reindex(index=depths, columns=lengths).fillna(0)
        model, condition, indicator, alpha, heads = cast("tuple[Any, ...]", values)
        key = {
            "model": str(model),
            "condition": str(condition),
            "indicator": bool(indicator),
            "alpha": float(alpha),
            "heads": str(heads),
        }
        panels.append(
            NeedlePanel(key, tuple(lengths), tuple(depths), mean.to_numpy(float), count.to_numpy(int))
        )
    return panels


def split_by_memory(grid: NeedleGrid) -> tuple[NeedleGrid, NeedleGrid | None]:
    """Cells whose needle contradicts what the model knows by heart, and those where nothing is memorised.

    A grid of one kind only comes back whole, with None beside it.
    """
    known = grid.frame["memory_recall"].notna()
    if known.all() or not known.any():
        return grid, None
    parts = (grid.frame[mask].reset_index(drop=True) for mask in (known, ~known))
    first, second = (NeedleGrid(part, grid.meta) for part in parts)
    return first, second


def needle_heatmap(grid: NeedleGrid, *, column: str = "recall", columns: int = 3) -> go.Figure:
    """Draw recall by context length and depth, every model and condition on one colour scale.

    Args:
        grid: the cells; give `grid.where(model="vanilla")` to draw only some.
        column: `recall`, or `memory_recall` (the answer that the model knew by heart).
        columns: number of panels in a row.

    Raises:
        InputError: the grid has no rows.
    """
    panels = needle_panels(grid, column)
    if not panels:
        raise InputError("the needle grid has no rows to draw.")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = make_subplots(
        rows, columns,
        subplot_titles=[plain(panel.title) for panel in panels],
        shared_xaxes=True, shared_yaxes=True,
        horizontal_spacing=0.04, vertical_spacing=0.22 / rows if rows > 1 else 0,
    )  # fmt: skip
    for i, panel in enumerate(panels):
        trace = panel_trace(panel, column).update(coloraxis="coloraxis", zmin=None, zmax=None, showscale=None)
        figure.add_trace(trace, row=i // columns + 1, col=i % columns + 1)
    style(figure, height=240 * rows + 70)
    _axes(figure)
    figure.update_xaxes(showticklabels=True)
    figure.update_xaxes(title_text="context tokens", row=rows)
    figure.update_yaxes(title_text="depth %", col=1)
    figure.update_annotations(font={"size": 13})
    figure.update_layout(
        coloraxis={
            "colorscale": colorscale(SEQUENTIAL),
            "cmin": 0,
            "cmax": 1,
            "colorbar": colorbar("recall"),
        },
        margin={"t": 36},
    )
    return figure


def needle_panel(panel: NeedlePanel, *, column: str = "recall") -> go.Figure:
    """Draw one panel alone, without title and colour bar, for a page that lays panels out itself."""
    figure = go.Figure(panel_trace(panel, column))
    style(figure, height=120 + 30 * len(panel.depth_percent))
    _axes(figure)
    figure.update_xaxes(title_text="context tokens")
    figure.update_yaxes(title_text="depth %")
    figure.update_layout(margin={"t": 6, "b": 40, "l": 48, "r": 6})
    return figure


def panel_trace(panel: NeedlePanel, column: str = "recall") -> go.Heatmap:
    """The heatmap of one panel, from 0 to 1."""
    few = len(panel.context_tokens) <= _MOST_LABELLED_COLUMNS
    return go.Heatmap(
        z=np.round(panel.mean, 4).tolist(),
        x=[str(length) for length in panel.context_tokens],
        y=[f"{depth:g}" for depth in panel.depth_percent],
        customdata=panel.count.tolist(),
        zmin=0,
        zmax=1,
        colorscale=colorscale(SEQUENTIAL),
        showscale=False,
        xgap=2,
        ygap=2,
        hoverongaps=False,
        texttemplate="%{z:.2f}" if few else "",
        hovertemplate=(
            f"{column.replace('_', ' ')} <b>%{{z:.3f}}</b><br>%{{x}} context tokens, depth %{{y}} %"
            "<br>%{customdata} cases<extra></extra>"
        ),
    )


def _axes(figure: go.Figure) -> None:
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
