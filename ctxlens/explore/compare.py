"""Screen 4: the same conversation in two ways, and what changes."""

from __future__ import annotations

from typing import Any

from dash import Dash, Input, Output, html

from ctxlens.errors import InputError
from ctxlens.explore import parts
from ctxlens.explore.chat import seen_view
from ctxlens.explore.lab import OTHER, THIS, Lab
from ctxlens.explore.state import ChatPart, ComparePart, read_part
from ctxlens.explore.state import State as Chosen
from ctxlens.explore.steer import mark_words
from ctxlens.explore.where import visible
from ctxlens.models.rows import AttentionRows, likely_tokens
from ctxlens.report.blocks import number
from ctxlens.report.plots import role_heatmap

_MOST = 8


def layout(lab: Lab, state: Chosen) -> html.Section:
    """The screen."""
    change, view = _choices(lab, state.compare)
    sides = html.Div(
        [
            parts.card(
                f"Side {side}",
                html.P("", id=f"facts-{side}", className="note"),
                html.H4("Answer"),
                html.Div(
                    html.Span("Not computed yet.", className="empty-state"),
                    id=f"answer-{side}",
                    className="answer",
                    **parts.attributes({"aria-live": "polite"}),
                ),
                html.H4("Likely next tokens"),
                html.Div(id=f"next-{side}", className="next"),
            )
            for side in "AB"
        ],
        className="pair",
    )
    return parts.section(
        "compare",
        "A or B",
        "The same conversation in two ways. Blue: the role gets more attention on side B; orange: less.",
        html.Div(
            [
                html.Div(
                    [parts.card("What changes", *change), parts.card("What the map shows", *view)],
                    className="stack side",
                ),
                html.Div(
                    [parts.figure("difference", "Side B minus side A, by layer and head", height=420), sides],
                    className="stack",
                ),
            ],
            className="columns",
        ),
        *parts.slots("reading-a", "reading-b", "answer-a", "answer-b"),
    )


def _choices(lab: Lab, compare: ComparePart) -> tuple[list[Any], list[Any]]:
    """What side B changes, and what the map shows."""
    names = parts.templates(lab.lent_template)
    change = [
        html.P(
            "Side A is the conversation as on the screen Chat. Side B is the same, but with:",
            className="note",
        ),
        parts.choice("compare.template", "Chat template", names, compare.template),
    ]
    if lab.model.indicator:
        change.append(
            parts.flag(
                "compare.indicator", f"The last question marked with {lab.model.indicator}", compare.indicator
            )
        )
    if OTHER in lab.models:
        models = {THIS: _short(lab.models[THIS].name), OTHER: _short(lab.models[OTHER].name)}
        change.append(parts.choice("compare.model", "Model", models, compare.model))
    else:
        change.append(
            html.P("Start the explorer with --against MODEL to compare two models.", className="note")
        )
    view = [
        parts.choice("compare.role", "Role of the map", parts.ROLES, compare.role, roles=True),
        parts.choice("compare.view", "View", parts.VIEWS, compare.view),
    ]
    return change, view


