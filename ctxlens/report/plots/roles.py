"""Rendered conversations token by token: the role of every token, and what the template adds."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup, escape

from ctxlens.chat.roles import ROLE_LABELS, RenderedChat, Role
from ctxlens.report.plots.html import HtmlView
from ctxlens.report.plots.look import role_css

_BREAKS = re.compile("\n+")
_UNSEEN = ("Cc", "Cf", "Co", "Cn", "Zl", "Zp")

ROLES_CSS = (
    role_css()
    + """
body{max-width:62rem;margin-inline:auto;padding:0 1rem}
h1{font-size:1.25rem;margin:0 0 .3rem}
h2{font-size:1rem;margin:2.2rem 0 .4rem;padding-top:1rem;
border-top:1px solid color-mix(in srgb,currentColor 18%,transparent)}
.quiet{opacity:.72;margin:.2rem 0;font-size:.86rem}
.counts{display:flex;flex-wrap:wrap;gap:.35rem .9rem;list-style:none;margin:.6rem 0;
padding:0;font-size:.86rem}
.counts b{font-weight:600}
.swatch{display:inline-block;width:.8em;height:.8em;margin-right:.35em;border-radius:2px;vertical-align:-.05em;
border:1px solid var(--role);background:color-mix(in srgb,var(--role) 38%,transparent)}
.notice{margin:.5rem 0;padding:.45rem .7rem;border-left:3px solid var(--alert);border-radius:2px;
background:color-mix(in srgb,var(--alert) 11%,transparent);font-size:.9rem}
.notice code,.tok{font-family:var(--mono)}
.tokens{line-height:2;overflow-wrap:anywhere;white-space:pre-wrap;font-size:.86rem}
.tok{unicode-bidi:isolate;padding:.14em .05em;margin:0 1px 0 0;border-radius:3px;
-webkit-box-decoration-break:clone;box-decoration-break:clone;
border:1px solid color-mix(in srgb,var(--role) 45%,transparent);
background:color-mix(in srgb,var(--role) 20%,transparent)}
.tok:hover{outline:2px solid var(--role)}
.tok.r-template{border-style:dashed;background:color-mix(in srgb,var(--role) 7%,transparent)}
.tok.stop{border:1px solid var(--role);box-shadow:inset 0 -2px 0 var(--role)}
.tok.typed{text-decoration:underline wavy var(--alert);text-underline-offset:.18em}
.unseen{opacity:.55}
.unseen.code{font-size:.75em}
.rolename{font-weight:600;font-size:.66rem;line-height:1;letter-spacing:.05em;text-transform:uppercase;
color:var(--role-text);white-space:nowrap;margin:0 .3rem 0 .25rem}
"""
    + "".join(
        f".r-{name}{{--role:var(--role-{name});--role-text:var(--role-{name}-text)}}" for name in ROLE_LABELS
    )
)
"""The style sheet of role views."""


def roles_view(chats: Sequence[RenderedChat], *, title: str = "The role of every token") -> HtmlView:
    """Show rendered conversations with every token as a box in the colour of its role.

    The name of the role and the number of the turn stand where they change. The tooltip of a token shows its
    role, turn, id, position and characters. Special tokens that a speaker typed are underlined and listed.
    Notices say what the template left out and what was truncated. Invisible characters are shown by name.

    Args:
        chats: the conversations, in the order in which they are shown.
        title: heading of the page.
    """
    pieces = [f"<h1>{escape(title)}</h1>", _LEGEND]
    for number, chat in enumerate(chats):
        if len(chats) > 1:
            pieces.append(f"<h2>Conversation {number}</h2>")
        pieces += [_counts(chat), *_notices(chat), _tokens(chat)]
    return HtmlView("".join(map(str, pieces)), ROLES_CSS, title)


_LEGEND = (
    '<p class="quiet">Every box is a token. Its colour shows its role; the role and the number of the turn '
    "are named where they change. A dashed border marks tokens that the template wrote, a heavy line below "
    "a token that ends a turn, and a wavy line a special token that a speaker typed. Hover over a token to "
    "see its role, turn, id and position.</p>"
)


def _counts(chat: RenderedChat) -> str:
    counts = Counter(chat.role.tolist())
    items = "".join(
        f'<li class="r-{ROLE_LABELS[value]}"><span class="swatch"></span>{ROLE_LABELS[value]} '
        f"<b>{counts[value]}</b></li>"
        for value in sorted(counts)
    )
    return f'<ul class="counts">{items}<li>tokens <b>{chat.n_tokens}</b></li></ul>'


def _notices(chat: RenderedChat) -> list[str]:
    notices: list[str | Markup] = []
    if chat.spoofed_special_tokens:
        listed = Markup(", ").join(
            Markup("<code>{}</code>").format(token) for token in chat.spoofed_special_tokens
        )
        notices.append(
            Markup(
                "Special tokens typed by a speaker: {}. The model reads them as markers of the template; "
                "here they have the role of the speaker who typed them."
            ).format(listed)
        )
    if chat.left_out_turns():
        turns = ", ".join(map(str, chat.left_out_turns()))
        notices.append(f"The template leaves out the content of turn {turns}.")
    if chat.truncated:
        notices.append(chat.truncated)
    return [f'<p class="notice">{escape(notice)}</p>' for notice in notices]


def _tokens(chat: RenderedChat) -> str:
    stops = {position: turn for turn, position in chat.stops.items()}
    pieces = ['<div class="tokens">']
    before = None
    for position, (text, role, turn, token) in enumerate(
        zip(chat.token_strings(), chat.role.tolist(), chat.turn.tolist(), chat.tokens.tolist(), strict=True)
    ):
        name = ROLE_LABELS[role]
        if (role, turn) != before:
            label = name if turn < 0 else f"{name} {turn}"
            pieces.append(f'<span class="rolename r-{name}">{label}</span>')
        before = (role, turn)
        hints = [name, f"turn {turn}" if turn >= 0 else "no turn", f"id {token}", f"position {position}"]
        classes = f"tok r-{name}"
        if position in stops:
            classes += " stop"
            hints.append(f"ends turn {stops[position]}")
        if turn >= 0 and role != Role.INDICATOR and text.strip() in chat.spoofed_special_tokens:
            classes += " typed"
            hints.append("special token typed by a speaker")
        hint = escape(" · ".join([*hints, repr(text) if text else "part of the character before"]))
        line_break = "\n" if text.endswith("\n") else ""
        pieces.append(f'<span class="{classes}" title="{hint}">{_visible(text)}</span>{line_break}')
    return "".join([*pieces, "</div>"])


def _visible(text: str) -> str:
    """Escaped text in which invisible characters are named and a run of line breaks breaks the line once."""
    if not text:
        return '<span class="unseen">∅</span>'
    shown = "".join(_visible_character(character, alone=len(text) == 1) for character in text)
    return _BREAKS.sub(lambda run: f'<span class="unseen">{"↵" * len(run[0])}</span>\n', shown).removesuffix(
        "\n"
    )


def _visible_character(character: str, *, alone: bool) -> str:
    if character == "\t":
        return '<span class="unseen">⇥</span>\t'
    joins = character == "\u200d" and not alone
    if not joins and character != "\n" and unicodedata.category(character) in _UNSEEN:
        return f'<span class="unseen code">U+{ord(character):04X}</span>'
    return str(escape(character))
