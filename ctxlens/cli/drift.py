"""`ctxlens drift`: how attention by role changes between two models or two conditions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctxlens.cli import _screen
from ctxlens.cli._heads_tables import show_drift
from ctxlens.cli._messages import MessagesOptions
from ctxlens.cli._options import ModelOptions, RenderOptions, RunOptions, verb
from ctxlens.errors import InputError

if TYPE_CHECKING:
    from ctxlens.evals.needle.defaults import Texts
    from ctxlens.models import Model


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
    words = _parse_sides(conditions or ("template,template" if against else "plain,template"))
    given = messages.read() if messages.given else None
    model.check()
    if against is not None:
        replace(model, model=against).check()
    told = {"conditions": words, "queries": queries, "limit": messages.limit, **rendering.as_dict()}
    told |= given.config if given else {}
    store.check("drift", {"model": model.known, **told})

    from ctxlens.evals.needle.defaults import choose_texts
    from ctxlens.heads.drift import Side, read_drift
    from ctxlens.results import Drift

    lm = model.load()
    other = lm if against is None else replace(model, model=against).load()
    sides = Side(lm, words[0]), Side(other, words[1])
    contexts, options, texts = None, rendering.as_dict(), None
    asked = given.conversations if given is not None else []
    if given is None:
        texts = choose_texts(model.model)
        asked, contexts = _needle_questions(lm, texts, store.seed, messages.limit)
        options["continue_final_message"] = True
    config = {
        "model": lm.identity, "against": other.identity, **told,
        **({} if texts is None or texts.in_world else {"haystack": texts.haystack, "needles": texts.needles}),
    }  # fmt: skip
    run = store.open("drift", config, *dict.fromkeys((lm, other)))
    if given is not None:
        given.record(run)
    if not run.has("drift.safetensors"):
        with _screen.stage("attention") as progress:
            found = read_drift(
                *sides, asked, queries=queries, contexts=contexts, render_options=options, progress=progress
            )
        run.save("drift.safetensors", found)
    found = Drift.load(run.path("drift.safetensors"))
    run.record("left_out", found.meta.get("left_out", {}))
    show_drift(found)
    if texts is not None:
        _screen.note_texts(texts.note)
    _screen.say_where(run.folder)


def _parse_sides(text: str) -> tuple[str, str]:
    """The conditions of both sides, which may be the same."""
    from ctxlens.chat.condition import Condition

    words = text.split(",")
    if len(words) != 2:
        raise InputError(
            f"--conditions got {text!r}; expected two, separated by a comma, such as plain,template."
        )
    first, second = (Condition.parse(word).name for word in words)
    return first, second


def _needle_questions(
    model: Model, texts: Texts, seed: int, limit: int | None
) -> tuple[list[list[dict[str, Any]]], Any]:
    """Needle cells of the default texts as conversations, and the number of the text of each."""
    from ctxlens.evals.needle.cells import build_cells
    from ctxlens.evals.needle.config import NeedleConfig
    from ctxlens.evals.needle.haystack import load_haystack
    from ctxlens.heads.drift import needle_conversations

    config = NeedleConfig(
        lengths=4, depths=(10.0, 50.0, 90.0), needles=(texts.needles,), cases_per_cell=2, max_new_tokens=30,
        seed=seed,
    )  # fmt: skip
    cells = build_cells(model, config, load_haystack(texts.haystack, seed=seed))
    return needle_conversations(cells[:limit], config)
