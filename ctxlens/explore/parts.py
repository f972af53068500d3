"""What screens are made of: labelled controls, figures that can be saved, and results that are waited for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from dash import Input, Output, State, dcc, html, no_update

from ctxlens.explore.lab import Lab, Task

ROLES = ("user", "assistant", "system", "tool", "template", "indicator", "bos", "sink")
"""The roles in the order in which the page offers them."""

VIEWS = {"raw": "raw", "renormalised": "as in the paper", "without sinks": "without sinks"}
"""The views of role shares, and their names on the page."""


def templates(lent: str | None) -> dict[str, str]:
    """The ways to render a conversation, by name; `lent` stands in for a template of the model's own."""
    own = "the model's own" if lent is None else f"{_TITLES.get(lent, lent)} (the model has none)"
    return {"model": own, "none": "none", "own": "another"}


_TITLES = {"chatml": "ChatML"}


def attributes(given: Mapping[str, str]) -> dict[str, Any]:
    """Attributes such as `aria-label`, which are no Python names, as keyword arguments of a component."""
    return dict(given)


def control_id(key: str) -> dict[str, str]:
    """The id of a control; its key is the path of the setting in `State`.

    Everything with such an id and a property `value` is part of the state: of the link, of undo, and of what
    is copied. A key that ends with `?` belongs to a checkbox.
    """
    return {"type": "control", "key": key}


def section(name: str, title: str, sentence: str, *children: Any) -> html.Section:
    """One screen, with one sentence that says what one sees."""
    head = html.Header([html.H2(title, id=f"title-{name}"), html.P(sentence, className="lead")])
    return html.Section(
        [head, *children],
        id={"type": "screen", "key": name},
        className=f"screen screen-{name}",
        hidden=name != "chat",
        **attributes({"aria-labelledby": f"title-{name}"}),
    )


def card(title: str, *children: Any, note: str = "", className: str = "") -> html.Div:
    """A titled box; `note` is one line below the title."""
    head = [html.H3(title)] + ([html.P(note, className="note")] if note else [])
    return html.Div([*head, *children], className=f"card {className}")


def choice(
    key: str, label: str, options: Mapping[str, str] | Sequence[str], value: str, *, roles: bool = False
) -> html.Fieldset:
    """A few choices of which one holds; with `roles`, in the colours of the roles."""
    named = options if isinstance(options, Mapping) else {name: name for name in options}
    shown: list[Any] = [{"label": text, "value": name} for name, text in named.items()]
    kind = "segments roles" if roles else "segments"
    items = dcc.RadioItems(shown, value, id=control_id(key), className=kind, labelClassName="segment")
    return html.Fieldset([html.Legend(label), items])


def flag(key: str, label: str, value: bool = False) -> dcc.Checklist:
    """A checkbox."""
    return dcc.Checklist(
        [{"label": label, "value": "on"}], ["on"] if value else [], id=control_id(f"{key}?"), className="flag"
    )


def entry(
    key: str, label: str, value: Any = None, *, kind: Any = "text", className: str = "", **options: Any
) -> html.Label:
    """A field of one line: a text or a number, which is taken over a moment after the last key."""
    given = {"debounce": 0.25, **options}
    field = dcc.Input(id=control_id(key), type=kind, value=value, **given)
    return html.Label([html.Span(label), field], className=f"entry {className}")


def area(key: str, label: str, value: str = "", *, rows: int = 4, placeholder: str = "") -> html.Label:
    """A field of several lines."""
    field = dcc.Textarea(
        id=control_id(key), value=value, rows=rows, placeholder=placeholder, spellCheck=False
    )
    return html.Label([html.Span(label), field], className="entry area")


def slider(
    key: str, label: str, low: float | int, high: float | int, step: float | int, value: float | int
) -> html.Fieldset:
    """A slider that reports where it was let go."""
    bar = dcc.Slider(
        low,
        high,
        step,
        value=value,
        id=control_id(key),
        marks=None,
        updatemode="mouseup",
        tooltip={"placement": "bottom", "always_visible": False},
    )
    return html.Fieldset([html.Legend(label), bar], className="slider")


