"""`ctxlens roles`: which role every token has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ctxlens.cli import _outcomes, _screen
from ctxlens.cli._inputs import read_tools
from ctxlens.cli._messages import MessagesOptions
from ctxlens.cli._options import ModelOptions, RenderOptions, verb
from ctxlens.cli._output import OutputOptions
from ctxlens.errors import InputError


@verb(
    "ctxlens roles --messages chat.json",
    "ctxlens roles -m HuggingFaceH4/zephyr-7b-beta --messages chat.json --limit 1",
    "ctxlens roles --messages chat.json --html roles.html",
    "ctxlens roles --prompt 'Is the harbour open?'",
)
def roles(
    messages: MessagesOptions,
    model: ModelOptions,
    rendering: RenderOptions,
    output: OutputOptions,
    plain: Annotated[bool, typer.Option("--plain", help="Render without the chat template.")] = False,
    tools: Annotated[
        Path | None,
        typer.Option(help="JSON file with a list of tool schemas for the template.", metavar="FILE"),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Upper bound on a conversation, in tokens; see --truncate.", metavar="N"),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write an HTML page with the role, turn and id of every token.", metavar="FILE"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it exists.")] = False,
) -> None:
    """Show which role every token has, in words or in colour. Loads only the tokenizer."""
    from ctxlens.chat.roles import render, render_plain
    from ctxlens.models.asking import render_each

    if html is not None and html.exists() and not overwrite:
        raise InputError(f"{html} exists; choose another file or give --overwrite.")
    if plain and tools is not None:
        raise InputError("--tools needs the chat template, which --plain leaves out; give only one of them.")
    model.check()
    conversations = messages.read().conversations
    options = {**rendering.as_dict(), "max_tokens": window}
    if tools is not None:
        options["tools"] = read_tools(tools)
    render_one = partial(render_plain if plain else render, model.load_tokenizer(renders_only=True))
    chats = render_each(render_one, conversations, **options)
    _screen.note(f"model: {model.model}")
    if longer := _note_window(model.model, [chat.n_tokens for chat in chats]):
        _screen.note(longer)
    if html is None:
        output.show(
            lambda: _outcomes.roles_outcome(chats, model.model),
            lambda: [_screen.show_roles(chat) for chat in chats],
        )
        return
    from ctxlens.report.plots import roles_view

    condition = "without chat template" if plain else "with its chat template"
    roles_view(chats, title=f"Roles: {model.model}, {condition}").save(html)
    _screen.note(f"the page is in {html}")


def _note_window(model: str, lengths: Sequence[int]) -> str:
    """That conversations are longer than the model's window; empty if they are not, or nobody knows."""
    from ctxlens.models.checkpoint import locate_checkpoint, read_window

    window = read_window(locate_checkpoint(model))
    too_long = [number for number, length in enumerate(lengths) if window is not None and length > window]
    if not too_long:
        return ""
    return (
        f"conversation {too_long[0]} has {lengths[too_long[0]]} tokens, more than the window of {model} "
        f"({window}); --window {window} --truncate shows what would be left of it"
    )
