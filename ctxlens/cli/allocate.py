"""`ctxlens allocate`: attention by role, with and without chat template."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer

from ctxlens.cli import _screen, _tables
from ctxlens.cli._inputs import render_all
from ctxlens.cli._messages import MessagesOptions
from ctxlens.cli._options import ModelOptions, RenderOptions, RunOptions, verb

if TYPE_CHECKING:
    from ctxlens.chat.roles import RenderedChat
    from ctxlens.models import Model
    from ctxlens.results import TokenView

_SHOWN_QUERIES = 8


class Queries(enum.StrEnum):
    """The positions whose attention is read."""

    first_answer = "first_answer"
    response_mean = "response_mean"


@verb(
    "ctxlens allocate --messages chat.json",
    "ctxlens allocate -m TinyLlama/TinyLlama-1.1B-Chat-v1.0 --messages chats.jsonl --out runs/tiny",
    "ctxlens report runs/tiny",
)
def allocate(
    messages: MessagesOptions,
    model: ModelOptions,
    rendering: RenderOptions,
    store: RunOptions,
    queries: Annotated[
        Queries,
        typer.Option(
            help="first_answer (attention at the position where the answer begins) or response_mean "
            "(averaged over the answer).",
            metavar="NAME",
        ),
    ] = Queries.first_answer,
) -> None:
    """Measure attention by role, layer and head, with and without the chat template."""
    asked, how = messages.read(), rendering.as_dict()
    told = {"queries": queries.value, "limit": messages.limit, **how, **asked.config}
    model.check()
    store.check("allocate", {"model": model.known, **told})

    from ctxlens.models.allocate import allocate as read_allocation
    from ctxlens.models.asking import check_queries
    from ctxlens.results import RoleAllocation

    lm = model.load()
    chats = {
        condition: render_all(lm, asked.conversations, plain=condition == "plain", **how)
        for condition in ("plain", "template")
    }
    for rendered in chats.values():
        check_queries(rendered, queries.value)
    run = store.open("allocate", {"model": lm.identity, **told}, lm)
    asked.record(run)
    for condition, rendered in chats.items():
        name = f"allocation-{condition}.safetensors"
        if not run.has(name):
            with _screen.stage(f"attention, {condition}") as progress:
                found = read_allocation(lm, rendered, queries=queries.value, progress=progress)
            run.save(name, found)
    if not run.has("tokens.safetensors"):
        run.save("tokens.safetensors", _read_tokens(lm, chats["template"][0]))
    plain, template = (RoleAllocation.load(run.path(f"allocation-{name}.safetensors")) for name in chats)
    _tables.show_allocation(plain, template)
    _screen.note_truncated(chats["template"])
    run.record("left_out", _screen.note_left_out(chats["template"]))
    _screen.say_where(run.folder)


def _read_tokens(model: Model, chat: RenderedChat) -> TokenView:
    """The patterns of the first positions that produce the answer, for the token view."""
    from ctxlens.results import TokenView

    first = chat.first_answer_position()
    queries = tuple(range(first, min(first + _SHOWN_QUERIES, chat.n_tokens)))
    pattern = model.read_patterns(chat, queries=queries)
    meta = {"model": model.name, "condition": "template"}
    layers = tuple(range(model.n_layers))
    return TokenView(pattern, tuple(chat.token_strings()), chat.role, layers, queries, meta)