def _short(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


def list_next(rows: AttentionRows, tokenizer: Any) -> html.Ol:
    """The most likely next tokens with their probabilities."""
    return html.Ol(
        [
            html.Li(
                [
                    html.Code(visible(text)),
                    html.Span(parts.percent(p), className="number"),
                    html.Span(className="bar", style={"width": f"{100 * p:.1f}%"}),
                ]
            )
            for text, p in likely_tokens(rows, tokenizer, _MOST)
        ],
        className="mass-list plain",
    )


def difference(a: AttentionRows, b: AttentionRows, compare: ComparePart) -> tuple[Any, str]:
    """The map of B minus A, and its caption.

    Raises:
        InputError: the models have different layers or heads.
    """
    first, second = (rows.allocation(rows.chat.n_tokens - 1) for rows in (a, b))
    if first.shares.shape[:2] != second.shares.shape[:2]:
        raise InputError("the two models have different layers or heads, so that no difference can be drawn.")
    measured = first.resting is not None and second.resting is not None
    view = compare.view if measured else seen_view(first if first.resting is None else second, compare.view)
    made = role_heatmap(second, compare.role, view=view, compare=first)
    change = float(second.share(compare.role, view=view).mean() - first.share(compare.role, view=view).mean())
    words = (
        f"Share of {compare.role} at the token that produces the answer, {parts.VIEWS[view]}; mean change "
        f"{number(change, signed=True, digits=3)}. Blue: more on side B, orange: less."
    )
    return made, words


def _read(given: Any) -> tuple[ChatPart, ComparePart]:
    return read_part(ChatPart, given["chat"]), read_part(ComparePart, given["compare"])


def _rows(lab: Lab, given: Any) -> tuple[AttentionRows | None, AttentionRows | None]:
    part, compare = _read(given)
    changed, which = lab.side(part, compare)
    return lab.rows(part, is_open=True), lab.rows(changed, which, is_open=True)


# long: the screen's callbacks, one after the other
def register(app: Dash, lab: Lab) -> None:
    """The screen's callbacks."""

    @app.callback(
        parts.wanted("reading-a"),
        parts.wanted("reading-b"),
        parts.wanted("answer-a"),
        parts.wanted("answer-b"),
        Input("comparing", "data"),
        parts.PAGE,
    )
    def ask(given: Any, page: Any) -> Any:
        if not given:
            return (parts.no_update,) * 4
        part, compare = _read(given)
        changed, which = lab.side(part, compare)
        tasks = {
            "reading-a": lab.reading(part, is_open=True),
            "reading-b": lab.reading(changed, which, is_open=True),
            "answer-a": lab.answer(part),
            "answer-b": lab.answer(changed, which),
        }
        return tuple(parts.want(lab, task, page=page, name=name) for name, task in tasks.items())

    @app.callback(
        Output({"type": "figure", "name": "difference"}, "data"),
        Output({"type": "caption", "name": "difference"}, "children"),
        Output("next-A", "children"),
        Output("next-B", "children"),
        Output("facts-A", "children"),
        Output("facts-B", "children"),
        parts.arrived("reading-a"),
        parts.arrived("reading-b"),
        Input("comparing", "data"),
    )
    def show(a: Any, b: Any, given: Any) -> Any:
        first, second = _rows(lab, given) if given else (None, None)
        if first is None or second is None:
            return (parts.no_update,) * 6
        _, compare = _read(given)
        made, words = difference(first, second, compare)
        models = lab.models[THIS], lab.models[compare.model]
        facts = [
            f"{_short(model.name)}, {'with' if rows.chat.templated else 'without'} chat template, "
            f"{rows.chat.n_tokens:,} tokens"
            for rows, model in zip((first, second), models, strict=True)
        ]
        lists = [
            list_next(rows, model.tokenizer) for rows, model in zip((first, second), models, strict=True)
        ]
        return parts.show_figure(made), words, *lists, *facts

    @app.callback(
        Output("answer-A", "children"),
        Output("answer-B", "children"),
        parts.arrived("answer-a"),
        parts.partial("answer-a"),
        parts.arrived("answer-b"),
        parts.partial("answer-b"),
        prevent_initial_call=True,
    )
    def say(a: Any, a_part: Any, b: Any, b_part: Any) -> Any:
        texts = [
            (lab.cache.get(there["key"]) or "") if parts.has_arrived(there) else str(so_far or "")
            for there, so_far in ((a, a_part), (b, b_part))
        ]
        if not any(texts):
            return parts.no_update, parts.no_update
        return mark_words(texts[0], texts[1]), mark_words(texts[1], texts[0])


def _frame(lab: Lab, state: Chosen) -> Any:
    import pandas as pd

    rows = _rows(lab, {"chat": state.chat, "compare": state.compare})
    if rows[0] is None or rows[1] is None:
        raise InputError("the two sides have not been read yet.")
    frames = [one.allocation(one.chat.n_tokens - 1).to_frame() for one in rows if one is not None]
    return pd.concat([frame.assign(side=side) for side, frame in zip("AB", frames, strict=True)])


parts.FRAMES["difference"] = _frame

__all__ = ["difference", "layout", "list_next", "register"]
