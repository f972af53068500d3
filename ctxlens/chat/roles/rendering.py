"""Render messages to labelled tokens, with the chat template or without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ctxlens.chat.roles.chat import (
    INDICATOR_KEY,
    MESSAGE_ROLES,
    TOOLS_KEY,
    Message,
    RenderedChat,
    Role,
    content_text,
)
from ctxlens.chat.roles.checks import check_messages, check_unicode
from ctxlens.chat.roles.forms import follow_in_form
from ctxlens.chat.roles.labels import Stretch, find_openings, find_stops, label
from ctxlens.chat.roles.left_out import find_left_out
from ctxlens.chat.roles.locate import Followed, Template
from ctxlens.chat.roles.spans import encode_with_spans
from ctxlens.chat.roles.tokenizer import (
    assistant_headers,
    begins_with_bos,
    bos_marks_turns,
    role_of_bos,
    special_ids,
    template_text,
    turn_ends,
)
from ctxlens.chat.roles.truncation import check_side, fit_to_window
from ctxlens.chat.roles.variables import check_arguments, take_arguments
from ctxlens.errors import InputError, RenderError


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    tools: list[Any] | None = None,
    template_args: Mapping[str, Any] | None = None,
    indicator: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    truncate: bool = False,
    truncation: str = "left",
) -> RenderedChat:
    """Render a conversation with the chat template and label every token.

    Args:
        tokenizer: A transformers tokenizer.
        messages: Mappings with ``role`` (one of `MESSAGE_ROLES`) and ``content``, a text or a list of text
            parts. They are passed to the template as they are wherever it takes them; see
            `ctxlens.chat.roles.forms` for the other forms.
        chat_template: The template's Jinja text, or the name of one of the tokenizer's templates; the
            tokenizer's own template by default.
        add_generation_prompt: Whether to end with the template's opening of an assistant turn.
        continue_final_message: Whether to leave the final assistant message open, as a response prefix.
        tools: Tool schemas for the template; by default those that the first message carries under ``tools``.
        template_args: Values for the template's own variables, such as ``{"enable_thinking": False}``. They
            take precedence over those that a message carries under ``chat_template_kwargs``.
        indicator: The indicator, such as ``"[IND]"``. It is appended, after one space, to the user
            messages that carry ``{"indicator": True}``. A message that carries a text there, such as
            ``{"indicator": "[MEM]"}``, gets that text instead. These tokens get the role ``indicator``; the
            same characters written by anybody else keep their speaker's role. With None no mark is shown.
        system: A system message to put first if the conversation has none; turns then count from it.
        max_tokens: The window. A longer conversation is refused, or truncated if `truncate` is set.
        truncate: Whether to truncate a conversation that is too long. Only the context is cut, never the
            template's tokens. A final response is cut only at its end, and only if it takes more than half
            of the room.
        truncation: Where the context is cut. ``"left"`` cuts its earliest tokens first. ``"right"`` cuts the
            latest tokens before the final user message first, so that the question stays whole.
            ``"middle"`` cuts one stretch, so that as much is kept at the start as at the end.

    Returns:
        Tokens equal to ``tokenizer.apply_chat_template(..., tokenize=True)``, with labels; after truncation
        a subsequence of them. A template that prints the present date gets the same date in the whole run
        (`ctxlens.chat.roles.locate.date_of_run`).

    Raises:
        InputError: The messages are malformed or too long, or the template has no such variable.
        RenderError: The template refuses the conversation, there is no template, or it changes a text so
            that it cannot be followed.
    """
    check_messages(messages)
    messages, given = take_arguments(messages)
    tools, messages = _take_tools(messages, tools)
    messages, marks = _prepared(messages, system, indicator, add_generation_prompt, continue_final_message)
    check_side(truncation)
    options = {
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
    }
    source = template_text(tokenizer, chat_template, tools)
    arguments = check_arguments(source, {**given, **(template_args or {})})
    template = Template(tokenizer, source, options, arguments)
    followed = follow_in_form(template, messages, marks)
    _check_shown(followed, messages, marks)
    said = [Stretch(start, end, field.turn, field.is_indicator) for start, end, field in followed.places]
    tokens, spans = encode_with_spans(tokenizer, followed.text)
    first = Role.TEMPLATE if bos_marks_turns(template) else Role.BOS
    chat = label(tokenizer, _with_texts(messages), followed.text, tokens, spans, said, bos=first)
    chat = replace(
        chat,
        templated=True,
        stops=find_stops(chat, special_ids(tokenizer)[1], turn_ends(template)),
        openings=find_openings(chat, said, assistant_headers(template)),
        open_ended=add_generation_prompt or continue_final_message,
        template_args=dict(arguments),
        left_out=find_left_out(template, followed, messages),
    )
    return fit_to_window(chat, max_tokens, truncate, truncation)


def render_plain(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    separator: str = "\n",
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    bos: bool | None = None,
    chat_template: str | None = None,
    indicator: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    truncate: bool = False,
    truncation: str = "left",
) -> RenderedChat:
    """Render the same conversation without a chat template: contents joined by a separator, as in the paper.

    Args:
        tokenizer: A transformers tokenizer.
        messages: As in `render`. Only contents are rendered; reasoning and tool calls are left out.
        separator: Text between contents (role ``template``).
        add_generation_prompt: Whether to end with the separator, where an answer would follow.
        continue_final_message: Whether the final assistant message is a response prefix to continue.
        bos: Whether to begin with the tokenizer's BOS token. With None, it begins with one if the tokenizer
            adds one by itself, or if the rendering with the template begins with one that does not also mark
            every turn, as ``<|im_start|>`` does. A BOS token that marks turns has the role ``template``.
        chat_template: The template that decides about `bos` if that is None; the tokenizer's own by default.
        indicator: As in `render`.
        system: As in `render`.
        max_tokens: As in `render`.
        truncate: As in `render`.
        truncation: As in `render`.

    Returns:
        The BOS token if there is one, then the contents as the tokenizer encodes them, with labels.

    Raises:
        InputError: The messages are malformed or too long, or `bos` is set without such a token.
        RenderError: The tokenizer cannot be followed exactly.
    """
    check_messages(messages)
    messages, _ = take_arguments(messages)
    messages, marks = _prepared(messages, system, indicator, add_generation_prompt, continue_final_message)
    messages = _with_texts(messages)
    check_side(truncation)
    if bos is None:
        bos = begins_with_bos(tokenizer, chat_template)
    elif bos and tokenizer.bos_token_id is None:
        raise InputError(f"bos=True, but the tokenizer {type(tokenizer).__name__} has no BOS token.")
    text, said = _joined_contents(messages, marks, separator)
    text += separator if add_generation_prompt else ""
    tokens, spans = encode_with_spans(tokenizer, text)
    if bos:
        shift = len(tokenizer.bos_token)
        text = tokenizer.bos_token + text
        tokens = np.concatenate([[tokenizer.bos_token_id], tokens]).astype(np.int64)
        spans = np.concatenate([[[0, shift]], spans + shift]).astype(np.int32)
        said = [each._replace(start=each.start + shift, end=each.end + shift) for each in said]
    first = role_of_bos(tokenizer, chat_template)
    chat = label(tokenizer, messages, text, tokens, spans, said, bos=first)
    chat = replace(chat, open_ended=add_generation_prompt or continue_final_message)
    return fit_to_window(chat, max_tokens, truncate, truncation)


def _joined_contents(
    messages: Sequence[Message], marks: Mapping[int, str], separator: str
) -> tuple[str, list[Stretch]]:
    """The contents with a separator between two of them, and where they are."""
    parts: list[str] = []
    said: list[Stretch] = []
    at = 0
    for turn, message in enumerate(messages):
        content, mark = message.get("content") or "", marks.get(turn, "")
        at += len(separator) if turn else 0
        said.append(Stretch(at, at + len(content), turn))
        said.append(Stretch(at + len(content), at + len(content) + len(mark), turn, is_indicator=True))
        parts.append(content + mark)
        at += len(parts[-1])
    return separator.join(parts), said


def _take_tools(messages: Any, tools: list[Any] | None) -> tuple[list[Any] | None, Any]:
    """The tool schemas, given or carried by the first message, and the messages without them."""
    first = messages[0] if isinstance(messages, Sequence) and len(messages) else None
    if isinstance(first, Mapping) and isinstance(first.get(TOOLS_KEY), (list, tuple)):
        rest = {key: value for key, value in first.items() if key != TOOLS_KEY}
        tools, messages = (tools or list(first[TOOLS_KEY])), [rest, *messages[1:]]
    check_unicode({"tools": tools}, "The conversation")
    return tools or None, messages


def _prepared(
    messages: Sequence[Message],
    system: str | None,
    indicator: str | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> tuple[list[Message], dict[int, str]]:
    """The conversation with its system message, and the indicators to append to its messages."""
    if system is not None and not any(MESSAGE_ROLES[m["role"]] == Role.SYSTEM for m in messages):
        messages = [{"role": "system", "content": system}, *messages]
        check_unicode(messages[0], "The system message")
    _check_ending(messages, add_generation_prompt, continue_final_message)
    return list(messages), _indicators(messages, indicator)


def _with_texts(messages: Sequence[Message]) -> list[Message]:
    """The messages with contents in parts as one text."""
    return [
        {**message, "content": content_text(message["content"])}
        if isinstance(message.get("content"), (list, tuple))
        else message
        for message in messages
    ]


def _check_shown(followed: Followed, messages: Sequence[Message], marks: Mapping[int, str]) -> None:
    """Raise `RenderError` if the template drops a user's message or an indicator."""
    shown = {(place.field.turn, place.field.path[0]) for place in followed.places}
    for turn, message in enumerate(messages):
        is_question = message["role"] == "user" and content_text(message["content"]).strip()
        if is_question and (turn, "content") not in shown:
            raise RenderError(
                f"The chat template leaves out the content of message {turn} (user), so the model would not "
                "see it; use another chat template."
            )
    for turn, mark in marks.items():
        if not any(
            place.field.turn == turn and followed.text[place.start : place.end].strip() == mark.strip()
            for place in followed.places
            if place.field.is_indicator
        ):
            raise RenderError(
                f"The chat template changes the indicator {mark.strip()!r} that ends the user's message."
            )


def _check_ending(
    messages: Sequence[Message], add_generation_prompt: bool, continue_final_message: bool
) -> None:
    if add_generation_prompt and continue_final_message:
        raise InputError("Give either add_generation_prompt or continue_final_message, not both.")
    if continue_final_message and MESSAGE_ROLES[messages[-1]["role"]] != Role.ASSISTANT:
        raise InputError(
            "continue_final_message needs a final assistant message to continue, but the last message is "
            f"of role {messages[-1]['role']}."
        )


def _indicators(messages: Sequence[Message], indicator: str | None) -> dict[int, str]:
    """The text to append to each marked message."""
    marks: dict[int, str] = {}
    for turn, message in enumerate(messages):
        mark = message.get(INDICATOR_KEY)
        if mark and message["role"] != "user":
            raise InputError(
                f"Message {turn} ({message['role']}) carries the indicator; only user messages may."
            )
        if mark and indicator:
            marks[turn] = f" {mark if isinstance(mark, str) else indicator}"
    return marks
