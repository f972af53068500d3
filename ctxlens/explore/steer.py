"""Screen 3: steer attention to the user, and compare the answers with and without."""

from __future__ import annotations

import difflib
import re
from typing import Any

from dash import Dash, Input, Output, State, html

from ctxlens.explore import parts
from ctxlens.explore.lab import Lab, Phrase
from ctxlens.explore.state import ChatPart, SteerPart, read_part
from ctxlens.explore.state import State as Chosen
from ctxlens.parsing import parse_heads
from ctxlens.report.blocks import number

HEADS = {
    "all": "all",
    "retrieval": "retrieval heads",
    "random": "random control",
    "chosen": "chosen",
}
_WORDS = re.compile(r"\s*\S+\s*")


def layout(lab: Lab, state: Chosen) -> html.Section:
    """The screen."""
    steer = state.steer
    empty = html.Span("Not computed yet.", className="empty-state")
    answers = html.Div(
        [
            parts.card(
                "Unsteered",
                html.Div(
                    empty, id="answer-plain", className="answer", **parts.attributes({"aria-live": "polite"})
                ),
            ),
            parts.card(
                "Steered",
                html.Div(
                    empty,
                    id="answer-steered",
                    className="answer",
                    **parts.attributes({"aria-live": "polite"}),
                ),
            ),
        ],
        className="pair",
    )
    phrase = parts.card(
        "How likely is a phrase as the answer?",
        parts.entry(
            "steer.phrase",
            "Phrase",
            steer.phrase,
            placeholder="the beginning of an answer",
            debounce=0.5,
        ),
        html.Div(
            html.Span("Type a phrase to measure it.", className="empty-state"),
            id="phrase",
            className="phrase",
            **parts.attributes({"aria-live": "polite"}),
        ),
        note="Log-probability of the whole phrase, in nats: closer to 0 is more likely. Select words in an "
        "answer to measure the answer up to there.",
    )
    return parts.section(
        "steer",
        "Turn the knob",
        "Steering moves attention towards what the user said. Words that change are marked.",
        html.Div([_knob(steer), html.Div([answers, phrase], className="stack")], className="columns"),
        *parts.slots("plain", "steered", "phrase"),
    )


def _knob(steer: SteerPart) -> html.Div:
    return parts.card(
        "The knob",
        parts.choice("steer.by", "Strength", {"alpha": "weaken the rest", "share": "fix a share"}, steer.by),
        html.Div(
            parts.slider(
                "steer.alpha", "Attention to everything but the user, times", 0.05, 1, 0.05, steer.alpha
            ),
            id="alpha-box",
        ),
        html.Div(
            parts.slider("steer.share", "Share of attention for the user", 0.05, 0.95, 0.05, steer.share),
            id="share-box",
        ),
        parts.choice("steer.heads", "Heads", HEADS, steer.heads),
        html.Div(
            parts.entry(
                "steer.chosen", "Heads as layer.head", steer.chosen, placeholder="1.2, 3.0", debounce=True
            ),
            id="chosen-box",
        ),
        html.Div(
            parts.choice("steer.mode", "Mode", ("paper", "prompt-only", "compounding"), steer.mode),
            id="mode-box",
        ),
        html.P(
            "Retrieval heads are the head of each layer that looks most at the user without the template. "
            "The random control steers as many other heads of the same layers.",
            className="note",
        ),
        className="side",
    )


def mark_words(text: str, other: str) -> list[Any]:
    """A text with the words marked that the other one does not have in this place."""
    ours, theirs = _WORDS.findall(text), _WORDS.findall(other)
    match = difflib.SequenceMatcher(
        a=[w.strip() for w in theirs], b=[w.strip() for w in ours], autojunk=False
    )
    shown: list[Any] = []
    for kind, _, _, start, end in match.get_opcodes():
        if words := "".join(ours[start:end]):
            shown.append(words if kind == "equal" else html.Mark(words))
    return shown


