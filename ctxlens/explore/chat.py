"""Screen 1: a conversation, what the model reads of it, where the next token looks, and the answer."""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from typing import Any

import numpy as np
from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html

from ctxlens.chat.data.messages import parse_messages
from ctxlens.chat.data.reading import read_bytes_rows
from ctxlens.chat.roles import ROLE_LABELS, RenderedChat, Role
from ctxlens.errors import InputError
from ctxlens.explore import parts
from ctxlens.explore.lab import Lab
from ctxlens.explore.state import ChatPart, as_messages, read_part
from ctxlens.explore.state import State as Chosen
from ctxlens.report.plots.allocation import layer_panel, layer_shares
from ctxlens.results import RoleAllocation

SPEAKERS = ("system", "user", "assistant", "tool")
_SUFFIXES = (".json", ".jsonl")
MOST_UPLOAD = 4 * 2**20
"""The largest file that may be loaded, in bytes."""


def layout(lab: Lab, state: Chosen) -> html.Section:
    """The screen."""
    part = state.chat
    editor = parts.card(
        "Conversation",
        html.Div(edit_messages(part), id="editor", className="editor"),
        html.Div([parts.button("Add a message", "add-message"), _loading()], className="row"),
        _rendering(lab, part),
        className="side",
    )
    answer = parts.card(
        "The model's answer",
        html.Div(_EMPTY, id="chat-answer", className="answer", **parts.attributes({"aria-live": "polite"})),
    )
    layers = parts.figure(
        "layers", "By layer", "How each layer spreads the next token's attention over the roles."
    )
    return parts.section(
        "chat",
        "Chat",
        "Every token has an owner: somebody who said it, or the template. Colour and label show whose it is.",
        html.Div(
            [editor, html.Div([_reads(), _looks(state), answer, layers], className="stack")],
            className="columns",
        ),
        *parts.slots("reading", "answer"),
    )


def _reads() -> html.Div:
    return html.Div(
        [
            html.Div(
                [html.H3("What the model reads"), html.P("", id="chat-facts", className="note")],
                className="figure-head",
            ),
            html.Div(id="chat-notices", role="status"),
            html.Div(id="chat-counts", className="counts"),
            html.Div(
                className="tokens small",
                id="chat-tokens",
                tabIndex="0",
                role="group",
                **parts.attributes({"aria-label": "Tokens of the conversation, labelled by role"}),
            ),
        ],
        className="card",
    )


def _looks(state: Chosen) -> html.Div:
    return html.Div(
        [
            html.Div(
                [
                    html.H3("Where the next token looks"),
                    parts.choice("where.view", "View", parts.VIEWS, state.where.view),
                ],
                className="figure-head",
            ),
            html.P(
                "Attention of the token that produces the answer, mean over all layers and heads.",
                className="note",
            ),
            html.Div(
                _EMPTY,
                id="strip",
                className="strip",
                role="img",
                **parts.attributes({"aria-label": "not read yet"}),
            ),
        ],
        className="card",
    )


_EMPTY = html.Span("Not computed yet.", className="empty-state")


def _loading() -> html.Details:
    return html.Details(
        [
            html.Summary("Paste or load"),
            html.Label(
                [
                    html.Span("Messages as JSON"),
                    dcc.Textarea(
                        id="paste",
                        rows=4,
                        spellCheck=False,
                        maxLength=400_000,
                        placeholder='[{"role": "user", "content": "Who is the mayor?"}]',
                    ),
                ],
                className="entry area",
            ),
            html.Div(
                [
                    parts.button("Use this", "use-paste"),
                    dcc.Upload(
                        html.Button("Load a file", type="button"),
                        id="upload",
                        max_size=MOST_UPLOAD,
                        accept=",".join(_SUFFIXES),
                        multiple=False,
                    ),
                ],
                className="row",
            ),
            html.P(
                "A JSON or JSON-lines file of messages, at most 4 MiB. It is read on this machine only.",
                className="note",
            ),
        ],
        className="fold",
    )


def _rendering(lab: Lab, part: ChatPart) -> html.Details:
    names = parts.templates(lab.lent_template)
    shown = [
        html.Summary("Template and answer"),
        parts.choice("chat.template", "Chat template", names, part.template),
        html.Div(
            parts.area("chat.template_text", "Chat template in Jinja", part.template_text, rows=5),
            id="own-template",
        ),
        parts.entry(
            "chat.template_args",
            "Template variables",
            part.template_args,
            placeholder='{"enable_thinking": false}',
        ),
        parts.entry(
            "chat.answer_tokens",
            "Longest answer, in tokens",
            part.answer_tokens,
            kind="number",
            min=1,
            max=512,
            step=1,
        ),
    ]
    if lab.model.indicator:
        shown.append(
            parts.flag("chat.indicator", f"Mark the last question with {lab.model.indicator}", part.indicator)
        )
    return html.Details(shown, className="fold")


