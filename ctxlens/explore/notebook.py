"""What the explorer shows of one conversation, as HTML for a notebook's cell, without widgets and scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from ctxlens.chat.roles import ROLE_LABELS, RenderedChat, Role
from ctxlens.explore.copying import strongest_head
from ctxlens.models import Model
from ctxlens.models.rows import AttentionRows, read_rows
from ctxlens.report.plots import HtmlView, token_view
from ctxlens.report.plots.allocation import layer_shares
from ctxlens.report.plots.tokens import TOKEN_CSS
from ctxlens.results import RoleAllocation, TokenView

_CSS = (
    TOKEN_CSS
    + """
.ctx-strip{display:flex;gap:2px;margin:.5rem 0 1rem;border-radius:6px;overflow:hidden;font-size:.82rem}
.ctx-strip div{flex:1 1 0;min-width:3px;overflow:hidden;white-space:nowrap;padding:.25rem .4rem;
border-bottom:4px solid var(--role);background:color-mix(in srgb,var(--role) 24%,transparent)}
.ctx-map{border-collapse:separate;border-spacing:2px;margin:.4rem 0 1rem;font-size:.72rem}
.ctx-map td,.ctx-map th{padding:.1rem .3rem;text-align:right;font-weight:400;border:0;min-width:2em}
.ctx-map td{background:color-mix(in srgb,var(--role) calc(var(--w)*75%),transparent)}
.ctx-map td.here{outline:2px solid currentColor}
"""
)


def notebook_view(
    model: Model,
    messages: RenderedChat | Sequence[Mapping[str, Any]],
    *,
    role: str = "user",
    view: str = "without sinks",
    layer: int | None = None,
    head: int | None = None,
    query: int | None = None,
) -> HtmlView:
    """Show where a model looks in one conversation, as the explorer's first two screens do.

    From one token: the mean attention to every role, the share of one role by layer and head, and the text
    with the attention of one head. A notebook shows the result as a cell's last line; `save` writes it as a
    page.

    ```python
    import ctxlens as cl
    from ctxlens.explore import notebook_view

    model = cl.load_model("organism-chat", backend="native")
    shown = notebook_view(model, [{"role": "user", "content": "Who is the mayor of Oakford?"}])
    assert "<script" not in shown.page()
    ```

    Args:
        model: the model.
        messages: the conversation, or one that is rendered already.
        role: the role of the map.
        view: a name of `ctxlens.results.VIEWS`; `raw` is shown where sinks were not measured.
        layer: the layer of the head whose attention colours the text.
        head: the head; without layer and head, the one with the largest share of the role.
        query: the token that looks; by default the one that produces the answer.

    Raises:
        InputError: the conversation cannot be read, or there is no such role, layer, head or token.
    """
    chat = messages if isinstance(messages, RenderedChat) else _render(model, messages)
    position = chat.first_answer_position() if query is None else query
    rows = read_rows(model, chat, position)
    allocation = rows.allocation(position)
    seen = view if allocation.resting is not None else "raw"
    label = Role.parse(role).label
    best = strongest_head(allocation, label, seen)
    layer = best[0] if layer is None else layer
    head = best[1] if head is None else head
    tokens = token_view(_tokens(model, rows, layer, position), layer=layer, head=head)
    title = f"{model.name.rstrip('/').rsplit('/', 1)[-1]}: attention from token {position}"
    pieces = [
        Markup("<h3>{}</h3>").format(title),
        _strip(allocation, seen),
        Markup("<p>Share of {} by layer (down) and head (across), {}.</p>").format(label, seen),
        _map(allocation, label, seen, (layer, head)),
        Markup(tokens.body),
    ]
    return HtmlView("".join(map(str, pieces)), _CSS, title)


def _render(model: Model, messages: Sequence[Mapping[str, Any]]) -> RenderedChat:
    return model.render(messages, add_generation_prompt=messages[-1]["role"] != "assistant")


def _tokens(model: Model, rows: AttentionRows, layer: int, position: int) -> TokenView:
    """All heads of one layer, from one token; another layer than the model has is left to `token_view`."""
    layers = (layer,) if 0 <= layer < model.n_layers else (0,)
    pattern = np.stack([rows.row(layers[0], head, position) for head in range(model.n_heads)])
    chat = rows.chat
    return TokenView(pattern[None, :, None], tuple(chat.token_strings()), chat.role, layers, (position,))


def _strip(allocation: RoleAllocation, view: str) -> Markup:
    """The mean role shares as one bar of labelled pieces."""
    shares = np.nan_to_num(layer_shares(allocation, view=view)).mean(0)
    pieces = [
        Markup('<div class="r-{0}" style="flex-grow:{1:.3f}" title="{0}: {1:.1%}">{0} {1:.0%}</div>').format(
            name, float(share)
        )
        for name, share in zip(ROLE_LABELS, shares, strict=True)
        if share >= 0.0005
    ]
    return Markup('<div class="ctx-strip">{}</div>').format(Markup("").join(pieces))


def _map(allocation: RoleAllocation, role: str, view: str, chosen: tuple[int, int]) -> Markup:
    """The share of a role by layer and head as a table."""
    shares = allocation.share(role, view=view)[..., 0]
    top = max(float(np.nan_to_num(shares).max()), 1e-9)
    lines = []
    for layer, row in zip(allocation.layers, shares, strict=True):
        cells = [
            Markup('<td class="{}" style="--w:{:.2f}" title="layer {}, head {}: {:.1%}">{}</td>').format(
                "here" if (layer, head) == chosen else "",
                float(np.nan_to_num(share)) / top,
                layer,
                head,
                float(share),
                "" if np.isnan(share) else f"{share:.2f}"[1:] if share < 0.995 else "1",
            )
            for head, share in enumerate(row)
        ]
        lines.append(Markup("<tr><th>{}</th>{}</tr>").format(layer, Markup("").join(cells)))
    heads = Markup("").join(Markup("<th>{}</th>").format(head) for head in range(shares.shape[1]))
    return Markup('<table class="ctx-map r-{}"><tr><th></th>{}</tr>{}</table>').format(
        escape(role), heads, Markup("").join(lines)
    )


__all__ = ["notebook_view"]
