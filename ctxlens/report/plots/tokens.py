"""One conversation token by token: colour shows the role, intensity and a bar show attention."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup, escape

from ctxlens.chat.roles import ROLE_LABELS, Role
from ctxlens.errors import InputError
from ctxlens.report.plots.html import HtmlView
from ctxlens.report.plots.look import role_css
from ctxlens.results import TokenView

TOKEN_CSS = (
    role_css()
    + """
.tokens{line-height:2.15;overflow-wrap:anywhere}
.tok{--w:0;white-space:pre-wrap;padding:.16em .06em .3em;border-radius:3px;margin:0 1px 0 0;
background:color-mix(in srgb,var(--role) calc(var(--w)*42%),transparent);
box-shadow:inset 0 calc(-2px - var(--w)*7px) 0 -1px
color-mix(in srgb,var(--role) calc(25% + var(--w)*75%),transparent)}
.tok.query{outline:2px solid var(--role);outline-offset:0}
.tok .nl{opacity:.45}
.rolename{font-size:.68rem;letter-spacing:.06em;text-transform:uppercase;font-weight:600;color:var(--role-text);
border:1px solid var(--role);border-radius:3px;padding:.05rem .3rem;
margin:0 .35rem 0 .15rem;white-space:nowrap}
"""
    + "".join(
        f".r-{name}{{--role:var(--role-{name});--role-text:var(--role-{name}-text)}}" for name in ROLE_LABELS
    )
)
"""The style sheet of token views."""


def token_view(
    view: TokenView, *, layer: int | None = None, head: int | None = None, query: int = -1
) -> HtmlView:
    """Show the tokens of one conversation with the attention that one query pays to them.

    The colour of a token shows its role, which is named where it changes. The intensity of the colour and the
    height of the bar below a token show its attention weight, as the square root of its ratio to the largest
    weight. The tooltip of a token holds the exact weight.

    Args:
        view: what to draw.
        layer: the model's layer number; by default the last layer of the view.
        head: the head; by default the one that attends most to user tokens.
        query: index into `view.query_positions`.

    Raises:
        InputError: the view does not have this layer, head or query.
    """
    layer = view.layers[-1] if layer is None else layer
    if layer not in view.layers:
        raise InputError(f"layer {layer} is not among the layers of this view ({_listed(view.layers)}).")
    row = view.layers.index(layer)
    n_queries = len(view.query_positions)
    if not -n_queries <= query < n_queries:
        raise InputError(f"query {query} is out of range; the view has {n_queries}.")
    patterns = view.pattern[row, :, query]
    if head is None:
        head = int(patterns[:, view.token_roles == Role.USER].sum(-1).argmax())
    if not 0 <= head < len(patterns):
        raise InputError(f"head {head} is out of range; the view has {len(patterns)}.")
    weights = np.asarray(patterns[head], dtype=float)
    shown = np.sqrt(weights / max(float(weights.max()), 1e-9))
    position = view.query_positions[query]
    markup = token_markup(view, position, weights, shown)
    title = escape(f"Layer {layer}, head {head}, attention from token {position}")
    return HtmlView(f'<p class="token-title">{title}</p>{markup}', TOKEN_CSS)


def token_markup(
    view: TokenView, query_position: int, weights: np.ndarray | None = None, shown: np.ndarray | None = None
) -> Markup:
    """The tokens as spans; without weights, a script sets the intensities later."""
    pieces = ['<div class="tokens" dir="auto">']
    before = None
    for i, (text, value) in enumerate(zip(view.tokens, view.token_roles, strict=True)):
        role = ROLE_LABELS[int(value)]
        if role != before and role not in ("pad", "template"):
            pieces.append(f'<span class="rolename r-{role}">{role}</span>')
        before = role
        classes = f"tok r-{role}" + (" query" if i == query_position else "")
        style, title = "", f"{role} · token {i}"
        if weights is not None and shown is not None:
            style = f' style="--w:{shown[i]:.3f}"'
            title += f" · attention {weights[i]:.4f}"
        pieces.append(f'<span class="{classes}" title="{title}"{style}>{_visible(text)}</span>')
    return Markup("".join([*pieces, "</div>"]))


def _visible(text: str) -> str:
    """Escaped text in which every line break is shown and breaks the line."""
    if not text:
        return '<span class="nl">∅</span>'
    parts = [str(escape(part)) for part in text.replace("\r", "␍").split("\n")]
    return '<span class="nl">↵</span>\n'.join(parts)


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
