"""Screen 2: which heads look at a role, and where one head looks from one token."""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import Dash, Input, Output, State, html

from ctxlens.errors import InputError
from ctxlens.explore import parts
from ctxlens.explore.chat import seen_view
from ctxlens.explore.copying import strongest_head
from ctxlens.explore.lab import Lab
from ctxlens.explore.state import ChatPart, WherePart, read_part
from ctxlens.explore.state import State as Chosen
from ctxlens.models.rows import AttentionRows
from ctxlens.report.plots import role_heatmap

MASS = 0.8


def layout(lab: Lab, state: Chosen) -> html.Section:
    """The screen."""
    where = state.where
    mass = parts.card("Where 80 % of it goes", html.Div(id="mass", className="mass"))
    side = html.Div(
        [
            html.Div(
                parts.choice("where.role", "Role", parts.ROLES, where.role, roles=True),
                className="card tight",
            ),
            parts.figure(
                "map",
                "Share of a role, by layer and head",
                "Click a head to see what it reads.",
                height=420,
            ),
        ],
        className="stack",
    )
    return parts.section(
        "where",
        "Where does it look?",
        "The map shows how much each head looks at one role; the text shows one head at work.",
        html.Div([side, html.Div([_text(lab, where), mass], className="stack")], className="columns even"),
        *parts.slots("row"),
    )


def _text(lab: Lab, where: WherePart) -> html.Div:
    """The tokens, coloured by one head's attention."""
    return html.Div(
        [
            html.Div(
                [
                    html.H3("What this head reads"),
                    html.P("", id="row-facts", className="note", **parts.attributes({"aria-live": "polite"})),
                ],
                className="figure-head",
            ),
            _head(lab, where),
            html.Div(
                [
                    html.Div(
                        className="tokens looking",
                        id="where-tokens",
                        tabIndex="0",
                        role="group",
                        **parts.attributes(
                            {
                                "aria-label": "Tokens, coloured by attention. Left and right choose the query"
                                " token, up and down the layer, with shift the head."
                            }
                        ),
                    ),
                    html.Canvas(
                        id="minimap", className="minimap", **parts.attributes({"aria-hidden": "true"})
                    ),
                ],
                className="reader",
            ),
            html.P(
                [
                    html.Kbd("←"),
                    html.Kbd("→"),
                    " query token  ",
                    html.Kbd("↑"),
                    html.Kbd("↓"),
                    " layer  ",
                    html.Kbd("shift"),
                    html.Kbd("↑"),
                    html.Kbd("↓"),
                    " head. Click a token to look from it.",
                ],
                className="note keys",
            ),
        ],
        className="card",
    )


def _head(lab: Lab, where: WherePart) -> html.Div:
    """Which head, and from which token."""
    return html.Div(
        [
            _number("where.layer", "Layer", where.layer, "best", most=lab.model.n_layers - 1),
            _number("where.head", "Head", where.head, "best", most=lab.model.n_heads - 1),
            _number("where.query", "Query token", where.query, "next"),
            parts.button(
                "Next token", "query-next", label="Make the token that produces the answer the query"
            ),
            parts.flag("where.follow", "Scroll to the attention", where.follow),
        ],
        className="row wrap",
    )


def _number(key: str, label: str, value: int | None, otherwise: str, most: int | None = None) -> Any:
    """A whole number from 0 on; empty means what `otherwise` says."""
    bounds = {} if most is None else {"max": most}
    return parts.entry(
        key, label, value, kind="number", min=0, step=1, placeholder=otherwise, className="short", **bounds
    )


def row_payload(rows: AttentionRows, where: WherePart, query: int) -> dict[str, Any]:
    """What the page needs to colour the tokens: one head's attention from one token."""
    allocation = None
    layer, head = where.layer, where.head
    if layer is None or head is None:
        allocation = rows.allocation(query)
        best = strongest_head(allocation, where.role, seen_view(allocation, where.view))
        layer, head = best if layer is None and head is None else (layer or 0, head or 0)
    weights = rows.row(layer, head, query)
    return {
        "layer": layer,
        "head": head,
        "query": query,
        "isBest": allocation is not None,
        "weights": weights.astype(float).round(5).tolist(),
    }


def check_head(lab: Lab, where: WherePart) -> None:
    """Raise `InputError` if the head does not exist."""
    model = lab.model
    layer, head = where.layer or 0, where.head or 0
    if layer >= model.n_layers or head >= model.n_heads:
        raise InputError(
            f"head {layer}.{head} does not exist: the model has layers 0 to {model.n_layers - 1} with "
            f"heads 0 to {model.n_heads - 1}."
        )


def visible(text: str) -> str:
    """A token with its white space made visible."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·") or "∅"


def register(app: Dash, lab: Lab) -> None:
    """The screen's callbacks; rows of attention are asked for by the page's script (`explore.direct`)."""

    @app.callback(
        Output({"type": "figure", "name": "map"}, "data"),
        Output({"type": "caption", "name": "map"}, "children"),
        Input("looking", "data"),
        State("look-map", "data"),
        State("conversation", "data"),
    )
    def draw_map(looking: Any, look: Any, given: Any) -> Any:
        if not looking or not given or not look:
            return parts.no_update, parts.no_update
        part, where = read_part(ChatPart, given), read_part(WherePart, look)
        query = lab.query(lab.render(part), where.query)
        rows = lab.rows(part, query=query)
        if rows is None:
            return parts.no_update, parts.no_update
        allocation = rows.allocation(query)
        view = seen_view(allocation, where.view)
        made = role_heatmap(allocation, where.role, view=view)
        name = parts.VIEWS[view]
        words = (
            f"Share of {where.role} in the attention of token {query}, {name}. Click a head to see what it "
            "reads."
        )
        if np.isnan(allocation.share(where.role, view=view)).any():
            words += " Empty cells: nearly all attention rests on tokens that this view leaves out."
        return parts.show_figure(made), words


def _frame(lab: Lab, state: Chosen) -> Any:
    query = lab.query(lab.render(state.chat), state.where.query)
    rows = lab.rows(state.chat, query=query)
    if rows is None:
        raise InputError("the conversation has not been read yet.")
    return rows.allocation(query).to_frame()


parts.FRAMES["map"] = _frame

__all__ = ["check_head", "layout", "register", "row_payload", "visible"]
