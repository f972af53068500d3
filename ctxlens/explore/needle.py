"""Screen 5: a sentence is dragged through a document, and a map fills with what the model finds."""

from __future__ import annotations

import math
import re
from typing import Any

import dash
from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html

from ctxlens.explore import hiding, parts
from ctxlens.explore.lab import Lab
from ctxlens.explore.state import NeedlePart, read_part
from ctxlens.explore.state import State as Chosen
from ctxlens.report.blocks import number
from ctxlens.report.plots.needle import COLUMNS, needle_panels

_AROUND = 20_000
"""The most characters of the document that are shown on each side of the sentence."""


def layout(lab: Lab, state: Chosen) -> html.Section:
    """The screen."""
    part = state.needle
    return parts.section(
        "needle",
        "Hide a needle",
        "Drag a sentence through a document, and see at which places the model finds it, with its chat "
        "template and without.",
        html.Div(
            [
                html.Div([_sentence(part), _document(lab, part)], className="stack side"),
                html.Div([_place(part), _answers(), _map(part)], className="stack"),
            ],
            className="columns",
        ),
        *parts.slots("needle-place", "needle-map"),
    )


def _sentence(part: NeedlePart) -> html.Div:
    return parts.card(
        "The sentence",
        parts.area("needle.sentence", "Sentence that is hidden", part.sentence, rows=2),
        parts.entry("needle.question", "Question that it answers", part.question, debounce=0.6),
        parts.entry("needle.keywords", "Keywords of the answer, with commas", part.keywords, debounce=0.6),
        parts.flag("needle.prefix", "The answer begins with the sentence's first words", part.prefix),
        className="side",
    )


def _document(lab: Lab, part: NeedlePart) -> html.Div:
    own = html.Div(
        parts.area("needle.document", "Text of your own", part.document, rows=6), id="document-box"
    )
    numbers = html.Div(
        [
            parts.entry(
                "needle.length", "Length, tokens", part.length, kind="number", className="short",
                min=16, step=1, debounce=0.6,
            ),
            parts.entry(
                "needle.more", "Further lengths for the map", part.more, placeholder="100, 1000", debounce=0.6
            ),
            parts.entry(
                "needle.answer_tokens", "Answer, tokens", part.answer_tokens, kind="number",
                className="short", min=1, max=200, step=1, debounce=0.6,
            ),
        ],
        className="row wrap numbers",
    )  # fmt: skip
    mark = []
    if lab.model.indicator:
        mark.append(
            parts.flag("needle.indicator", f"The question marked with {lab.model.indicator}", part.indicator)
        )
    names = {"shipped": "the shipped one", "own": "your own"}
    choice = parts.choice("needle.source", "Text around it", names, part.source)
    return parts.card("The document", choice, own, numbers, *mark, className="side")


def _place(part: NeedlePart) -> html.Div:
    """The bar, the slider and the text."""
    thumb = html.Span(id="needle-thumb", style={"left": f"{part.depth:g}%"})
    slider = dcc.Slider(
        0, 100, 10,
        value=part.depth, id=parts.control_id("needle.depth"), updatemode="drag",
        marks={0: "start", 50: "middle", 100: "end"},
        tooltip={"placement": "bottom", "always_visible": False},
    )  # fmt: skip
    return parts.card(
        "Where it is",
        html.Div(thumb, id="needle-bar", className="needle-bar", **parts.attributes({"aria-hidden": "true"})),
        html.Fieldset([html.Legend("Depth in the document, percent"), slider], className="slider depth"),
        html.Div(
            id="needle-text",
            className="needle-text",
            tabIndex="0",
            role="group",
            **parts.attributes({"aria-label": "document"}),
        ),
        html.P("", id="needle-facts", className="note"),
    )


def _answers() -> html.Div:
    return parts.card(
        "What the model answers here",
        html.Div(
            html.Span("Not computed yet.", className="empty-state"),
            id="needle-answers",
            className="phrase",
            **parts.attributes({"aria-live": "polite"}),
        ),
        note="Recall is the share of the keywords in the greedy answer. The log-probability is that of the "
        "sentence's own words as the answer, in nats per token: closer to 0 is more likely.",
    )


def _map(part: NeedlePart) -> html.Div:
    tools = html.Div(
        [
            parts.choice(
                "needle.column", "The map shows",
                {"recall": "recall", "needle_logprob": "log-probability"}, part.column,
            ),
            parts.button("Fill the map", "fill-map", className="primary"),
        ],
        className="row wrap card tight",
    )  # fmt: skip
    figure = parts.figure("needle-map", "What the model finds, by depth", height=430)
    return html.Div([tools, figure], className="stack")


def show_text(text: str, span: tuple[int, int]) -> list[Any]:
    """A document with its sentence marked, as children; far text is left out."""
    start, end = span
    before, after = text[:start], text[end:]
    if len(before) > _AROUND:
        before = "… " + before[-_AROUND:]
    if len(after) > _AROUND:
        after = after[:_AROUND] + " …"
    return [before, html.Mark(text[start:end], id="needle-mark"), after]


