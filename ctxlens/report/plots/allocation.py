"""Role shares as figures: by layer and head, and by layer and role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int
from plotly.subplots import make_subplots

from ctxlens.chat.roles import Role
from ctxlens.errors import InputError
from ctxlens.report.plots.theme import (
    DIVERGING,
    INK,
    ROLE_PATTERNS,
    ROLE_SHADES,
    SEQUENTIAL,
    colorbar,
    colorscale,
    plain,
    style,
)
from ctxlens.results import Drift, RoleAllocation

MOST_LABELLED_HEADS = 16

NO_SINKS = "raw shares: the view without sinks is not available, sinks were not measured"
"""What a figure says that shows raw shares because sinks were not measured."""


def mean_over_queries(values: Float[np.ndarray, "*axes query"]) -> Float[np.ndarray, "*axes"]:
    """Mean over the last axis without NaN, which marks queries with no attention on the kept roles."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(-1)
    count = known.sum(-1)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def role_heatmap(
    allocation: RoleAllocation,
    role: str | Role = "user",
    *,
    renormalised: bool | None = None,
    view: str | None = None,
    compare: RoleAllocation | None = None,
    mark_heads: Sequence[int] | Int[np.ndarray, " layer"] | None = None,
) -> go.Figure:
    """Draw the share of one role in every layer and head, averaged over the queries.

    Args:
        allocation: what to draw.
        role: the role whose share is shown.
        renormalised: True is the view `renormalised`, False the view `raw`.
        view: a name of `ctxlens.results.VIEWS`. By default `without sinks`, or `raw` where sinks were not
            measured in all allocations, and the figure then says so.
        compare: an allocation to subtract; the figure then shows `allocation - compare`, between −1 and 1.
        mark_heads: one head per layer to frame, for instance `allocation.retrieval_heads()`.

    Raises:
        InputError: the two allocations have different layers or heads, or lack the view.
    """
    label = Role.parse(role).label
    both = [allocation] if compare is None else [allocation, compare]
    seen, remark = choose_view(both, view, renormalised)
    z = mean_over_queries(allocation.share(label, view=seen))
    uniform = float(allocation.in_view(seen).uniform()[:, Role.parse(label)].mean())
    n_layers, n_heads = z.shape
    if compare is not None:
        if (compare.layers, compare.shares.shape[1]) != (allocation.layers, n_heads):
            raise InputError("allocations can be compared only if they have the same layers and heads.")
        z = z - mean_over_queries(compare.share(label, view=seen))
        limit = _ceiling(z)
        scale, low, high, unit = DIVERGING, -limit, limit, "difference"
    else:
        scale, low, high, unit = SEQUENTIAL, 0.0, _ceiling(z), "share"
    figure = go.Figure(
        go.Heatmap(
            z=np.round(z, 4).tolist(),
            x=list(range(n_heads)),
            y=list(allocation.layers),
            zmin=low,
            zmax=high,
            colorscale=colorscale(scale),
            colorbar=colorbar(),
            xgap=2,
            ygap=2,
            texttemplate=cell_text(n_heads, signed=compare is not None),
            hoverongaps=False,
            hovertemplate=hover_text(label, unit, uniform, allocation.shares.shape[2]),
        )
    )
    style(figure, height=heatmap_height(n_layers))
    figure.update_xaxes(title_text="head", showgrid=False, **_whole_ticks(n_heads))
    figure.update_yaxes(
        title_text="layer", showgrid=False, autorange="reversed", **_whole_ticks(n_layers, allocation.layers)
    )
    if mark_heads is not None:
        figure.update_layout(shapes=head_frames(allocation.layers, mark_heads))
    return add_remark(figure, remark)


def choose_view(
    results: Sequence[RoleAllocation | Drift], view: str | None = None, renormalised: bool | None = None
) -> tuple[str, str]:
    """The view in which results are drawn, and a remark for the figure where it is not the one to expect.

    Args:
        results: what is drawn.
        view: a name of `ctxlens.results.VIEWS`; it takes precedence.
        renormalised: the view `renormalised` or `raw`.

    Returns:
        The view: by default `without sinks`, or `raw` with a remark where sinks were not measured.
    """
    if view is not None or renormalised is not None:
        return view or ("renormalised" if renormalised else "raw"), ""
    if all(one.resting is not None for one in results):
        return "without sinks", ""
    return "raw", NO_SINKS