def button(text: str, ident: Any, *, label: str = "", className: str = "") -> html.Button:
    """A button; `label` is what screen readers say where the text alone does not suffice."""
    return html.Button(
        text,
        id=ident,
        type="button",
        className=className,
        n_clicks=0,
        **attributes({"aria-label": label} if label else {}),
    )


def figure(name: str, title: str, sentence: str = "", *, height: int = 320) -> html.Figure:
    """A figure of `report/plots` that is coloured for the page and can be saved.

    A callback writes what `show_figure` returns into the store `{"type": "figure", "name": name}`. The frame
    for the CSV file is registered in `FRAMES`.
    """
    saves = [
        html.Button(
            kind.upper(),
            id={"type": f"save-{kind}", "name": name},
            type="button",
            n_clicks=0,
            className="quiet-button",
            **attributes({"aria-label": f"save {title} as {kind.upper()}"}),
        )
        for kind in ("svg", "png", "csv")
    ]
    return html.Figure(
        [
            html.Div([html.H3(title), html.Div(saves, className="saves")], className="figure-head"),
            dcc.Store(id={"type": "figure", "name": name}),
            dcc.Download(id={"type": "download", "name": name}),
            dcc.Graph(
                id={"type": "graph", "name": name},
                figure=go.Figure(layout={"height": height}),
                config={"displayModeBar": False, "responsive": True},
                style={"height": f"{height}px"},
            ),
            html.Figcaption(sentence, id={"type": "caption", "name": name}),
        ],
        className="figure card empty",
        id={"type": "figure-card", "name": name},
    )


def show_figure(made: go.Figure) -> dict[str, Any]:
    """A figure for the store of `figure`."""
    return json.loads(made.to_json() or "{}")


FRAMES: dict[str, Callable[[Lab, Any], Any]] = {}
"""By name of a figure: a function of the lab and the state that returns the table of its CSV file."""


def slots(*names: str) -> list[dcc.Store]:
    """What is computed for each purpose: what is wanted, what has arrived, what there is so far."""
    return [
        dcc.Store(id={"type": kind, "slot": name})
        for name in names
        for kind in ("wanted", "arrived", "partial")
    ]


def wanted(name: str) -> Output:
    """Where a callback writes what `want` returns."""
    return Output({"type": "wanted", "slot": name}, "data")


def arrived(name: str) -> Input:
    """Calls a callback when the result that is wanted is in the cache (or has failed)."""
    return Input({"type": "arrived", "slot": name}, "data")


def partial(name: str) -> Input:
    """Calls a callback when there is more to show of a result."""
    return Input(partial_id(name), "data")


def partial_id(name: str) -> dict[str, str]:
    """The store with what there is so far of a result."""
    return {"type": "partial", "slot": name}


PAGE = State("page", "data")
"""The random name of the page that asks."""


def want(lab: Lab, task: Task, *, page: str | None, name: str) -> dict[str, str]:
    """Ask for a result, for a slot's `wanted`."""
    lab.submit(task, page=page or "?", slot=name)
    return {"which": task.which, "key": task.key}


def percent(share: float) -> str:
    """A share with one decimal; a very small one is not shown as nothing."""
    return "< 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def has_arrived(data: Any) -> bool:
    """Whether what `arrived` gave says that the result is there."""
    return bool(data) and data.get("state") == "done"


__all__ = [
    "FRAMES",
    "PAGE",
    "ROLES",
    "VIEWS",
    "area",
    "arrived",
    "attributes",
    "button",
    "card",
    "choice",
    "control_id",
    "entry",
    "figure",
    "flag",
    "has_arrived",
    "no_update",
    "partial",
    "partial_id",
    "percent",
    "section",
    "show_figure",
    "slider",
    "slots",
    "want",
    "wanted",
]
