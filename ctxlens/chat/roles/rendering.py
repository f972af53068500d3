"""Messages to labelled tokens, with the chat template and without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctxlens.chat.roles.chat import INDICATOR_KEY, MESSAGE_ROLES, Message, RenderedChat, Role, check_messages
from ctxlens.chat.roles.locate import Place, locate_fields, said_fields
from ctxlens.chat.roles.spans import encode_with_spans, label_tokens
from ctxlens.chat.roles.tokenizer import (
    apply_template,
    begins_with_bos,
    generation_prompt,
    special_ids,
    template_text,
    turn_ends,
)
from ctxlens.chat.roles.truncation import check_side, fit_to_window
from ctxlens.errors import InputError, RenderError


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    tools: list[Any] | None = None,
    indicator: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    truncate: bool = False,
    truncation: str = "left",
) -> RenderedChat:
    """Render a conversation with the chat template and label every token.

    Args:
        tokenizer: A transformers tokenizer.
        messages: Mappings with ``role`` (one of `MESSAGE_ROLES`) and text ``content``.
        chat_template: The template's Jinja text, or the name of one of the tokenizer's; its own by default.
        add_generation_prompt: End with the template's opening of an assistant turn.
        continue_final_message: Leave the final assistant message open, as a response prefix.
        tools: Tool schemas, passed on to the template.
        indicator: The indicator, such as ``"[IND]"``. It is appended, after one space, to the user
            messages that carry ``{"indicator": True}``; a message that carries a text there, such as
            ``{"indicator": "[MEM]"}``, gets that text instead. Those tokens get the role ``indicator``; the
            same characters written by anybody else stay theirs. With None no mark is shown.
        system: A system message put first where the conversation has none; turns then count from it.
        max_tokens: The window. A longer conversation is refused, or cut if `truncate`.
        truncate: Cut a conversation that is too long: the context, never the template's tokens; a final
            response only at its end, and only as far as it needs over half of the room.
        truncation: Where the context is cut. ``"left"``: its earliest tokens first. ``"right"``: the
            latest before the final user message first, so that the question stays whole. ``"middle"``:
            one stretch, so that as much is kept at the start as at the end.

    Returns:
        Tokens equal to ``tokenizer.apply_chat_template(..., tokenize=True)``, labelled; after truncation
        a subsequence of them.

    Raises:
        InputError: The messages are malformed, or too long.
        RenderError: The template refuses the conversation, there is none, or a text cannot be located.
    """
    check_messages(messages)
    check_side(truncation)
    messages = _with_system(messages, system)
    _check_ending(messages, add_generation_prompt, continue_final_message)
    template = template_text(tokenizer, chat_template, tools)
    spoken, marked = _with_indicator(messages, indicator)

    def to_text(conversation: list[dict[str, Any]]) -> str:
        return apply_template(
            tokenizer,
            conversation,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
        )

    fields = said_fields(spoken)
    text, places = locate_fields(to_text, spoken, fields, template)
    located = {(fields[place.field].turn, fields[place.field].path) for place in places}
    for turn, message in enumerate(spoken):
        if message["role"] == "user" and message["content"].strip() and (turn, ("content",)) not in located:
            raise RenderError(
                f"The chat template leaves out the content of message {turn} (user); it may expect content "
                "in parts, as templates for images do, which ctxlens does not render."
            )
    tokens, spans = encode_with_spans(tokenizer, text)
    chat = _label(
        tokenizer,
        messages,
        text,
        tokens,
        spans,
        [Place(start, end, fields[number].turn) for start, end, number in places],
        marked,
        template=template,
        open_ended=add_generation_prompt or continue_final_message,
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
    """Render the same conversation without chat template: contents joined by a separator, as in the paper.

    Args:
        tokenizer: A transformers tokenizer.
        messages: As in `render`. Contents only: reasoning and tool calls are left out.
        separator: Text between contents (role ``template``).
        add_generation_prompt: End with the separator, where an answer would follow.
        continue_final_message: The final assistant message is a response prefix to go on from.
        bos: Begin with the tokenizer's BOS token; ``None``: where the rendering with the template, or
            the tokenizer by itself, puts one.
        chat_template: The template that `bos` is decided by; the tokenizer's own by default.
        indicator: As in `render`.
        system: As in `render`.
        max_tokens: As in `render`.
        truncate: As in `render`.
        truncation: As in `render`.

    Returns:
        The BOS token if any, then the contents as the tokenizer encodes them, labelled as in `render`.

    Raises:
        InputError: The messages are malformed, or too long, or `bos` is asked of a tokenizer without one.
        RenderError: The tokenizer cannot be followed exactly.
    """
    check_messages(messages)
    check_side(truncation)
    messages = _with_system(messages, system)
    _check_ending(messages, add_generation_prompt, continue_final_message)
    spoken, marked = _with_indicator(messages, indicator)
    if bos is None:
        bos = begins_with_bos(tokenizer, chat_template)
    elif bos and tokenizer.bos_token_id is None:
        raise InputError(f"bos=True, but the tokenizer {type(tokenizer).__name__} has no BOS token.")
    parts: list[str] = []
    places: list[Place] = []
    at = 0
    for turn, message in enumerate(spoken):
        if turn:
            parts.append(separator)
            at += len(separator)
        content = message.get("content") or ""
        parts.append(content)
        places.append(Place(at, at + len(content), turn))
        at += len(content)
    text = "".join(parts) + (separator if add_generation_prompt else "")
    tokens, spans = encode_with_spans(tokenizer, text)
    if bos:
        shift = len(tokenizer.bos_token)
        text = tokenizer.bos_token + text
        tokens = np.concatenate([[tokenizer.bos_token_id], tokens]).astype(np.int64)
        spans = np.concatenate([[[0, shift]], spans + shift]).astype(np.int32)
        places = [Place(start + shift, end + shift, turn) for start, end, turn in places]
    chat = _label(
        tokenizer,
        messages,
        text,
        tokens,
        spans,
        places,
        marked,
        template=None,
        open_ended=add_generation_prompt or continue_final_message,
    )
    return fit_to_window(chat, max_tokens, truncate, truncation)


def _check_ending(
    messages: Sequence[Message], add_generation_prompt: bool, continue_final_message: bool
) -> None:
    if add_generation_prompt and continue_final_message:
        raise InputError("Give either add_generation_prompt or continue_final_message, not both.")
    if continue_final_message and messages[-1]["role"] != "assistant":
        raise InputError(
            "continue_final_message needs a final assistant message to go on from, but the last message is "
            f"of role {messages[-1]['role']}."
        )


def _with_system(messages: Sequence[Message], system: str | None) -> Sequence[Message]:
    if system is None or any(MESSAGE_ROLES[message["role"]] == Role.SYSTEM for message in messages):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _with_indicator(
    messages: Sequence[Message], indicator: str | None
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The messages as the template gets them, and what was appended to which."""
    spoken: list[dict[str, Any]] = []
    marked: dict[int, str] = {}
    for turn, message in enumerate(messages):
        plain = {key: value for key, value in message.items() if key != INDICATOR_KEY}
        mark = message.get(INDICATOR_KEY)
        if mark and message["role"] != "user":
            raise InputError(
                f"Message {turn} ({message['role']}) carries the indicator; only user messages may."
            )
        if mark and indicator:
            marked[turn] = f" {mark if isinstance(mark, str) else indicator}"
            plain["content"] += marked[turn]
        spoken.append(plain)
    return spoken, marked


