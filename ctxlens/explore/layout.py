"""The page: its header, its screens, and the callbacks that all of them share."""

from __future__ import annotations

from typing import Any

from dash import ALL, MATCH, ClientsideFunction, Dash, Input, Output, State, dcc, html

from ctxlens.chat.roles import ROLE_LABELS
from ctxlens.errors import InputError
from ctxlens.evals.needle.chats import neutral_chats
from ctxlens.explore import chat, compare, data, needle, parts, steer, where
from ctxlens.explore.copying import as_command, as_python
from ctxlens.explore.hiding import first_needle
from ctxlens.explore.lab import Lab
from ctxlens.explore.state import State as Chosen
from ctxlens.report.plots.theme import ROLE_SHADES, colour_schemes

SCREENS = {
    "chat": ("Chat", chat),
    "where": ("Where does it look?", where),
    "steer": ("Turn the knob", steer),
    "compare": ("A or B", compare),
    "needle": ("Hide a needle", needle),
    "data": ("Data", data),
}
"""The screens in their order: name, and the module with `layout` and `register`."""


def first_state(lab: Lab) -> Chosen:
    """What a person sees who opens the page without a link: an example that suits the model."""
    name = lab.model.name
    chat: dict[str, Any] = {"messages": example(name)}
    if lab.lent_template is None:
        return Chosen.read({"chat": chat, "needle": first_needle(name)})
    # A model that knows no template is first asked as it was trained, and compared with the lent one.
    chat["template"] = "none"
    return Chosen.read({"chat": chat, "compare": {"template": "model"}, "needle": first_needle(name)})


def example(model: str) -> list[dict[str, str]]:
    """A conversation in which the answer stands in a text that the user has pasted."""
    if model.startswith("organism"):
        import json

        from ctxlens.evals.starter import starter_files

        found = json.loads(starter_files()["chat.json"])
    else:
        found = neutral_chats()[2]
    messages = [{"role": one["role"], "content": one["content"]} for one in found]
    while messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def build_page(lab: Lab) -> html.Div:
    """The whole page for a person who has just opened it."""
    state = first_state(lab)
    screens = [module.layout(lab, state) for _, module in SCREENS.values()]
    return html.Div(
        [
            html.A("Skip to the content", href="#main", className="skip"),
            _header(lab, state),
            html.Div(id="notice", className="notice page-notice", role="alert"),
            _activity(),
            html.Main(screens, id="main"),
            _copying(),
            *_stores(state),
        ],
        id="page-root",
    )


def _header(lab: Lab, state: Chosen) -> html.Header:
    model = lab.model
    facts = f"{model.n_layers} × {model.n_heads} heads · {model.backend.name} · {model.device}"
    names = {name: title for name, (title, _) in SCREENS.items()}
    tools = [
        parts.button("Undo", "undo", label="Undo (control Z)", className="quiet-button"),
        parts.button("Redo", "redo", label="Redo (control shift Z)", className="quiet-button"),
        parts.button("Copy link", "copy-link", className="quiet-button"),
        parts.button("Python", "copy-python", label="Copy as Python", className="quiet-button"),
        parts.button("Command", "copy-command", label="Copy as command", className="quiet-button"),
        parts.button("◐", "theme", label="Switch between light and dark", className="quiet-button"),
    ]
    return html.Header(
        [
            html.Div(
                [
                    html.H1("ctxlens", className="brand"),
                    html.Span(
                        [html.B(model.name.rstrip("/").rsplit("/", 1)[-1]), f" {facts}"], className="model"
                    ),
                    html.Div(tools, className="tools"),
                ],
                className="topbar",
            ),
            html.Nav(
                dcc.RadioItems(
                    [{"label": title, "value": name} for name, title in names.items()],
                    state.screen,
                    id=parts.control_id("screen"),
                    className="tabs",
                    labelClassName="screen-tab",
                ),
                **parts.attributes({"aria-label": "Screens"}),
            ),
        ],
        className="top",
    )


