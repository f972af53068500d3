"""One figure for every kind of result, and the forms in which it is shown: page, picture, notebook, browser.

`draw` is a registry by class: `draw.register` adds the figure of a further class. The results themselves
(`ctxlens.results.shown`) call this module when a figure is asked for.
"""

from __future__ import annotations

import tempfile
import webbrowser
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup, escape

from ctxlens.errors import InputError, first_line, missing_package
from ctxlens.report.plots.allocation import role_by_layer, role_heatmap
from ctxlens.report.plots.checkpoints import checkpoint_curves
from ctxlens.report.plots.drift import drift_by_layer, drift_map
from ctxlens.report.plots.heads import head_curves, head_map
from ctxlens.report.plots.html import HtmlView
from ctxlens.report.plots.intervals import interval_rows
from ctxlens.report.plots.needle import needle_heatmap
from ctxlens.report.plots.ratings import rating_means
from ctxlens.report.plots.scores import score_histogram, selection_histogram
from ctxlens.report.plots.steering import steering_curves
from ctxlens.report.plots.theme import INK, SEQUENTIAL, colorbar, colorscale, plain, style
from ctxlens.report.plots.tokens import token_view
from ctxlens.results import (
    Ability,
    Drift,
    Evaluation,
    HeadCurves,
    HeadMap,
    NeedleGrid,
    Ratings,
    RoleAllocation,
    Scores,
    Selection,
    TokenView,
    Verdicts,
)
from ctxlens.results.checkpoints import Checkpoints
from ctxlens.stats import bootstrap_mean

_WIDTH, _SCALE = 900, 2
_MOST_TOKENS = 80
_CONFIG = {"responsive": True, "displaylogo": False}
_PAGE_CSS = "h1{font-size:1.05rem;font-weight:600;overflow-wrap:anywhere}"


@singledispatch
def draw(result: Any, **options: Any) -> go.Figure | HtmlView:
    """Draw a result with the figure of its class.

    | class | figure | options |
    |---|---|---|
    | `NeedleGrid` | recall by length and depth; for several α recall by α | `column`, `columns` |
    | `Ability` | recall by model | |
    | `Scores`, `Selection` | distribution of scores | `layer`, `reduction`, `bins`; `bins` |
    | `Evaluation` | means of metrics by model and condition | `metrics` |
    | `RoleAllocation` | roles by layer; with `role` that role by layer and head | `role`, `view`, `compare` |
    | `TokenView` | tokens, coloured by attention (HTML) | `layer`, `head`, `query` |
    | `Drift` | a role by layer; with `heads=True` the change by layer and head | `role`, `view`, `heads` |
    | `HeadMap`, `HeadCurves` | a number by layer and head; effect by number of heads | |
    | `Ratings` | mean ratings by model | `by` |
    | `Checkpoints`, `Audits` | recall, loss and bias by training step | |
    | `Verdicts`, `Audit` | measured quantities with intervals | |

    Raises:
        InputError: there is nothing to draw, or no figure for this class.
    """
    raise InputError(f"there is no figure for a {type(result).__name__}; use its to_frame().")


@draw.register
def _(result: NeedleGrid, **options: Any) -> go.Figure:
    if len(result) and result.frame["alpha"].nunique() > 1:
        return steering_curves(result)
    scores = result.scores
    if scores and "recall" not in scores:
        options = {"column": scores[0], **options}
    return needle_heatmap(result, **options)


@draw.register
def _(result: Ability) -> go.Figure:
    _refuse_empty(result)
    names = [name for name in ("model", "indicator", "alpha", "heads") if name in result.frame]
    groups = list(result.frame.groupby(names, sort=False, dropna=False))
    labels = [_ability_label(dict(zip(names, key, strict=True))) for key, _ in groups]
    figure = interval_rows(labels, {"recall": [bootstrap_mean(rows["recall"]) for _, rows in groups]})
    return figure.update_xaxes(title_text="recall without context", range=[-0.04, 1.04])


@draw.register
def _(result: Scores, **options: Any) -> go.Figure:
    return score_histogram(result, **options)


@draw.register
def _(result: Selection, **options: Any) -> go.Figure:
    _refuse_empty(result)
    return selection_histogram(result, **options)


@draw.register
def _(result: Evaluation, metrics: list[str] | None = None) -> go.Figure:
    _refuse_empty(result)
    rows = [row for row in result.rows() if metrics is None or row[1] in metrics]
    if not rows:
        raise InputError(f"the evaluation has none of the metrics {', '.join(metrics or ())}.")
    lines = list(dict.fromkeys((task, metric) for task, metric, _ in rows))
    series: dict[str, list[Any]] = {}
    for variant in dict.fromkeys(variant for *_, variant in rows):
        series[", ".join(variant)] = [result.mean(task, metric, variant) for task, metric in lines]
    return interval_rows([f"{task}: {metric}" for task, metric in lines], series, digits=3)


@draw.register
def _(result: RoleAllocation, role: str | None = None, **options: Any) -> go.Figure:
    return role_by_layer(result, **options) if role is None else role_heatmap(result, role, **options)


@draw.register
def _(result: TokenView, **options: Any) -> HtmlView:
    return token_view(result, **options)


@draw.register
def _(result: Drift, role: str = "user", view: str | None = None, heads: bool = False) -> go.Figure:
    return drift_map(result, role, view) if heads else drift_by_layer(result, role, view)


