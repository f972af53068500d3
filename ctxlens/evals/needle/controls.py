"""A question with and without the template, and the controls that separate the template from its length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ctxlens.chat.condition import Condition
from ctxlens.chat.roles import RenderedChat, Role

NEUTRAL = (
    "The morning was quiet, and the street lay empty. A cart stood by the wall, and somebody had left a lamp "
    "on the step. Later the wind turned, the clouds moved slowly over the roofs, and the shutters were "
    "opened one after another. Nobody was in a hurry. A door closed, a bucket was filled at the pump, and "
    "the light crept along the pavement until it reached the old bench under the trees. In the afternoon it "
    "grew warmer, and the windows stayed open until the evening. Then the street was empty again, and it was "
    "quiet.\n"
)
"""What stands in place of the template's tokens under the control `matched`."""


@runtime_checkable
class Renderer(Protocol):
    """What building cells needs of a model: its tokenizer, template and window, but no weights."""

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def indicator(self) -> str | None: ...
    @property
    def n_ctx(self) -> int: ...
    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedChat: ...
    def render_plain(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedChat: ...


def render_controlled(
    model: Renderer, messages: Sequence[Mapping[str, Any]], condition: Condition, **options: Any
) -> RenderedChat:
    """Render messages as a condition says: with the template or without, and with its control.

    Args:
        model: the model.
        messages: the messages.
        condition: the condition; its prefix, indicator and steering have no effect here.
        **options: as in `ctxlens.render`.

    Raises:
        InputError: the control `bos` for a tokenizer without BOS token, or a conversation that is too long.
        RenderError: the template refuses the messages, for instance an empty system message.
    """
    if condition.control == "nosystem":
        messages = [{"role": "system", "content": ""}, *messages]
    if condition.template:
        return model.render(messages, **options)
    if condition.control in ("bos", "nobos"):
        return model.render_plain(messages, bos=condition.control == "bos", **options)
    plain = model.render_plain(messages, **options)
    if condition.control != "matched":
        return plain
    extra = model.render(messages, **options).n_tokens - plain.n_tokens
    return put_before(plain, model.tokenizer, max(0, extra))


def put_before(chat: RenderedChat, tokenizer: Any, n_tokens: int) -> RenderedChat:
    """Put the last tokens of neutral text at the start of a chat, after its BOS token if it has one.

    The new tokens have the role `template`.
    """
    if not n_tokens:
        return chat
    once = tokenizer(NEUTRAL, add_special_tokens=False)["input_ids"]
    ids = (once * (n_tokens // len(once) + 1))[-n_tokens:]
    at = int(chat.role[0] == Role.BOS)
    text = tokenizer.decode(ids)
    cut = int(chat.spans[at, 0]) if at < chat.n_tokens else len(chat.text)
    ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(n_tokens)]
    spans = np.stack([[0, *ends[:-1]], ends], axis=1) + cut
    return replace(
        chat,
        text=chat.text[:cut] + text + chat.text[cut:],
        tokens=_insert(chat.tokens, at, ids),
        role=_insert(chat.role, at, [int(Role.TEMPLATE)] * n_tokens),
        turn=_insert(chat.turn, at, [-1] * n_tokens),
        spans=np.concatenate([chat.spans[:at], spans, chat.spans[at:] + len(text)]).astype(chat.spans.dtype),
        stops={turn: position + n_tokens for turn, position in chat.stops.items()},
        openings={turn: position + n_tokens for turn, position in chat.openings.items()},
        emphasised=None if chat.emphasised is None else _insert(chat.emphasised, at, [False] * n_tokens),
    )


def _insert(values: np.ndarray, at: int, new: Sequence[Any]) -> np.ndarray:
    return np.concatenate([values[:at], np.asarray(new, dtype=values.dtype), values[at:]])


__all__ = ["NEUTRAL", "Renderer", "put_before", "render_controlled"]
