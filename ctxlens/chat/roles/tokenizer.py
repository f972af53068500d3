"""Facts about a tokenizer and its chat template, found by rendering probes and then cached."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from ctxlens.chat.roles.locate import locate_fields, said_fields
from ctxlens.errors import RenderError


def template_text(tokenizer: Any, chat_template: str | None, tools: list[Any] | None) -> str:
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise RenderError(
            f"The tokenizer {type(tokenizer).__name__} has no chat template; give one with chat_template= "
            "(--chat-template FILE)."
        )
    try:
        return tokenizer.get_chat_template(chat_template, tools)
    except ValueError as error:
        raise RenderError(str(error)) from error


def apply_template(tokenizer: Any, conversation: list[dict[str, Any]], **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(conversation, tokenize=False, **options)
    except Exception as error:  # templates are code, and may raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RenderError(f"The chat template refuses this conversation: {reason}") from error


_known: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _remembered(tokenizer: Any, key: Any, compute: Callable[[], Any]) -> Any:
    """A fact about a tokenizer, computed again only when its vocabulary has grown."""
    facts = _known.setdefault(tokenizer, {})
    key = (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, key)
    if key not in facts:
        facts[key] = compute()
    return facts[key]


def special_ids(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the special tokens, and of all tokens added to the vocabulary (including special ones)."""

    def compute() -> tuple[np.ndarray, np.ndarray]:
        added = tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        return np.asarray(sorted(special), dtype=np.int64), np.asarray(
            sorted(special | set(added)), dtype=np.int64
        )

    return _remembered(tokenizer, "special", compute)


def turn_ends(tokenizer: Any, template: str) -> frozenset[int]:
    """Tokens that end a turn: the first added token after the last content of conversations ending there."""

    def compute() -> frozenset[int]:
        _, added = special_ids(tokenizer)
        user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        ends: set[int] = set()
        for probe in ([user], [user, assistant]):

            def to_text(conversation: list[dict[str, Any]]) -> str:
                return apply_template(tokenizer, conversation, chat_template=template)

            try:
                text, places = locate_fields(to_text, probe, said_fields(probe), template)
            except RenderError:
                continue
            tail = text[places[-1].end :] if places else ""
            ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
            ends.update(next(([i] for i in ids if i in added), []))
        return frozenset(ends)

    return _remembered(tokenizer, ("ends", template), compute)


def generation_prompt(tokenizer: Any, template: str) -> str:
    """The text that the template appends for a model to continue; empty if it changes anything else."""

    def compute() -> str:
        user = [{"role": "user", "content": "a"}]
        try:
            closed = apply_template(tokenizer, user, chat_template=template)
            opened = apply_template(tokenizer, user, chat_template=template, add_generation_prompt=True)
        except RenderError:
            return ""
        return opened.removeprefix(closed) if opened.startswith(closed) else ""

    return _remembered(tokenizer, ("prompt", template), compute)


def begins_with_bos(tokenizer: Any, chat_template: str | None) -> bool:
    """Return whether the template, or the tokenizer by itself, starts a sequence with the BOS token."""

    def compute() -> bool:
        if tokenizer.bos_token_id is None:
            return False
        if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
            return True
        try:
            template = template_text(tokenizer, chat_template, None)
            text = apply_template(tokenizer, [{"role": "user", "content": "a"}], chat_template=template)
        except RenderError:
            return False
        return text.startswith(tokenizer.bos_token)

    return _remembered(
        tokenizer, ("bos", chat_template or str(getattr(tokenizer, "chat_template", None))), compute
    )