def mark_keywords(text: str, keywords: tuple[str, ...]) -> list[Any]:
    """An answer with the keywords marked."""
    words = [r"\W+".join(map(re.escape, word.split())) for word in keywords if word.split()]
    if not words:
        return [text]
    pattern = rf"(?<!\w)(?:{'|'.join(sorted(words, key=len, reverse=True))})(?!\w)"
    shown, done = [], 0
    for found in re.finditer(pattern, text, re.IGNORECASE):
        shown += [text[done : found.start()], html.Mark(found[0])]
        done = found.end()
    return [one for one in (*shown, text[done:]) if one]


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def show_answers(found: hiding.Place) -> list[Any]:
    """The answers of one place with their scores, one row per condition."""
    head = [html.Th(name, scope="col") for name in ("", "recall", "nats per token", "answer")]
    lines = []
    for row in found.grid.frame.to_dict("records"):
        templated = str(row["condition"]).startswith("template")
        said = row["error"] or row["response"] or ""
        answer = [row["error"]] if row["error"] else mark_keywords(said, found.cell.needle.keywords)
        begun = f"{found.cell.needle.prefix} … " if "prefix" in str(row["condition"]) else ""
        lines.append(
            html.Tr(
                [
                    html.Th("with template" if templated else "without template", scope="row"),
                    html.Td(_percent(row["recall"]), className="number"),
                    html.Td(number(row["needle_logprob"]), className="number"),
                    html.Td([html.Span(begun, className="begun"), *answer], className="said"),
                ]
            )
        )
    return [
        html.Div(
            html.Table([html.Thead(html.Tr(head)), html.Tbody(lines)]),
            className="scrolling",
            tabIndex="0",
            role="group",
            **parts.attributes({"aria-label": "answers"}),
        )
    ]


def _read(given: Any) -> NeedlePart:
    return read_part(NeedlePart, given)


def register(app: Dash, lab: Lab) -> None:
    """The screen's callbacks."""
    _register_place(app, lab)
    _register_map(app, lab)
    _register_clicks(app, lab)


def _register_place(app: Dash, lab: Lab) -> None:
    @app.callback(
        parts.wanted("needle-place"),
        Output("needle-text", "children"),
        Output("needle-facts", "children"),
        Input("hiding", "data"),
        parts.PAGE,
    )
    def ask(given: Any, page: Any) -> Any:
        if not given:
            return (parts.no_update,) * 3
        part = _read(given)
        cell = hiding.written(lab, part)
        context = cell.context
        words = (
            f"{context.tokens:,} tokens; {context.depth_percent:.0f} % of the text stand before the sentence."
        )
        want = parts.want(lab, hiding.place(lab, part), page=page, name="needle-place")
        return want, show_text(context.text, context.needle_span), words

    @app.callback(
        Output("needle-answers", "children"),
        parts.arrived("needle-place"),
        State("hiding", "data"),
        prevent_initial_call=True,
    )
    def show(there: Any, given: Any) -> Any:
        found = lab.cache.get(there["key"]) if given and parts.has_arrived(there) else None
        return parts.no_update if found is None else show_answers(found)

    app.clientside_callback(
        ClientsideFunction("explore", "showNeedle"),
        Output("needle-text", "title"),
        Input("needle-text", "children"),
    )


def _register_map(app: Dash, lab: Lab) -> None:
    @app.callback(
        Output({"type": "figure", "name": "needle-map"}, "data"),
        Output({"type": "caption", "name": "needle-map"}, "children"),
        Input("hiding", "data"),
        parts.arrived("needle-place"),
        parts.arrived("needle-map"),
    )
    def draw(given: Any, there: Any, filled: Any) -> Any:
        if not given:
            return parts.no_update, parts.no_update
        part = _read(given)
        made, done, total = hiding.needle_map(lab, part)
        if not done:
            return parts.no_update, "Every place that is computed appears here."
        name = COLUMNS[part.column].capitalize()
        words = (
            f"{name} by depth of the sentence and length of the context: {done} of {total} places computed. "
            "Left without the chat template, right with it. The frame is the present place; click a cell to "
            "go there."
        )
        return parts.show_figure(made), words

    @app.callback(
        parts.wanted("needle-map"),
        Input("fill-map", "n_clicks"),
        parts.arrived("needle-map"),
        State("hiding", "data"),
        parts.PAGE,
        prevent_initial_call=True,
    )
    def fill(clicks: Any, filled: Any, given: Any, page: Any) -> Any:
        if not given or not clicks:
            return parts.no_update
        part = _read(given)
        if dash.ctx.triggered_id != "fill-map" and (
            not parts.has_arrived(filled) or filled.get("about") != hiding.about(part)
        ):
            return parts.no_update
        task = hiding.filling(lab, part)
        if task is None:
            return parts.no_update
        return {**parts.want(lab, task, page=page, name="needle-map"), "about": hiding.about(part)}


def _register_clicks(app: Dash, lab: Lab) -> None:
    @app.callback(
        Output("nowhere", "data", allow_duplicate=True),
        Input({"type": "graph", "name": "needle-map"}, "clickData"),
        State("hiding", "data"),
        prevent_initial_call=True,
    )
    def go(click: Any, given: Any) -> Any:
        point = ((click or {}).get("points") or [{}])[0]
        if given and "y" in point:
            part = _read(given)
            panel = needle_panels(hiding.measured(lab, part)[0])[0]
            labels = panel.length_labels
            dash.set_props(parts.control_id("needle.depth"), {"value": float(point["y"])})
            if len(labels) > 1 and point.get("x") in labels:
                length = panel.context_tokens[labels.index(point["x"])]
                dash.set_props(parts.control_id("needle.length"), {"value": length})
                others = ", ".join(str(one) for one in part.lengths if one != length)
                dash.set_props(parts.control_id("needle.more"), {"value": others})
        return parts.no_update


def _frame(lab: Lab, state: Chosen) -> Any:
    return hiding.measured(lab, state.needle)[0].frame


parts.FRAMES["needle-map"] = _frame

__all__ = ["layout", "mark_keywords", "register", "show_answers", "show_text"]