def _activity() -> html.Div:
    return html.Div(
        [
            html.Span("", id="activity-words", role="status"),
            html.Progress(id="activity-bar", max="1", **parts.attributes({"aria-label": "progress"})),
            parts.button("Stop", "stop", className="quiet-button"),
        ],
        id="activity",
        className="activity",
        hidden=True,
    )


def _copying() -> html.Dialog:
    return html.Dialog(
        [
            html.Div(
                [
                    html.H2("Copied", id="copy-title"),
                    html.Form(html.Button("Close", className="quiet-button"), method="dialog"),
                ],
                className="figure-head",
            ),
            html.P("", id="copy-note", className="note"),
            html.Pre(
                html.Code(id="copied-code"), tabIndex="0", **parts.attributes({"aria-label": "copied text"})
            ),
        ],
        id="copy-dialog",
        **parts.attributes({"aria-labelledby": "copy-title"}),
    )


def _stores(state: Chosen) -> list[Any]:
    first = state.model_dump(mode="json")
    shades = {name: [shade.light, shade.dark] for name, shade in ROLE_SHADES.items()}
    kept = {
        "first": first,
        "defaults": Chosen().model_dump(mode="json"),
        "state": None,
        "restored": None,
        "conversation": None,
        "view": None,
        "look-map": None,
        "look-row": None,
        "looking": None,
        "chosen": None,
        "tokens": None,
        "loaded": None,
        "page": None,
        "scheme": None,
        "copied": None,
        "nowhere": None,
        "steering": None,
        "comparing": None,
        "hiding": None,
        "scoring": None,
        "schemes": {built: list(pair) for built, pair in colour_schemes().items()},
        "shades": shades,
        "roles": list(ROLE_LABELS),
    }
    return [dcc.Store(id=name, data=value) for name, value in kept.items()]


def _js(name: str) -> ClientsideFunction:
    return ClientsideFunction("explore", name)