def edit_messages(part: ChatPart) -> list[html.Div]:
    """The editor's rows."""
    return [
        html.Div(
            [
                html.Div(
                    [
                        parts.choice(
                            f"chat.messages.{i}.role",
                            f"Role of message {i}",
                            SPEAKERS,
                            message.role,
                            roles=True,
                        ),
                        parts.button(
                            "×",
                            {"type": "drop-message", "i": i},
                            label=f"Delete message {i}",
                            className="quiet-button drop",
                        ),
                    ],
                    className="message-head",
                ),
                html.Label(
                    [
                        html.Span(f"Text of message {i}", className="visually-hidden"),
                        dcc.Textarea(
                            id=parts.control_id(f"chat.messages.{i}.content"),
                            value=message.content,
                            spellCheck=False,
                            maxLength=400_000,
                            placeholder="Write here.",
                        ),
                    ]
                ),
            ],
            className="message",
        )
        for i, message in enumerate(part.messages)
    ]


def read_upload(contents: str, name: str) -> list[dict[str, Any]]:
    """The messages of an uploaded file, the first conversation if there are several.

    Raises:
        InputError: another kind of file, one that is too large, or no messages.
    """
    if not str(name).lower().endswith(_SUFFIXES):
        raise InputError(f"{str(name)[:80]} is not a JSON file; load a file that ends with .json or .jsonl.")
    try:
        raw = base64.b64decode(contents.partition(",")[2], validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{name[:80]} did not arrive whole; load it again.") from None
    return read_text(raw, str(name)[:80])


def read_text(raw: bytes, name: str) -> list[dict[str, Any]]:
    """The messages of JSON text, for the editor.

    Raises:
        InputError: it is too large, or holds no messages.
    """
    if len(raw) > MOST_UPLOAD:
        raise InputError(f"{name} has more than {MOST_UPLOAD // 2**20} MiB; load a shorter conversation.")
    if raw.lstrip()[:1] not in (b"[", b"{"):
        raise InputError(
            f"{name} is not JSON; expected a list of messages such as "
            '[{"role": "user", "content": "Who is the mayor?"}].'
        )
    found = parse_messages(read_bytes_rows(raw, name), name, None, None).conversations
    if not found:
        raise InputError(f"{name} holds no conversation.")
    return [message.model_dump() for message in as_messages(found[0])]


def token_payload(chat: RenderedChat) -> dict[str, Any]:
    """What the page needs to draw the tokens."""
    texts = chat.token_strings()
    typed = [
        i
        for i, (text, turn, role) in enumerate(
            zip(texts, chat.turn.tolist(), chat.role.tolist(), strict=True)
        )
        if turn >= 0 and role != Role.INDICATOR and text.strip() in chat.spoofed_special_tokens
    ]
    return {
        "tokens": texts,
        "roles": chat.role.tolist(),
        "turns": chat.turn.tolist(),
        "ids": chat.tokens.tolist(),
        "names": list(ROLE_LABELS),
        "stops": sorted(chat.stops.values()),
        "typed": typed,
        "query": chat.first_answer_position(),
    }


def notices(chat: RenderedChat, window: int) -> list[html.P]:
    """What a reader must know about the rendering."""
    found: list[Any] = []
    if chat.spoofed_special_tokens:
        found.append(
            [
                "Somebody typed special tokens: ",
                html.Code(", ".join(chat.spoofed_special_tokens)),
                ". The model reads them as markers of the template; here they belong to whoever typed them.",
            ]
        )
    for what, n in chat.left_out.items():
        found.append([f"The template leaves out {what} ({n})."])
    if chat.truncated:
        found.append([chat.truncated])
    return [html.P(words, className="notice") for words in found]


def strip(allocation: RoleAllocation, view: str) -> tuple[list[html.Div], str]:
    """The mean role shares as one bar of labelled pieces, and the same in words."""
    shares = np.nan_to_num(layer_shares(allocation, view=view)).mean(0)
    order = [role for role in parts.ROLES if shares[Role.parse(role)] >= 0.0005]
    pieces = []
    for role in order:
        share = float(shares[Role.parse(role)])
        words = f"{role} {share:.0%}" if share >= 0.0095 else f"{role} <1%"
        pieces.append(
            html.Div(
                html.Span(words),
                className=f"piece r-{role}" + (" thin" if share < 0.13 else ""),
                style={"flexGrow": max(share, 0.004)},
                title=f"{role}: {share:.1%}",
            )
        )
    said = ", ".join(f"{role} {float(shares[Role.parse(role)]):.1%}" for role in order)
    return pieces, f"Mean attention by role: {said}"


def seen_view(allocation: RoleAllocation, view: str) -> str:
    """The view that can be shown: raw where sinks were not measured."""
    return view if allocation.resting is not None or view != "without sinks" else "raw"


def register(app: Dash, lab: Lab) -> None:
    """The screen's callbacks."""
    _register_editor(app)
    _register_results(app, lab)

    # One request for all of it: the tokens are shown at once, then the reading and the answer are computed.
    @app.callback(
        Output("tokens", "data"),
        Output("chat-facts", "children"),
        Output("chat-notices", "children"),
        Output("chat-counts", "children"),
        Output("notice", "children", allow_duplicate=True),
        parts.wanted("reading"),
        parts.wanted("answer"),
        Input("conversation", "data"),
        parts.PAGE,
        prevent_initial_call="initial_duplicate",
    )
    def draw(given: Any, page: Any) -> Any:
        if not given:
            return (parts.no_update,) * 7
        part = read_part(ChatPart, given)
        chat = lab.render(part)
        counts = Counter(ROLE_LABELS[role] for role in chat.role.tolist())
        shown = [
            html.Span(
                [html.I(className="swatch"), f"{role} ", html.B(str(counts[role]))], className=f"r-{role}"
            )
            for role in parts.ROLES
            if counts[role]
        ]
        how = "with the chat template" if chat.templated else "without chat template"
        facts = f"{chat.n_tokens:,} tokens, {how}"
        said = token_payload(chat), facts, notices(chat, lab.model.n_ctx), shown, ""
        reading = parts.want(lab, lab.reading(part), page=page, name="reading")
        return *said, reading, parts.want(lab, lab.answer(part), page=page, name="answer")


def _register_editor(app: Dash) -> None:
    @app.callback(Output("editor", "children"), Input("restored", "data"), prevent_initial_call=True)
    def edit(given: Any) -> Any:
        return edit_messages(Chosen.read(given).chat) if given else parts.no_update

    @app.callback(
        Output("loaded", "data"),
        Input("use-paste", "n_clicks"),
        Input("upload", "contents"),
        State("paste", "value"),
        State("upload", "filename"),
        prevent_initial_call=True,
    )
    def load(clicks: Any, contents: Any, pasted: Any, name: Any) -> Any:
        from dash import ctx

        if ctx.triggered_id == "upload":
            return read_upload(contents, name) if contents else parts.no_update
        return read_text(str(pasted or "").encode(), "the pasted text")


def _register_results(app: Dash, lab: Lab) -> None:
    @app.callback(
        Output("strip", "children"),
        Output("strip", "aria-label"),
        Output({"type": "figure", "name": "layers"}, "data"),
        parts.arrived("reading"),
        Input("view", "data"),
        State("conversation", "data"),
    )
    def show(there: Any, view: Any, given: Any) -> Any:
        if there and not parts.has_arrived(there):
            words = there.get("error") or "Stopped."
            return html.Span(words, className="empty-state"), "not read", None
        rows = lab.rows(read_part(ChatPart, given)) if there and given else None
        if rows is None:
            return (parts.no_update,) * 3
        allocation = rows.allocation(rows.chat.first_answer_position())
        seen = seen_view(allocation, view or "raw")
        pieces, words = strip(allocation, seen)
        made = layer_panel(layer_shares(allocation, view=seen), allocation.layers)
        return pieces, words, parts.show_figure(made)

    @app.callback(
        Output("chat-answer", "children"),
        parts.arrived("answer"),
        State(parts.partial_id("answer"), "data"),
        prevent_initial_call=True,
    )
    def say(there: Any, so_far: Any) -> Any:
        if not there:
            return parts.no_update
        found = lab.cache.get(there["key"]) if parts.has_arrived(there) else None
        if found is None:
            return [str(so_far or ""), html.Span(there.get("error") or " Stopped.", className="empty-state")]
        return found.strip() or html.Span("The model ends its turn without a word.", className="empty-state")

    app.clientside_callback(
        ClientsideFunction("explore", "sayPart"),
        Output("chat-answer", "children", allow_duplicate=True),
        parts.partial("answer"),
        prevent_initial_call=True,
    )


def _frame(lab: Lab, state: Chosen) -> Any:
    rows = lab.rows(state.chat)
    if rows is None:
        raise InputError("the conversation has not been read yet.")
    return rows.allocation(rows.chat.first_answer_position()).to_frame()


parts.FRAMES["layers"] = _frame

__all__ = ["edit_messages", "layout", "read_text", "read_upload", "register", "strip", "token_payload"]
