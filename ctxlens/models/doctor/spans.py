"""Are role spans exact for this tokenizer and template? Probe conversations, rendered and read back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ctxlens.chat.roles import RenderedChat, Role, render, render_plain
from ctxlens.errors import InputError
from ctxlens.models.doctor.findings import Finding

Messages = Sequence[Mapping[str, Any]]

TURNS: Messages = (
    {"role": "user", "content": "Name the capital of the country that lies west of the great river."},
    {"role": "assistant", "content": "It is the old town by the sea."},
    {"role": "user", "content": "Which of its towers is taller, and who built it?"},
    {"role": "assistant", "content": "The northern one, built by two brothers."},
)
_TOOL = {
    "type": "function",
    "function": {
        "name": "measure_tower",
        "description": "Height of a tower.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
}
_CALL = {"type": "function", "function": {"name": "measure_tower", "arguments": {"name": "northern"}}}
_WITH_TOOL: Messages = (
    {"role": "user", "content": "How tall is the northern tower?"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "name": "measure_tower", "content": "seventy two metres"},
    {"role": "assistant", "content": "It is seventy two metres tall."},
)
_SAYS = {"user": Role.USER, "assistant": Role.ASSISTANT, "system": Role.SYSTEM, "tool": Role.TOOL}


def check_roles(tokenizer: Any, conversations: Sequence[Messages] = ()) -> Iterator[Finding]:
    """Render probe conversations, and the user's own, and check the position of every message's tokens.

    It is not a fault if a template refuses a kind of conversation, because ctxlens then refuses it too. But
    if plain turns are refused, or a label is wrong, no other result can be trusted.
    """
    if not tokenizer.chat_template:
        yield Finding("roles", "chat template", "skipped", "The tokenizer has no chat template.")
    else:
        imitation = None
        for check, messages, options in _probes():
            finding, chat = _probe(tokenizer, check, messages, **options)
            yield finding
            imitation = chat.text.strip() if check == "turns" and chat else imitation
        if imitation:
            messages = ({"role": "user", "content": imitation},)
            yield _probe(tokenizer, "imitated markers", messages, add_generation_prompt=True)[0]
    yield _probe(tokenizer, "without template", TURNS, plain=True)[0]
    for number, messages in enumerate(conversations):
        open_ended = messages[-1]["role"] != "assistant"
        check = f"conversation {number}"
        yield _probe(tokenizer, check, messages, required=True, add_generation_prompt=open_ended)[0]


def _probes() -> Iterator[tuple[str, Messages, dict[str, Any]]]:
    yield "turns", TURNS, {"required": True}
    yield "generation prompt", TURNS[:3], {"required": True, "add_generation_prompt": True}
    system = {"role": "system", "content": "You are a guide to old towers."}
    yield "system message", (system, *TURNS[:3]), {"add_generation_prompt": True}
    spaced = {"role": "user", "content": "  What is on top?\n\n\tA flag, or a 🙂 — naïvely?  \n"}
    yield "white space and signs", (spaced,), {"add_generation_prompt": True}
    yield "response prefix", TURNS, {"continue_final_message": True}
    yield "tools", _WITH_TOOL, {"tools": [_TOOL]}


def _probe(
    tokenizer: Any,
    check: str,
    messages: Messages,
    *,
    required: bool = False,
    plain: bool = False,
    **options: Any,
) -> tuple[Finding, RenderedChat | None]:
    try:
        chat = (render_plain if plain else render)(tokenizer, messages, **options)
    except InputError as error:
        return Finding("roles", check, "fail" if required else "skipped", f"Refused: {error}"), None
    problem = None if plain else _differs_from_template(tokenizer, chat, options)
    problem = problem or _mislabelled(chat)
    if problem:
        return Finding("roles", check, "fail", problem), chat
    said = sum(bool(message.get("content")) for message in messages)
    shared = _shared_tokens(chat)
    note = f", {shared} of them with template text in the same token" if shared else ""
    plural = "s" if said != 1 else ""
    text = f"{chat.n_tokens} tokens; {said} message{plural} found exactly{note}."
    return Finding("roles", check, "pass", text), chat


def _differs_from_template(tokenizer: Any, chat: RenderedChat, options: Mapping[str, Any]) -> str | None:
    """One sentence if the tokens are not those that transformers itself produces, else None."""
    made = tokenizer.apply_chat_template(
        [dict(message) for message in chat.messages], tokenize=True, return_dict=True, **options
    )["input_ids"]
    if chat.tokens.tolist() == list(made):
        return None
    return (
        f"The {chat.n_tokens} tokens are not the {len(made)} that apply_chat_template(tokenize=True) returns."
    )


def _mislabelled(chat: RenderedChat) -> str | None:
    """One sentence on the first message whose tokens have another role or another text, or None."""
    for turn, message in enumerate(chat.messages):
        said = _squeeze(message.get("content") or "")
        positions = (chat.turn == turn).nonzero()[0]
        if turn in chat.left_out_turns() or not said:
            continue
        name = f"message {turn} ({message['role']})"
        if not (chat.role[positions] == _SAYS[message["role"]]).all():
            return f"Tokens of {name} carry another role."
        covered = _covered(chat, turn)
        if said not in covered:
            return f"The tokens of {name} do not cover its content: {covered[:60]!r}."
        if len(covered) > len(said) + _SLACK:
            return f"The tokens of {name} reach beyond its content: {covered[:60]!r}."
    return None


_SLACK = 8
"""How many template characters may share a token with a message's content, on both sides together."""


def _shared_tokens(chat: RenderedChat) -> int:
    """How many messages have a token that also holds template text."""
    said = {turn: _squeeze(message.get("content") or "") for turn, message in enumerate(chat.messages)}
    return sum(len(_covered(chat, turn)) > len(text) > 0 for turn, text in said.items())


def _covered(chat: RenderedChat, turn: int) -> str:
    """The characters of a message's tokens, from the first to the last, without white space."""
    spans = chat.spans[chat.turn == turn]
    return _squeeze(chat.text[spans[:, 0].min() : spans[:, 1].max()]) if len(spans) else ""


def _squeeze(text: str) -> str:
    return "".join(text.split())


__all__ = ["TURNS", "check_roles"]