def register(app: Dash, lab: Lab) -> None:
    """All callbacks."""
    _register_state(app)
    _register_work(app, lab)
    _register_figures(app, lab)
    _register_copying(app, lab)
    for _, module in SCREENS.values():
        module.register(app, lab)
    app.clientside_callback(
        _js("showTokens"),
        Output("looking", "data"),
        Input("tokens", "data"),
        Input(parts.control_id("screen"), "value"),
        parts.arrived("reading"),
        parts.arrived("row"),
        Input("look-map", "data"),
        Input("look-row", "data"),
        State({"type": "wanted", "slot": "reading"}, "data"),
        State("looking", "data"),
        parts.PAGE,
    )
    app.clientside_callback(
        _js("clickMap"),
        Output("nowhere", "data", allow_duplicate=True),
        Input({"type": "graph", "name": "map"}, "clickData"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        _js("nextToken"),
        Output("nowhere", "data", allow_duplicate=True),
        Input("query-next", "n_clicks"),
        prevent_initial_call=True,
    )


def _register_state(app: Dash) -> None:
    """Controls make the state; undo, links and loaded messages set the controls."""
    app.clientside_callback(
        _js("collect"),
        Output("state", "data"),
        Output("page", "data"),
        Input({"type": "control", "key": ALL}, "value"),
        State("first", "data"),
        State("page", "data"),
    )
    app.clientside_callback(
        _js("derive"),
        Output("conversation", "data"),
        Output("view", "data"),
        Output("look-map", "data"),
        Output("look-row", "data"),
        Output("steering", "data"),
        Output("comparing", "data"),
        Output("hiding", "data"),
        Output("scoring", "data"),
        Input("state", "data"),
        State("conversation", "data"),
        State("view", "data"),
        State("look-map", "data"),
        State("look-row", "data"),
        State("steering", "data"),
        State("comparing", "data"),
        State("hiding", "data"),
        State("scoring", "data"),
    )
    _register_changes(app)


def _register_changes(app: Dash) -> None:
    """Undo, links, loaded messages, and what follows from the state on the page itself."""
    app.clientside_callback(
        _js("change"),
        Output("restored", "data"),
        Input("undo", "n_clicks"),
        Input("redo", "n_clicks"),
        Input("add-message", "n_clicks"),
        Input({"type": "drop-message", "i": ALL}, "n_clicks"),
        Input("loaded", "data"),
        State("state", "data"),
        State("first", "data"),
        State("defaults", "data"),
    )
    app.clientside_callback(
        _js("restore"),
        Output({"type": "control", "key": ALL}, "value"),
        Input("restored", "data"),
        Input("chosen", "data"),
        State({"type": "control", "key": ALL}, "value"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        _js("theme"),
        Output("scheme", "data"),
        Input("theme", "n_clicks"),
        State("scheme", "data"),
        State("shades", "data"),
    )


def _register_work(app: Dash, lab: Lab) -> None:
    """The script looks for what is wanted until it has arrived (`explore.direct`)."""
    wanted, arrived = ({"type": kind, "slot": ALL} for kind in ("wanted", "arrived"))
    _register_stopping(app, lab)
    app.clientside_callback(
        _js("watch"),
        Output("nowhere", "data", allow_duplicate=True),
        Input(wanted, "data"),
        Input(arrived, "data"),
        prevent_initial_call=True,
    )


def _register_stopping(app: Dash, lab: Lab) -> None:
    @app.callback(
        Output("notice", "children", allow_duplicate=True),
        Input("stop", "n_clicks"),
        parts.PAGE,
        prevent_initial_call=True,
    )
    def stop(clicks: Any, page: Any) -> Any:
        if clicks:
            lab.stop(page)
        return "Stopped. Change something to go on."


def _register_figures(app: Dash, lab: Lab) -> None:
    """Colours by scheme, and files to save."""
    app.clientside_callback(
        _js("colour"),
        Output({"type": "graph", "name": MATCH}, "figure"),
        Output({"type": "figure-card", "name": MATCH}, "className"),
        Input({"type": "figure", "name": MATCH}, "data"),
        Input("scheme", "data"),
        State("schemes", "data"),
    )
    app.clientside_callback(
        _js("save"),
        Output({"type": "graph", "name": MATCH}, "id"),
        Input({"type": "save-svg", "name": MATCH}, "n_clicks"),
        Input({"type": "save-png", "name": MATCH}, "n_clicks"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output({"type": "download", "name": MATCH}, "data"),
        Input({"type": "save-csv", "name": MATCH}, "n_clicks"),
        State("state", "data"),
        State({"type": "download", "name": MATCH}, "id"),
        prevent_initial_call=True,
    )
    def save(clicks: Any, given: Any, ident: Any) -> Any:
        if not clicks:
            return parts.no_update
        return dcc.send_string(csv_of(lab, ident["name"], Chosen.read(given)), f"ctxlens-{ident['name']}.csv")


def csv_of(lab: Lab, name: str, state: Chosen) -> str:
    """The table of a figure as CSV.

    Raises:
        InputError: there is no such figure, or it has not been computed yet.
    """
    if name not in parts.FRAMES:
        raise InputError(f"there is no table for {name[:40]!r}.")
    return parts.FRAMES[name](lab, state).to_csv(index=False)


def _register_copying(app: Dash, lab: Lab) -> None:
    @app.callback(
        Output("copied", "data"),
        Input("copy-python", "n_clicks"),
        Input("copy-command", "n_clicks"),
        State("state", "data"),
        prevent_initial_call=True,
    )
    def copy(python: Any, command: Any, given: Any) -> Any:
        from dash import ctx

        state = Chosen.read(given)
        if ctx.triggered_id == "copy-python":
            return {"title": "Copied as Python", "text": as_python(lab, state)}
        return {"title": "Copied as command", "text": as_command(lab, state)}

    app.clientside_callback(
        _js("copy"),
        Output("copied-code", "children"),
        Output("copy-title", "children"),
        Output("copy-note", "children"),
        Input("copied", "data"),
        Input("copy-link", "n_clicks"),
        State("state", "data"),
        State("defaults", "data"),
        prevent_initial_call=True,
    )


__all__ = ["SCREENS", "build_page", "csv_of", "example", "first_state", "register"]