def heads_in_words(heads: Any) -> str:
    """The heads as layer.head pairs, shortened."""
    if heads == "all":
        return "all heads"
    pairs = [f"{layer}.{head}" for layer, head in heads]
    return ", ".join(pairs[:12]) + (f" and {len(pairs) - 12} more" if len(pairs) > 12 else "")


def show_phrase(found: Phrase) -> list[Any]:
    """The measured log-probabilities as bars and numbers."""
    rows = [("unsteered", found.plain), ("steered", found.steered)]
    if found.control is not None:
        rows.append(("random heads steered", found.control))
    worst = min(value for _, value in rows) or -1.0
    changes = {name: number(value - found.plain, signed=True) for name, value in rows[1:]}
    lines = [
        html.Tr(
            [
                html.Th(name, scope="row"),
                html.Td(number(value), className="number"),
                html.Td(changes.get(name, ""), className="number"),
                html.Td(
                    html.Span(className="bar", style={"width": f"{100 * value / worst:.0f}%"}),
                    className="bars",
                ),
            ]
        )
        for name, value in rows
    ]
    head = html.Tr(
        [
            html.Th("", scope="col"),
            html.Th("nats", scope="col", className="number"),
            html.Th("change", scope="col", className="number"),
            html.Th("shorter is more likely", scope="col"),
        ]
    )
    words = f"{found.n_tokens} tokens. Steered: {heads_in_words(found.heads)}."
    if found.random is not None:
        words += f" Control: {heads_in_words(found.random)}."
    return [html.Table([html.Thead(head), html.Tbody(lines)]), html.P(words, className="note")]


def _read(given: Any) -> tuple[ChatPart, SteerPart]:
    return read_part(ChatPart, given["chat"]), read_part(SteerPart, given["steer"])


def register(app: Dash, lab: Lab) -> None:
    """The screen's callbacks."""
    _register_questions(app, lab)

    @app.callback(
        Output("answer-plain", "children"),
        Output("answer-steered", "children"),
        parts.arrived("plain"),
        parts.partial("plain"),
        parts.arrived("steered"),
        parts.partial("steered"),
        State("steering", "data"),
        prevent_initial_call=True,
    )
    def say(plain: Any, plain_part: Any, steered: Any, steered_part: Any, given: Any) -> Any:
        if not given:
            return parts.no_update, parts.no_update
        part, steer = _read(given)
        before = _text(lab, lab.answer(part).key, plain, plain_part)
        after = _text(lab, lab.answer(part, steer=steer).key, steered, steered_part)
        return mark_words(before, after), mark_words(after, before)

    @app.callback(
        Output("phrase", "children"),
        parts.arrived("phrase"),
        State("steering", "data"),
        prevent_initial_call=True,
    )
    def show(there: Any, given: Any) -> Any:
        if not given or not parts.has_arrived(there):
            return parts.no_update
        found = lab.cache.get(there["key"])
        return parts.no_update if found is None else show_phrase(found)


def _text(lab: Lab, key: str, there: Any, so_far: Any) -> str:
    """An answer as far as it is there."""
    if parts.has_arrived(there) and there["key"] == key:
        return lab.cache.get(key) or ""
    return str(so_far or "")


def _register_questions(app: Dash, lab: Lab) -> None:
    @app.callback(
        parts.wanted("plain"),
        parts.wanted("steered"),
        parts.wanted("phrase"),
        Input("steering", "data"),
        parts.PAGE,
    )
    def ask(given: Any, page: Any) -> Any:
        if not given:
            return (parts.no_update,) * 3
        part, steer = _read(given)
        if steer.heads == "chosen":
            if not steer.chosen.strip():
                return (parts.no_update,) * 3
            parse_heads(steer.chosen)
        plain = parts.want(lab, lab.answer(part), page=page, name="plain")
        steered = parts.want(lab, lab.answer(part, steer=steer), page=page, name="steered")
        phrase: Any = parts.no_update
        if steer.phrase.strip():
            phrase = parts.want(lab, lab.phrase(part, steer), page=page, name="phrase")
        return plain, steered, phrase


__all__ = ["heads_in_words", "layout", "mark_words", "register", "show_phrase"]
