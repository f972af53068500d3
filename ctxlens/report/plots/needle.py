"""Needle-in-a-haystack grids as figures: context length × depth, one panel per model and condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int
from plotly.subplots import make_subplots

from ctxlens.errors import InputError
from ctxlens.report.plots.conditions import condition_name
from ctxlens.report.plots.theme import DIVERGING, SEQUENTIAL, colorbar, colorscale, plain, style
from ctxlens.results import NeedleGrid
from ctxlens.results.tables import name_length

COLUMNS = {
    "recall": "recall",
    "memory_recall": "answered from memory",
    "contains": "contains the needle word for word",
    "needle_logprob": "log-probability, nats per token",
}
"""Names of the scores in figures."""

_ASKING = ("condition", "indicator", "alpha", "target_share", "heads")
"""The columns that together say how a model was asked."""

_MOST_LABELLED_COLUMNS = 12


@dataclass(frozen=True)
class NeedlePanel:
    """The cells of one model and condition, as a matrix.

    Attributes:
        key: the values of `model`, `condition`, `indicator`, `alpha`, `heads` and, in grids that have it,
            `target_share` that the rows share. None where the grid has no value.
        context_tokens: the context lengths, in tokens, as requested.
        depth_percent: the depths of the needle, in percent.
        mean: mean of the shown column, NaN where there is no cell.
        count: number of rows behind each cell.
        built_tokens: the mean lengths of the contexts that were built; as requested, if left out.
    """

    key: dict[str, Any]
    context_tokens: tuple[int, ...]
    depth_percent: tuple[float, ...]
    mean: Float[np.ndarray, "depth length"]
    count: Int[np.ndarray, "depth length"]
    built_tokens: tuple[int, ...] | None = None

    @property
    def length_labels(self) -> list[str]:
        """The distinct names of the lengths: as built, and as requested too where two are built alike."""
        built = self.built_tokens or self.context_tokens
        pairs = zip(built, self.context_tokens, strict=True)
        return [name_length(*pair) if built.count(pair[0]) > 1 else str(pair[0]) for pair in pairs]

    @property
    def full_lengths(self) -> list[str]:
        """The lengths as built and, where they differ, as requested."""
        built = self.built_tokens or self.context_tokens
        return [name_length(*pair) for pair in zip(built, self.context_tokens, strict=True)]

    @property
    def condition(self) -> str:
        """The condition's full name, with indicator and steering."""
        return condition_name(**{name: value for name, value in self.key.items() if name != "model"})

    @property
    def title(self) -> str:
        """The panel's heading: model and condition, for instance `tuned: template+indicator`."""
        return f"{self.key['model']}: {self.condition}"

    @property
    def rows(self) -> dict[str, Any]:
        """The values of columns that choose the panel's rows, for instance for `NeedleGrid.recall`."""
        steered = self.key["alpha"] != 1.0
        return {
            name: value
            for name, value in self.key.items()
            if value is not None and (steered or name != "heads")
        }


def needle_panels(grid: NeedleGrid, column: str = "recall") -> list[NeedlePanel]:
    """Split a grid into its variants, in the order of the table.

    Args:
        grid: the cells.
        column: the score that is shown, one of `COLUMNS`.
    """
    names = [name for name in ("model", *_ASKING) if name in grid.frame]
    frame = grid.frame.assign(heads=grid.frame["heads"].where(grid.frame["alpha"] != 1.0, "none"))
    lengths = sorted({int(v) for v in frame["context_tokens"]})
    depths = sorted({float(v) for v in frame["depth_percent"]})
    built = tuple(grid.built_lengths[length] for length in lengths)
    panels = []
    for values, rows in frame.groupby(names, sort=False, dropna=False):
        cells = rows.groupby(["depth_percent", "context_tokens"])[column]
        mean = cells.mean().unstack().reindex(index=depths, columns=lengths)
        count = cells.count().unstack().reindex(index=depths, columns=lengths).fillna(0)
        key = {name: _plain_value(value) for name, value in zip(names, cast("tuple", values), strict=True)}
        panels.append(
            NeedlePanel(key, tuple(lengths), tuple(depths), mean.to_numpy(float), count.to_numpy(int), built)
        )
    return panels


