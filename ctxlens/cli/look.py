"""Verbs that look at a model without changing it: allocate, roles."""

from __future__ import annotations

import enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctxlens.cli import _screen, _tables
from ctxlens.cli._inputs import (
    LimitOption,
    MessagesFile,
    check_queries,
    describe_file,
    read_conversations,
    read_tools,
    render_all,
    render_each,
)
from ctxlens.cli._options import ModelOptions, RenderOptions, RunOptions, verb
from ctxlens.errors import InputError

if TYPE_CHECKING:
    from ctxlens.chat.roles import RenderedChat
    from ctxlens.models import Model
    from ctxlens.results import TokenView

_SHOWN_QUERIES = 8


class Queries(enum.StrEnum):
    """Which positions' attention is read."""

    first_answer = "first_answer"
    response_mean = "response_mean"


@verb(
    "ctxlens allocate --messages chat.json",
    "ctxlens allocate -m TinyLlama/TinyLlama-1.1B-Chat-v1.0 --messages chats.jsonl --out runs/tiny",
    "ctxlens report runs/tiny",
)
def allocate(
    messages: MessagesFile,
    model: ModelOptions,
    rendering: RenderOptions,
    store: RunOptions,
    queries: Annotated[
        Queries,
        typer.Option(help="The position that produces the first answer token, or the mean over the answer."),
    ] = Queries.first_answer,
    limit: LimitOption = None,
) -> None:
    """Attention by role, layer and head: user, assistant, template …, with and without chat template."""
    from ctxlens.results import RoleAllocation

    conversations = read_conversations(messages, limit)
    lm, how = model.load(), rendering.as_dict()
    chats = {
        condition: render_all(lm, conversations, plain=condition == "plain", **how)
        for condition in ("plain", "template")
    }
    for rendered in chats.values():
        check_queries(rendered, queries.value)
    config = {"model": lm.identity, "queries": queries.value, "limit": limit, **how}
    run = store.open("allocate", {**config, **describe_file(messages)})
    for condition, rendered in chats.items():
        name = f"allocation-{condition}.safetensors"
        if not run.has(name):
            with _screen.stage(f"attention, {condition}") as progress:
                read = lm.read_roles(rendered, queries=queries.value, progress=progress)
            run.save(name, RoleAllocation.concat(read))
    if not run.has("tokens.safetensors"):
        run.save("tokens.safetensors", _read_tokens(lm, chats["template"][0]))
    plain, template = (RoleAllocation.load(run.path(f"allocation-{name}.safetensors")) for name in chats)
    _tables.show_allocation(plain, template)
    _screen.note_truncated(chats["template"])
    _screen.say_where(run.folder)


def _read_tokens(model: Model, chat: RenderedChat) -> TokenView:
    """The patterns of the first positions that produce the answer, for the token-level view."""
    from ctxlens.results import TokenView

    first = chat.first_answer_position()
    queries = tuple(range(first, min(first + _SHOWN_QUERIES, chat.n_tokens)))
    pattern = model.read_patterns(chat, queries=queries)
    meta = {"model": model.name, "condition": "template"}
    layers = tuple(range(model.n_layers))
    return TokenView(pattern, tuple(chat.token_strings()), chat.role, layers, queries, meta)


@verb(
    "ctxlens roles --messages chat.json",
    "ctxlens roles -m HuggingFaceH4/zephyr-7b-beta --messages chat.json --limit 1",
    "ctxlens roles --messages chat.json --html roles.html",
)
def roles(
    messages: MessagesFile,
    model: ModelOptions,
    rendering: RenderOptions,
    plain: Annotated[bool, typer.Option("--plain", help="Without the chat template.")] = False,
    tools: Annotated[
        Path | None, typer.Option(help="JSON list of tool schemas, passed to the template.", metavar="FILE")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Longest conversation, in tokens; see --truncate.", metavar="N")
    ] = None,
    limit: LimitOption = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page with role, turn and id of every token instead.", metavar="FILE"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it is there.")] = False,
) -> None:
    """Show in colour whose every token is, as the chat template renders it (loads the tokenizer only)."""
    from ctxlens.chat.roles import render, render_plain

    if html is not None and html.exists() and not overwrite:
        raise InputError(f"{html} exists; choose another file or give --overwrite.")
    if plain and tools is not None:
        raise InputError("--tools are for the chat template, but --plain leaves it out; drop one of them.")
    conversations = read_conversations(messages, limit)
    options = {**rendering.as_dict(), "max_tokens": window}
    if tools is not None:
        options["tools"] = read_tools(tools)
    render_one = partial(render_plain if plain else render, model.load_tokenizer())
    chats = render_each(render_one, conversations, **options)
    if html is None:
        for chat in chats:
            _screen.show_roles(chat)
        return
    from ctxlens.report.plots import roles_view

    condition = "without chat template" if plain else "with its chat template"
    roles_view(chats, title=f"Roles: {model.model}, {condition}").save(html)
    _screen.note(f"page in {html}")