def _label(
    tokenizer: Any,
    messages: Sequence[Message],
    text: str,
    tokens: np.ndarray,
    spans: np.ndarray,
    places: Sequence[Place],
    marked: Mapping[int, str],
    *,
    template: str | None,
    open_ended: bool,
) -> RenderedChat:
    """Put role and turn on tokens; `places` are characters per turn, in order."""
    n_turns = len(messages)
    bounds, owners = [0], [-1]
    indicated: set[int] = set()
    for start, end, turn in places:
        split = end
        for appended in (marked.get(turn, ""), marked.get(turn, "").lstrip()):
            if appended and turn not in indicated and text.endswith(appended, start, end):
                split = end - len(appended)
                indicated.add(turn)
        for begin, stop, owner in ((start, split, turn), (split, end, n_turns + turn)):
            if begin < stop:
                bounds += [begin, stop]
                owners += [owner, -1]
    for turn in marked.keys() - indicated:
        raise RenderError(
            f"The chat template changes the indicator {marked[turn].strip()!r} that ends the user's message."
        )
    owner = label_tokens(text, spans, np.asarray(bounds), np.asarray(owners))
    role_of = [MESSAGE_ROLES[message["role"]] for message in messages] + [Role.INDICATOR] * n_turns
    role = np.asarray([*role_of, Role.TEMPLATE], dtype=np.int8)[owner]
    turn = np.where(owner < 0, -1, owner % n_turns).astype(np.int32)
    position = 0
    while position < len(tokens) and owner[position] < 0 and tokens[position] == tokenizer.bos_token_id:
        role[position] = Role.BOS
        position += 1
    special, added = special_ids(tokenizer)
    typed = tokens[(turn >= 0) & (role != Role.INDICATOR) & np.isin(tokens, special)]
    stops: dict[int, int] = {}
    openings: dict[int, int] = {}
    if template is not None:
        stops = _find_stops(tokens, turn, messages, added, turn_ends(tokenizer, template))
        openings = _find_openings(text, spans, places, messages, generation_prompt(tokenizer, template))
    return RenderedChat(
        text=text,
        tokens=tokens,
        role=role,
        turn=turn,
        spans=spans,
        messages=tuple(messages),
        templated=template is not None,
        stops=stops,
        openings=openings,
        spoofed_special_tokens=tuple(tokenizer.convert_ids_to_tokens(list(dict.fromkeys(typed.tolist())))),
        open_ended=open_ended,
    )