def add_remark(figure: go.Figure, remark: str) -> go.Figure:
    """Put a remark above a figure, if there is one."""
    if remark:
        figure.add_annotation(
            text=remark, xref="paper", yref="paper", x=0, y=1, yshift=22, xanchor="left", showarrow=False,
            font={"size": 12},
        )  # fmt: skip
        figure.update_layout(margin={"t": 48})
    return figure


def hover_text(role: str, unit: str, uniform: float, n_queries: int) -> str:
    """The hover text of a role heatmap, as a plotly template."""
    number = "%{z:+.3f}" if unit == "difference" else "%{z:.3f}"
    baseline = "" if unit == "difference" else f"<br>if attention were uniform: {uniform:.3f}"
    return (
        f"layer %{{y}}, head %{{x}}<br>{unit} of <b>{role}</b>: <b>{number}</b>{baseline}"
        f"<br>mean over {n_queries} {'query' if n_queries == 1 else 'queries'}<extra></extra>"
    )


def cell_text(n_heads: int, *, signed: bool) -> str:
    """The number in each cell as a plotly template; empty where cells are too small for it."""
    if n_heads > MOST_LABELLED_HEADS:
        return ""
    return "%{z:+.2f}" if signed else "%{z:.2f}"


def head_frames(layers: Sequence[int], heads: Sequence[int] | Int[np.ndarray, " layer"]) -> list[dict]:
    """Frames around one head per layer, as plotly shapes."""
    return [
        {"type": "rect", "x0": int(head) - 0.5, "x1": int(head) + 0.5, "y0": layer - 0.5, "y1": layer + 0.5,
         "line": {"color": INK.built, "width": 2}}
        for layer, head in zip(layers, heads, strict=True)
    ]  # fmt: skip


def heatmap_height(n_layers: int) -> int:
    """A height in pixels at which cells are readable."""
    return min(900, max(260, 44 * n_layers + 90))


def role_by_layer(
    allocations: RoleAllocation | Mapping[str, RoleAllocation],
    *,
    renormalised: bool | None = None,
    view: str | None = None,
    difference: bool = False,
) -> go.Figure:
    """Draw how each layer spreads its attention over the roles, averaged over heads and queries.

    Args:
        allocations: one allocation, or several by title to draw side by side (for instance with and
            without template).
        renormalised: as in `role_heatmap`.
        view: as in `role_heatmap`.
        difference: draw one more panel with the last allocation minus the first.

    Raises:
        InputError: a difference of fewer than two allocations, or of allocations with different layers.
    """
    panels = {"": allocations} if isinstance(allocations, RoleAllocation) else dict(allocations)
    seen, remark = choose_view(list(panels.values()), view, renormalised)
    shares = {title: layer_shares(one, view=seen) for title, one in panels.items()}
    layers = {one.layers for one in panels.values()}
    titles = list(shares)
    if difference:
        if len(titles) < 2 or len(layers) > 1:
            raise InputError("a difference needs two allocations with the same layers.")
        shares[f"{titles[-1]} minus {titles[0]}"] = shares[titles[-1]] - shares[titles[0]]
    figure = make_subplots(
        1, len(shares), subplot_titles=[plain(title) for title in shares], horizontal_spacing=0.08
    )
    layer_names = [str(layer) for layer in next(iter(panels.values())).layers]
    named: set[str] = set()
    for column, values in enumerate(shares.values(), start=1):
        for bar in _role_bars(values, layer_names):
            bar.showlegend = bar.name not in named
            named.add(str(bar.name))
            figure.add_trace(bar, row=1, col=column)
    style(figure, height=340)
    figure.update_xaxes(title_text="layer", type="category", showgrid=False)
    figure.update_yaxes(title_text="attention share", col=1)
    for column in range(1, len(shares) + 1 - difference):
        figure.update_yaxes(range=[0, 1.0], col=column)
    if difference:
        figure.update_yaxes(zeroline=True, zerolinecolor=INK.built, col=len(shares))
    figure.update_annotations(font={"size": 13})
    figure.update_layout(legend={"y": -0.22, "yanchor": "top", "traceorder": "normal"}, bargap=0.12,
                         margin={"t": 32 if any(shares) else 12, "b": 24})  # fmt: skip
    return add_remark(figure, remark)


