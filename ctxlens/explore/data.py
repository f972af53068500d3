"""Screen 6: a scored data set: score against length, what a threshold selects, and the turns to read."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dash import Dash, Input, Output, State, dcc, html, set_props

from ctxlens.errors import InputError
from ctxlens.explore import parts, scored
from ctxlens.explore.lab import Lab
from ctxlens.explore.state import DataPart, read_part
from ctxlens.explore.state import State as Chosen
from ctxlens.report.blocks import number
from ctxlens.report.plots.score_scatter import score_scatter
from ctxlens.report.plots.scores import KINDS

_MOST_READ = 12
_NEAREST = 6
_MOST_CHARACTERS = 4000
_RULES = {"beta": "by hand", "mixture": "mixture", "valley": "valley", "otsu": "Otsu"}
_REDUCTIONS = {
    "mean_of_best": "mean of best",
    "best_of_mean": "best of mean",
    "mean_heads": "mean of heads",
    "lp_gap": "gain in log-probability",
}


def layout(lab: Lab, state: Chosen) -> html.Section:
    """The screen."""
    part = state.data
    shown = html.Div(
        [
            html.Div([_threshold(part), _score(part), _loading(lab)], className="stack side"),
            html.Div(
                [
                    parts.card(
                        "What is selected", html.Div(id="selection-facts", className="facts"), _saving()
                    ),
                    parts.figure("scatter", "Score and length of every turn", height=440),
                    parts.card("Turns to read", html.Div(_nothing_read(), id="turns", className="turns")),
                ],
                className="stack",
            ),
        ],
        className="columns",
    )
    return parts.section(
        "data",
        "Data",
        "Every point is an answer of a scored data set: how long its context is, and how much "
        "the model looks at the user while it gives the answer.",
        dcc.Input(id=parts.control_id("data.upload"), type="hidden", value=part.upload),
        dcc.Input(id=parts.control_id("data.file"), type="hidden", value=part.file),
        html.Div(_empty(lab), id="data-empty", hidden=lab.scored is not None),
        shown,
    )


def _nothing_read() -> html.Span:
    return html.Span("The turns nearest to the threshold stand here.", className="empty-state")


def _threshold(part: DataPart) -> html.Div:
    return parts.card(
        "The threshold",
        parts.choice("data.rule", "β is found", _RULES, part.rule),
        html.Div(_drag("data.beta", "Scores above β are selected", 0.0, 1.0, 0.01, part.beta), id="beta-box"),
        html.Div(
            _drag(
                "data.nats", "Nats per token above which turns are selected",
                -3.0, 4.0, 0.05, part.nats,
            ),
            id="nats-box",
        ),
        html.P(
            "Long contexts attract attention by their length alone, so look at the correlation with length.",
            className="note",
        ),
        className="side",
    )  # fmt: skip


def _drag(key: str, label: str, low: float, high: float, step: float, value: float) -> html.Fieldset:
    bar = dcc.Slider(
        low, high, step,
        value=value, id=parts.control_id(key), marks=None, updatemode="drag",
        tooltip={"placement": "bottom", "always_visible": False},
    )  # fmt: skip
    return html.Fieldset([html.Legend(label), bar], className="slider")


def _score(part: DataPart) -> html.Div:
    return parts.card(
        "The score",
        parts.choice("data.reduction", "Over heads and tokens", _REDUCTIONS, part.reduction),
        parts.entry(
            "data.layer", "Layer", part.layer, kind="number", className="layer", placeholder="middle", min=0,
            step=1, debounce=0.5,
        ),
        className="side",
    )  # fmt: skip


def _loading(lab: Lab) -> html.Div:
    given = []
    if lab.scored is not None:
        given.append(html.P(f"The explorer was started with {lab.scored.path}.", className="note"))
    return parts.card(
        "The scores",
        *given,
        dcc.Upload(
            html.Button("Load a file of scores", type="button"),
            id="scores-upload",
            max_size=scored.MOST_UPLOAD,
            accept=",".join(scored.SUFFIXES),
            multiple=False,
        ),
        html.P(
            f"The scores.parquet of ctxlens score, or JSON lines with the same columns; at most "
            f"{scored.MOST_UPLOAD // 2**20} MiB. It is read on this machine only.",
            className="note",
        ),
        className="side",
    )


def _saving() -> html.Div:
    return html.Div(
        [
            parts.button("Save the selection", "save-selection", className="primary"),
            dcc.Download(id="selection-file"),
            html.Span("selection.parquet, as ctxlens select writes it", className="note"),
        ],
        className="row wrap saving",
    )


def _empty(lab: Lab) -> html.Div:
    """How to make scores, for somebody who has none."""
    name = lab.source.name if lab.source else "MODEL"
    code = (
        f"ctxlens score --model {name} --dataset data.jsonl --out runs/scores\n"
        f"ctxlens explore {name} --scores runs/scores --dataset data.jsonl"
    )
    return parts.card(
        "No scores yet",
        html.P(
            "Score a data set once, and look at it here. The second command also shows the turns themselves.",
            className="note",
        ),
        html.Pre(html.Code(code), tabIndex="0", role="group", **parts.attributes({"aria-label": "commands"})),
        className="how",
    )


def show_facts(found: scored.Summary, file: str) -> html.Div:
    """What the threshold does, in numbers."""
    share = found.selected / found.turns if found.turns else 0.0
    facts = [
        (f"{found.selected:,} of {found.turns:,}", f"turns are selected ({parts.percent(share)})"),
        (f"{found.threshold:.2f}", "threshold β"),
    ]
    if found.precision is not None:
        recall = "" if found.recall is None else f", {found.recall:.0%} of all that do are selected"
        facts.append((f"{found.precision:.0%}", f"of them truly depend on the context{recall}"))
    if found.correlation is not None:
        facts.append(
            (number(found.correlation, signed=True), "rank correlation of score and length (Spearman)")
        )
    items = [html.Div([html.Dt(words), html.Dd(figure)]) for figure, words in facts]
    return html.Div([html.P(file, className="note"), html.Dl(items)] if file else [html.Dl(items)])


def show_turns(known: scored.ScoredSet, rows: Any, chosen: Sequence[int]) -> list[Any]:
    """Turns to read, as text."""
    shown: list[Any] = [_show_turn(known, rows.loc[i]) for i in chosen[:_MOST_READ]]
    if len(chosen) > _MOST_READ:
        shown.append(html.P(f"{len(chosen) - _MOST_READ:,} more are not shown.", className="note"))
    if not known.messages:
        words = "Only the scores are known. Start the explorer with --dataset FILE to read the turns."
        shown.insert(0, html.P(words, className="note"))
    return shown


def _show_turn(known: scored.ScoredSet, row: Any) -> html.Div:
    name, turn = str(row["conversation"]), int(row["turn"])
    kind = row.get("kind")
    facts = [
        html.B(f"{row['score']:.3f}", className="score"),
        html.Span("selected" if row["selected"] else "not selected"),
        html.Span(f"{int(row['context_tokens']):,} tokens of context"),
        *([html.Span(KINDS.get(kind, kind))] if isinstance(kind, str) else []),
        html.Span(f"{name}, turn {turn}", className="name"),
    ]
    messages = known.messages.get(name, ())
    body: list[Any] = []
    if 0 <= turn < len(messages):
        *before, answer = messages[: turn + 1]
        body = [
            html.Details([html.Summary(_last_words(before)), *map(_message, before)], className="fold"),
            _message(answer),
        ]
    state = "is-selected" if row["selected"] else ""
    return html.Div([html.Div(facts, className="counts"), *body], className=f"turn {state}")


def _message(message: Mapping[str, Any]) -> html.Div:
    role, text = str(message["role"]), message_text(message)
    cut = text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " …"
    return html.Div([html.Span(role, className=f"role-name r-{role}"), cut], className="answer said")


def message_text(message: Mapping[str, Any]) -> str:
    """What a message says; the parts of a content that is a list, one after the other."""
    content = message.get("content")
    if isinstance(content, list | tuple):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _last_words(messages: Sequence[Mapping[str, Any]]) -> str:
    """The beginning of the last message before an answer."""
    text = " ".join(message_text(messages[-1]).split()) if messages else "nothing before it"
    return text if len(text) <= 120 else f"{text[:70]} … {text[-45:]}"


def read_contents(contents: str, name: str) -> bytes:
    """The bytes of an uploaded file.

    Raises:
        InputError: it did not arrive whole.
    """
    try:
        return base64.b64decode(str(contents).partition(",")[2], validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{str(name)[:80]} did not arrive whole; load it again.") from None


def _read(given: Any) -> DataPart:
    return read_part(DataPart, given)


def register(app: Dash, lab: Lab) -> None:
    """The screen's callbacks."""
    _register_selecting(app, lab)

    @app.callback(
        Output("nowhere", "data", allow_duplicate=True),
        Input("scores-upload", "contents"),
        State("scores-upload", "filename"),
        prevent_initial_call=True,
    )
    def load(contents: Any, name: Any) -> Any:
        if contents:
            digest = scored.keep_upload(lab, read_contents(contents, name), str(name))
            set_props(parts.control_id("data.file"), {"value": str(name)[:200]})
            set_props(parts.control_id("data.upload"), {"value": digest})
        return parts.no_update

    @app.callback(
        Output("selection-file", "data"),
        Input("save-selection", "n_clicks"),
        State("scoring", "data"),
        prevent_initial_call=True,
    )
    def save(clicks: Any, given: Any) -> Any:
        if not clicks or not given:
            return parts.no_update
        part = _read(given)
        found = scored.selection_bytes(scored.select(scored.scored_of(lab, part), part))
        return dcc.send_bytes(found, "selection.parquet")