def _find_stops(
    tokens: np.ndarray, turn: np.ndarray, messages: Sequence[Message], added: np.ndarray, ends: frozenset[int]
) -> dict[int, int]:
    """After each turn, the first added token before the next content, where it is one that ends turns.

    The syntax of tool calls may hold added tokens of its own, so there the first that ends turns counts.
    """
    stops: dict[int, int] = {}
    if not ends:
        return stops
    said = np.flatnonzero(turn >= 0)
    following = np.append(said[1:], len(tokens))
    marks = np.flatnonzero((turn < 0) & np.isin(tokens, added))
    for gap in np.flatnonzero(following > said + 1).tolist():
        owner = int(turn[said[gap]])
        between = marks[np.searchsorted(marks, said[gap]) : np.searchsorted(marks, following[gap])]
        if not messages[owner].get("tool_calls"):
            between = between[:1]
        stop = next((int(at) for at in between if int(tokens[at]) in ends), None)
        if stop is not None:
            stops[owner] = stop
    return stops


def _find_openings(
    text: str,
    spans: np.ndarray,
    places: Sequence[Place],
    messages: Sequence[Message],
    prompt: str,
) -> dict[int, int]:
    """For assistant turns, the first token after the generation prompt, where template text follows it.

    The prompt is looked for only in the template's own text before what the turn says.
    """
    openings: dict[int, int] = {}
    if not prompt:
        return openings
    starts = np.maximum.accumulate(spans[:, 0])
    ended, seen = 0, set()
    for start, end, turn in places:
        if messages[turn]["role"] == "assistant" and turn not in seen:
            at = text.rfind(prompt, ended, start)
            if at >= 0 and at + len(prompt) < start:
                openings[turn] = int(np.searchsorted(starts, at + len(prompt)))
        seen.add(turn)
        ended = end
    return openings
