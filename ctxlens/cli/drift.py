"""`ctxlens drift`: how attention by role changes between two models or two conditions."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from ctxlens.cli import _screen
from ctxlens.cli._heads_tables import show_drift
from ctxlens.cli._messages import MessagesOptions
from ctxlens.cli._options import ModelOptions, RenderOptions, RunOptions, verb
from ctxlens.errors import InputError


@verb(
    "ctxlens drift -m organism-chat",
    "ctxlens drift -m organism --against organism-chat --conditions template,template",
    "ctxlens drift -m runs/train --conditions template,template+indicator --messages chats.jsonl",
)
def drift(
    messages: MessagesOptions,
    model: ModelOptions,
    rendering: RenderOptions,
    store: RunOptions,
    against: Annotated[
        str | None,
        typer.Option(help="Model of the second side. [dim]default: the first model[/dim]", metavar="MODEL"),
    ] = None,
    conditions: Annotated[
        str | None,
        typer.Option(
            help="Two conditions, first and second side, separated by a comma: plain (no chat template) or "
            "template, then +indicator as needed. [dim]default: plain,template for one model, "
            "template,template for two[/dim]",
            metavar="CONDITIONS",
        ),
    ] = None,
    queries: Annotated[
        str,
        typer.Option(
            help="first_answer (where the answer begins) or response_mean (averaged over the answer).",
            metavar="NAME",
        ),
    ] = "first_answer",
) -> None:
    """Compare attention by role between two models or two conditions, with paired differences.

    Without conversations, needle cells are asked: of the built-in world for the built-in model, else neutral.
    """
    if queries not in ("first_answer", "response_mean"):
        raise InputError(f"unknown queries {queries!r}; choose first_answer or response_mean.")
    words = _parse_sides(conditions, against)
    given = messages.read() if messages.given else None
    model.check()
    if against is not None:
        replace(model, model=against).check()
    told = {"conditions": words, "queries": queries, "limit": messages.limit, **rendering.as_dict()}
    told |= given.config if given else {}
    store.check("drift", {"model": model.known, **told})

    from ctxlens.heads.drift import plan_comparison
    from ctxlens.results import Drift

    lm = model.load()
    other = None if against is None else replace(model, model=against).load()
    planned = plan_comparison(
        lm, other, None if given is None else given.conversations,
        conditions=words, limit=messages.limit, seed=store.seed, **rendering.as_dict(),
    )  # fmt: skip
    other, texts = planned.second.model, planned.texts
    config = {
        "model": lm.identity, "against": other.identity, **told,
        **({} if texts is None or texts.in_world else {"haystack": texts.haystack, "needles": texts.needles}),
    }  # fmt: skip
    run = store.open("drift", config, *dict.fromkeys((lm, other)))
    if given is not None:
        given.record(run)
    if not run.has("drift.safetensors"):
        with _screen.stage("attention") as progress:
            found = planned.read(queries, progress)
        run.save("drift.safetensors", found)
    found = Drift.load(run.path("drift.safetensors"))
    run.record("left_out", found.meta.get("left_out", {}))
    show_drift(found)
    if texts is not None:
        _screen.note_texts(texts.note)
    _screen.say_where(run.folder)


def _parse_sides(text: str | None, against: str | None) -> tuple[str, str]:
    """The names of both sides' conditions; the message of an error names the option."""
    from ctxlens.chat.condition import Condition

    words = (text or ("template,template" if against else "plain,template")).split(",")
    if len(words) != 2:
        raise InputError(
            f"--conditions got {text!r}; expected two, separated by a comma, such as plain,template."
        )
    first, second = (Condition.parse(word).name for word in words)
    return first, second