def _frame(lab: Lab, state: Chosen) -> Any:
    known = scored.scored_of(lab, state.data)
    return scored.turns_of(known, scored.select(known, state.data))


def _register_selecting(app: Dash, lab: Lab) -> None:
    @app.callback(
        Output({"type": "figure", "name": "scatter"}, "data"),
        Output({"type": "caption", "name": "scatter"}, "children"),
        Output("selection-facts", "children"),
        Output("data-empty", "hidden"),
        Input("scoring", "data"),
    )
    def draw(given: Any) -> Any:
        part = _read(given) if given else None
        if part is None or (not part.upload and lab.scored is None):
            return (parts.no_update,) * 4
        known = scored.scored_of(lab, part)
        chosen = scored.select(known, part)
        rows = scored.turns_of(known, chosen)
        made = score_scatter(rows, chosen)
        summary = scored.summarise(known, chosen)
        if part.rule != "beta" and math.isfinite(summary.threshold):
            # Whoever goes on by hand starts where the rule stands.
            key = "data.nats" if scored.is_gap(part) else "data.beta"
            set_props(parts.control_id(key), {"value": round(summary.threshold, 2)})
        words = "Drag a box over points to read them below; without one, those nearest to the threshold."
        return parts.show_figure(made), words, show_facts(summary, part.file), True

    @app.callback(
        Output("turns", "children"),
        Input("scoring", "data"),
        Input({"type": "graph", "name": "scatter"}, "selectedData"),
    )
    def read(given: Any, brushed: Any) -> Any:
        part = _read(given) if given else None
        if part is None or (not part.upload and lab.scored is None):
            return parts.no_update
        known = scored.scored_of(lab, part)
        chosen = scored.select(known, part)
        rows = scored.turns_of(known, chosen)
        points = [one.get("customdata") for one in (brushed or {}).get("points", ())]
        places = [one for one in points if isinstance(one, int) and one in rows.index]
        if not places:
            places = scored.nearest(rows, scored.summarise(known, chosen).threshold, _NEAREST)
        ordered = rows.loc[places].sort_values("score", ascending=False, kind="stable").index
        return show_turns(known, rows, list(ordered))


parts.FRAMES["scatter"] = _frame

__all__ = ["layout", "read_contents", "register", "show_facts", "show_turns"]
