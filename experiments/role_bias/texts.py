"""The texts of the measurement on pretrained models, and the ways in which each is put to the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ctxlens.chat.condition import Condition
from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.errors import InputError
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.contexts import count_tokens
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.prompts import render_cell
from ctxlens.models.model import Model

NEEDLES = ("sf", "pizza-short")
PREFIXED = Condition.parse("plain+prefix")
DEPTHS = (50.0, 10.0, 90.0)
SPARE = 1.05
CHAT_TOKENS = (60, 600)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML without a system prompt of its own."""

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Text:
    """A conversation whose answer is about to be written.

    Attributes:
        name: where it comes from; the unit of the bootstrap.
        messages: the conversation.
        begun: whether the last message is the assistant's and begins the answer.
    """

    name: str
    messages: Messages
    begun: bool


def essays(model: Model, folder: Path, tokens: int, count: int) -> Iterator[Text]:
    """Beginnings of essays that hide a needle, each with the needle's question and the answer's first words.

    Needles and depths take turns. Essays that are shorter are left out.

    Raises:
        InputError: the folder holds no essay of that length.
    """
    found = 0
    for file in sorted(folder.glob("*.txt")):
        if file.name.lower().startswith(("license", "licence", "readme")) or found == count:
            continue
        text = " ".join(file.read_text(encoding="utf-8").split())
        if count_tokens(model.tokenizer, text) < SPARE * tokens:
            continue
        config = NeedleConfig(
            lengths=(tokens,),
            depths=(DEPTHS[found % len(DEPTHS)],),
            needles=(NEEDLES[found % len(NEEDLES)],),
            conditions=(PREFIXED,),
            cases_per_cell=1,
            max_new_tokens=8,
        )
        [cell] = build_cells(model, config, load_haystack(file))
        found += 1
        yield Text(file.stem, list(render_cell(model, cell, config, PREFIXED).messages), True)
    if not found:
        raise InputError(f"{folder} holds no .txt file of {tokens} tokens or more.")


def chats(model: Model, file: Path, count: int) -> Iterator[Text]:
    """Conversations with an earlier answer, up to their last question, of `CHAT_TOKENS` tokens.

    Raises:
        InputError: the file holds none.
    """
    found = 0
    for number, row in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        messages = [{"role": one["role"], "content": one["content"]} for one in row["messages"]]
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        answered = any(message["role"] == "assistant" for message in messages)
        least, most = CHAT_TOKENS
        if answered and found < count and least <= model.render_plain(messages).n_tokens <= most:
            found += 1
            yield Text(f"row {number}", messages, False)
    if not found:
        raise InputError(f"{file} holds no conversation of that length with an earlier answer.")


def conditions(model: Model) -> dict[str, Callable[[Text], RenderedChat]]:
    """How a text is put to the model: with and without template, with and without the same first token."""
    bos = model.tokenizer.bos_token

    def ask(plain: bool = False, **options: Any) -> Callable[[Text], RenderedChat]:
        def rendered(text: Text) -> RenderedChat:
            render = model.render_plain if plain else model.render
            ending = {"add_generation_prompt": not text.begun, "continue_final_message": text.begun}
            return count_first_as_bos(model, render(text.messages, **ending, **options))

        return rendered

    found = {"plain": ask(plain=True, bos=False), "plain, first token": ask(plain=True, bos=True)}
    if model.tokenizer.chat_template:
        return {**found, "template": ask(), "template, no system prompt": ask(chat_template=CHATML)}
    with_bos = ask(chat_template=f"{bos}{CHATML}")
    return {**found, "template": with_bos, "template, no BOS": ask(chat_template=CHATML)}


def count_first_as_bos(model: Model, chat: RenderedChat) -> RenderedChat:
    """The chat with the role `bos` for a BOS token at its start, whether it marks turns or not.

    So one forward pass serves both ways of counting it; taking out `bos` too is the other one.
    """
    if chat.tokens[0] != model.tokenizer.bos_token_id:
        return chat
    role = chat.role.copy()
    role[0] = Role.BOS
    return replace(chat, role=role)


__all__ = ["Text", "chats", "conditions", "count_first_as_bos", "essays"]