def _plain_value(value: Any) -> Any:
    """A cell of the table as a Python value; None for NaN."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and np.isnan(value) else value


def split_by_memory(grid: NeedleGrid) -> tuple[NeedleGrid, NeedleGrid | None]:
    """Split a grid into cells whose needle contradicts what the model knows by heart, and all others.

    A grid with cells of one kind only is returned whole, and None with it.
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
        column: the score that is shown, one of `COLUMNS`.
        columns: number of panels per row.

    Raises:
        InputError: the grid has no rows.
    """
    panels = needle_panels(grid, column)
    if not panels:
        raise InputError("the needle grid has no rows to draw.")
    low, high = score_range(panels, column)
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
            "cmin": low,
            "cmax": high,
            "colorbar": colorbar(COLUMNS.get(column, column)),
        },
        margin={"t": 36},
    )
    return figure


def needle_panel(
    panel: NeedlePanel, *, column: str = "recall", limits: tuple[float, float] = (0.0, 1.0)
) -> go.Figure:
    """Draw one panel without title and colour bar, for a page that arranges the panels itself."""
    return _alone(panel_trace(panel, column, limits), panel)


def needle_difference(grid: NeedleGrid, first: NeedlePanel, second: NeedlePanel, column: str) -> go.Figure:
    """Draw the second panel minus the first, over the cells that both have.

    Args:
        grid: the table from which both panels are.
        first: the panel to subtract.
        second: the panel from which it is subtracted.
        column: the score that is shown, one of `COLUMNS`.
    """
    one, other = (grid.recall(column, **panel.rows) for panel in (first, second))
    places = grid.frame.drop_duplicates("cell").set_index("cell")[["depth_percent", "context_tokens"]]
    change = places.join((other - one).dropna().rename("change"), how="inner")
    cells = change.groupby(["depth_percent", "context_tokens"])["change"]
    index = {"index": list(first.depth_percent), "columns": list(first.context_tokens)}
    mean = cells.mean().unstack().reindex(**index).to_numpy(float)
    count = cells.count().unstack().reindex(**index).fillna(0).to_numpy(int)
    panel = replace(first, key=second.key, mean=mean, count=count)
    largest = float(np.nanmax(np.abs(mean), initial=0.0)) if count.any() else 0.0
    limit = 1.0 if column != "needle_logprob" else largest or 1.0
    trace = panel_trace(panel, f"{COLUMNS.get(column, column)}, difference", (-limit, limit))
    if not trace.texttemplate:  # no room for numbers, so write the sign, which greyscale does not show
        signs = np.where(mean > 0.05 * limit, "+", np.where(mean < -0.05 * limit, "−", ""))
        trace.update(text=signs.tolist(), texttemplate="%{text}")
    return _alone(trace.update(colorscale=colorscale(DIVERGING)), panel)


def score_range(panels: Sequence[NeedlePanel], column: str) -> tuple[float, float]:
    """The ends of the colour scale: 0 and 1, or for log-probabilities the range that occurs in the panels."""
    values = np.concatenate([panel.mean[panel.count > 0] for panel in panels])
    if column != "needle_logprob" or not values.size:
        return 0.0, 1.0
    return float(values.min()), float(values.max())


def panel_trace(
    panel: NeedlePanel, column: str = "recall", limits: tuple[float, float] = (0.0, 1.0)
) -> go.Heatmap:
    """The heatmap of one panel on a colour scale from the lower to the upper limit."""
    few = len(panel.context_tokens) <= _MOST_LABELLED_COLUMNS
    return go.Heatmap(
        z=np.round(panel.mean, 4).tolist(),
        x=panel.length_labels,
        y=[f"{depth:g}" for depth in panel.depth_percent],
        customdata=panel.count.tolist(),
        hovertext=[panel.full_lengths] * len(panel.depth_percent),
        zmin=limits[0],
        zmax=limits[1],
        colorscale=colorscale(SEQUENTIAL),
        showscale=False,
        xgap=2,
        ygap=2,
        hoverongaps=False,
        texttemplate="%{z:.2f}" if few else "",
        hovertemplate=(
            f"{COLUMNS.get(column, column)} <b>%{{z:.3f}}</b><br>%{{hovertext}} context tokens, "
            "depth %{y} %<br>%{customdata} cases<extra></extra>"
        ),
    )


def _alone(trace: go.Heatmap, panel: NeedlePanel) -> go.Figure:
    figure = go.Figure(trace)
    style(figure, height=120 + 30 * len(panel.depth_percent))
    _axes(figure)
    figure.update_xaxes(title_text="context tokens")
    figure.update_yaxes(title_text="depth %")
    figure.update_layout(margin={"t": 6, "b": 40, "l": 48, "r": 6})
    return figure


def _axes(figure: go.Figure) -> None:
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