@draw.register
def _(result: HeadMap) -> go.Figure:
    return head_map(result)


@draw.register
def _(result: HeadCurves) -> go.Figure:
    _refuse_empty(result)
    return head_curves(result)


@draw.register
def _(result: Ratings, by: Any = "turn") -> go.Figure:
    _refuse_empty(result)
    return rating_means(result, by)


@draw.register
def _(result: Checkpoints) -> go.Figure:
    _refuse_empty(result)
    return checkpoint_curves(result)


@draw.register
def _(result: Verdicts) -> go.Figure:
    if not result.verdicts:
        raise InputError("there are no verdicts to draw.")
    figure = interval_rows(
        [one.sentence for one in result.verdicts],
        {"measured": [one.figure for one in result.verdicts]},
        ticks=[plain(f"{one.claim}: {one.word}") for one in result.verdicts],
    )
    figure.update_layout(showlegend=False)
    figure.add_vline(x=0, line={"width": 1, "dash": "dot"})
    return figure.update_xaxes(title_text="measured quantity, 95 % interval")


def page(result: Any, **options: Any) -> str:
    """The figure as a complete HTML page that needs no network; all text from data is escaped."""
    drawn = result.figure(**options)
    heading = Markup("<h1>{}</h1>").format(repr(result))
    if isinstance(drawn, HtmlView):
        return HtmlView(str(heading + Markup(drawn.body)), drawn.css + _PAGE_CSS, repr(result)).page()
    drawn = go.Figure(drawn).update_layout(modebar={"bgcolor": "rgba(0,0,0,0)", "color": INK.built})
    body = drawn.to_html(full_html=False, include_plotlyjs=True, config=_CONFIG)
    return HtmlView(str(heading) + body, _PAGE_CSS, repr(result)).page()


def picture(result: Any, **options: Any) -> bytes:
    """The figure as PNG on white, 1,800 pixels wide.

    A `TokenView`, whose figure is HTML, is drawn as attention by layer and token.

    Raises:
        InputError: kaleido or the browser that it needs is not installed, or the browser fails.
    """
    drawn = _token_map(result, **options) if isinstance(result, TokenView) else result.figure(**options)
    drawn = go.Figure(drawn).update_layout(paper_bgcolor="white", plot_bgcolor="white")
    try:
        import kaleido  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise missing_package("a PNG", "kaleido", ", or save the figure as .html") from None
    try:
        return drawn.to_image("png", width=_WIDTH, height=drawn.layout["height"] or 450, scale=_SCALE)
    except Exception as error:  # kaleido and its browser raise errors of many kinds
        raise InputError(
            "a PNG needs Chrome or Chromium, which kaleido cannot find or run "
            f"({type(error).__name__}: {first_line(error)}); install Chromium or run plotly_get_chrome, or "
            "save the figure as .html."
        ) from error


def notebook(result: Any, **options: Any) -> str:
    """The figure as HTML for the output of a notebook's cell.

    Plotly's script is loaded from the network once per page; where there is nothing to draw, the result's
    line is shown.
    """
    try:
        drawn = result.figure(**options)
    except InputError as error:
        return f"<p>{escape(repr(result))}<br>{escape(error)}</p>"
    if isinstance(drawn, HtmlView):
        return drawn._repr_html_()
    return drawn.to_html(full_html=False, include_plotlyjs="cdn")


def show(result: Any, *, in_notebook: bool, **options: Any) -> None:
    """Show the figure in the notebook's cell, or open its page in a browser."""
    if in_notebook:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        display(result.figure(**options))
        return
    file = Path(tempfile.mkdtemp(prefix="ctxlens-")) / f"{type(result).__name__}.html"
    file.write_text(page(result, **options), encoding="utf-8")
    webbrowser.open(file.as_uri())


def _token_map(result: TokenView, query: int = -1) -> go.Figure:
    """Attention of one query to every token, by layer, averaged over heads."""
    values = result.pattern[:, :, query].mean(axis=1)
    figure = go.Figure(
        go.Heatmap(
            z=np.sqrt(values).round(4).tolist(),
            x=list(range(len(result.tokens))),
            y=[str(layer) for layer in result.layers],
            colorscale=colorscale(SEQUENTIAL),
            colorbar=colorbar("√ attention"),
            zmin=0.0,
        )
    )
    style(figure, height=max(260, 22 * len(result.layers) + 160))
    figure.update_yaxes(title_text="layer", type="category", autorange="reversed", showgrid=False)
    figure.update_xaxes(title_text="token", showgrid=False)
    if len(result.tokens) <= _MOST_TOKENS:  # more names would overlap
        figure.update_xaxes(
            tickvals=list(range(len(result.tokens))), ticktext=[plain(text) for text in result.tokens],
            tickangle=90, tickfont={"size": 9},
        )  # fmt: skip
    return figure


def _ability_label(key: dict[str, Any]) -> str:
    parts = [str(key["model"])] + ["with indicator"] * bool(key.get("indicator"))
    alpha = key.get("alpha", 1.0)
    if alpha != alpha or alpha == 1.0:
        return ", ".join(parts)
    return ", ".join([*parts, f"α = {alpha:g}", *([f"{key['heads']} heads"] if "heads" in key else [])])


def _refuse_empty(result: Any) -> None:
    if not len(result):
        raise InputError(f"the {type(result).__name__} has no rows to draw.")


__all__ = ["draw", "notebook", "page", "picture", "show"]