def layer_panel(
    values: Float[np.ndarray, "layer role"],
    layers: Sequence[int],
    *,
    difference: bool = False,
    legend: Sequence[str] = (),
) -> go.Figure:
    """Draw one panel of `role_by_layer`, for a page that arranges the panels itself.

    Args:
        values: shares as `layer_shares` returns them, or a difference of two of them.
        layers: the model's layer numbers.
        difference: whether the values are a difference.
        legend: roles that the legend names even if they have no share.
    """
    figure = go.Figure(_role_bars(values, [str(layer) for layer in layers], legend))
    style(figure, height=330)
    figure.update_xaxes(title_text="layer", type="category", showgrid=False)
    figure.update_yaxes(title_text="change of share" if difference else "attention share")
    if difference:
        figure.update_yaxes(zeroline=True, zerolinecolor=INK.built)
    else:
        figure.update_yaxes(range=[0, 1.0])
    figure.update_layout(showlegend=True, bargap=0.12, margin={"t": 8, "b": 24},
                         legend={"y": -0.24, "yanchor": "top", "traceorder": "normal"})  # fmt: skip
    return figure


def layer_shares(
    allocation: RoleAllocation, *, renormalised: bool = False, view: str | None = None
) -> Float[np.ndarray, "layer role"]:
    """Role shares by layer, averaged over heads and queries, in a view of `ctxlens.results.VIEWS`."""
    source = allocation.in_view(view or ("renormalised" if renormalised else "raw"))
    flat = np.moveaxis(source.shares, 3, 1).reshape(len(source.layers), len(source.roles), -1)
    return mean_over_queries(flat)


def shown_roles(allocations: Sequence[RoleAllocation]) -> list[str]:
    """The roles that have any token or attention, in the order of their numbers."""
    here = np.zeros(len(RoleAllocation.roles), dtype=bool)
    for one in allocations:
        here |= (one.key_counts > 0).any(0) | (np.nan_to_num(one.shares) > 1e-6).any((0, 1, 2))
    return [label for label, there in zip(RoleAllocation.roles, here, strict=True) if there]


def _role_bars(values: np.ndarray, layers: list[str], always: Sequence[str] = ()) -> list[go.Bar]:
    order = ("user", "assistant", "template", "indicator", "system", "tool", "bos", "sink", "pad")
    bars = []
    for role in order:
        column = values[:, Role.parse(role)]
        if role not in always and not (np.nan_to_num(np.abs(column)) > 1e-6).any():
            continue
        bars.append(
            go.Bar(
                name=role,
                x=layers,
                y=np.round(column, 4).tolist(),
                marker={"color": ROLE_SHADES[role].built, "line": {"width": 0},
                        "pattern": {"shape": ROLE_PATTERNS[role], "size": 6, "solidity": 0.2,
                                    "fillmode": "overlay", "fgopacity": 0.55}},
                legendgroup=role,
                hovertemplate=f"layer %{{x}}<br><b>{role}</b>: %{{y:.3f}}<extra></extra>",
            )
        )  # fmt: skip
    return bars


def _ceiling(z: np.ndarray) -> float:
    largest = float(np.nanmax(np.abs(z))) if np.isfinite(z).any() else 0.0
    return max(0.05, float(np.ceil(largest * 20) / 20))


def _whole_ticks(n: int, values: Sequence[int] | None = None) -> dict:
    values = list(range(n)) if values is None else list(values)
    step = max(1, -(-n // 16))
    return {"tickvals": values[::step], "ticktext": [str(v) for v in values[::step]]}
