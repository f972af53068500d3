"""Facts about a tokenizer and its chat template, found by rendering probes and then cached."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ctxlens.chat.roles.chat import Role
from ctxlens.chat.roles.forms import follow_in_form
from ctxlens.chat.roles.locate import Template
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


_USER, _ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
_CALL = {"id": "abcdef123", "type": "function", "function": {"name": "f", "arguments": {"x": "c"}}}


def turn_ends(template: Template) -> frozenset[int]:
    """Ids of the tokens that end a turn.

    They are the first added token after the last word of a question and of an answer, and the last added
    token after a tool call, whose syntax may hold other added tokens.
    """

    tokenizer = template.tokenizer

    def compute() -> frozenset[int]:
        _, added = special_ids(tokenizer)
        calling = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        probes = ([_USER], 0), ([_USER, _ASSISTANT], 0), ([_USER, calling], -1)
        ends: set[int] = set()
        for messages, which in probes:
            try:
                followed = follow_in_form(replace(template, options={}), messages)
            except RenderError:
                continue
            tail = followed.text[followed.places[-1].end :] if followed.places else ""
            ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
            marks = [i for i in ids if i in added]
            ends.update(marks[which : which + 1 or None])
        return frozenset(ends)

    return _remembered(tokenizer, ("ends", *_identity(template)), compute)


def generation_prompt(template: Template) -> str:
    """The text that the template appends for a model to continue; empty if it changes anything else."""

    def compute() -> str:
        try:
            closed = replace(template, options={}).apply([_USER])
            opened = replace(template, options={"add_generation_prompt": True}).apply([_USER])
        except RenderError:
            return ""
        return opened.removeprefix(closed) if opened.startswith(closed) else ""

    return _remembered(template.tokenizer, ("prompt", *_identity(template)), compute)


def assistant_headers(template: Template) -> tuple[str, ...]:
    """What stands in front of an answer that a model did not write: the generation prompt, or its beginning.

    Some templates end the generation prompt with text that they leave out in front of earlier answers, such
    as an empty think block.
    """

    def compute() -> tuple[str, ...]:
        prompt = generation_prompt(template)
        try:
            followed = replace(template, options={}).follow([_USER, _ASSISTANT, _USER, _ASSISTANT])
        except RenderError:
            return (prompt,) if prompt else ()
        places = [place for place in followed.places if place.field.turn == 1]
        before = followed.text[: places[0].start] if places else ""
        lengths = range(len(prompt), 0, -1)
        header = next((prompt[:n] for n in lengths if before.endswith(prompt[:n])), "")
        return tuple(dict.fromkeys(text for text in (prompt, header) if text.strip()))

    return _remembered(template.tokenizer, ("headers", *_identity(template)), compute)


def _identity(template: Template) -> tuple[str, str]:
    return template.source, repr(sorted(template.arguments.items()))


def begins_with_bos(tokenizer: Any, chat_template: str | None) -> bool:
    """Return whether plain text starts with the BOS token.

    It does if the tokenizer starts it with one by itself, or if the chat template starts with one that does
    not mark its turns (`bos_marks_turns`).
    """

    def compute() -> bool:
        if _adds_bos(tokenizer):
            return True
        template = _template_or_none(tokenizer, chat_template)
        if template is None or bos_marks_turns(template):
            return False
        try:
            return template.apply([_USER]).startswith(tokenizer.bos_token)
        except RenderError:
            return False

    return tokenizer.bos_token_id is not None and _remembered(
        tokenizer, ("bos", chat_template or str(getattr(tokenizer, "chat_template", None))), compute
    )


def role_of_bos(tokenizer: Any, chat_template: str | None = None) -> Role:
    """The role of a BOS token at the start of plain text: `BOS`, or `TEMPLATE` where it marks turns."""
    template = _template_or_none(tokenizer, chat_template)
    return Role.TEMPLATE if template is not None and bos_marks_turns(template) else Role.BOS


def bos_marks_turns(template: Template) -> bool:
    """Return whether the template uses the BOS token as a role marker: it writes one before every turn.

    Some tokenizers call the marker that opens each turn their BOS token, such as ``<|im_start|>``. Then it
    says nothing about the beginning of the text. A token that the tokenizer puts before plain text by itself
    is no marker, nor is one that the template writes only before every question, or that ends turns.
    """
    tokenizer = template.tokenizer

    def compute() -> bool:
        if _adds_bos(tokenizer):
            return False
        try:
            followed = follow_in_form(replace(template, options={}), [_USER, _ASSISTANT] * 2)
        except RenderError:
            return False
        said = [place.field.turn for place in followed.places]
        ends = [0, *(place.end for place in followed.places)]
        starts = [*(place.start for place in followed.places), len(followed.text)]
        *before, after = (
            tokenizer.bos_token in followed.text[end:start] for end, start in zip(ends, starts, strict=True)
        )
        return said == [0, 1, 2, 3] and all(before) and not after

    return tokenizer.bos_token_id is not None and _remembered(
        tokenizer, ("marker", *_identity(template)), compute
    )


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _template_or_none(tokenizer: Any, chat_template: str | None) -> Template | None:
    try:
        return Template(tokenizer, template_text(tokenizer, chat_template, None))
    except RenderError:
        return None
