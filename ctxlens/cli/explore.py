"""`ctxlens explore`: a page in the browser that shows a model at work."""

from __future__ import annotations

import webbrowser
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ctxlens.cli import _screen
from ctxlens.cli._options import ModelOptions, note_choice, verb
from ctxlens.cli.select import check_scores, scored_data
from ctxlens.errors import InputError, require_package

if TYPE_CHECKING:
    from ctxlens.explore.copying import Source
    from ctxlens.explore.scored import ScoredSet
    from ctxlens.models import Model


@dataclass(frozen=True)
class ServerOptions:
    """Where the page is served."""

    PANEL: ClassVar[str] = "Page"

    host: Annotated[
        str,
        typer.Option(
            help="Address to serve on. Any but this machine's own needs the token in the printed link.",
            metavar="ADDRESS",
        ),
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.", metavar="N")] = 8061
    cache: Annotated[int, typer.Option(min=16, help="Memory for results, in MiB.", metavar="MIB")] = 1024
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the link, and do not open a browser.")
    ] = False


@verb(
    "ctxlens explore organism-chat",
    "ctxlens explore HuggingFaceTB/SmolLM2-135M-Instruct --against HuggingFaceTB/SmolLM2-135M",
    "ctxlens explore model.gguf --port 9000 --no-browser",
    "ctxlens explore organism-chat --scores runs/scores --dataset data.jsonl",
)
def explore(
    loading: ModelOptions,
    page: ServerOptions,
    named: Annotated[
        str | None,
        typer.Argument(
            help="Model to explore: folder, GGUF file, Hub id or built-in name; instead of --model.",
            metavar="[MODEL]",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Second model, to compare with.", metavar="MODEL")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="Run folder of ctxlens score, for the screen Data.", metavar="DIR"),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="The scored data, to read their turns.", metavar="DATA")
    ] = None,
) -> None:
    """Open a page that shows where a model looks, steers it, and compares two ways of asking."""
    name = named or ("organism-chat" if loading.model == "organism" else loading.model)
    for one in filter(None, (name, against)):
        loading.check_one(one)
    if dataset is not None and scores is None:
        raise InputError("--dataset belongs to --scores; give the run folder of ctxlens score, too.")
    if scores is not None:
        check_scores(scores)
    require_package("the explorer", "dash")
    from ctxlens.explore.lab import Lab
    from ctxlens.explore.server import bind, check_port, is_local, make_app, new_token

    check_port(page.host, page.port)
    scored = read_scores(scores, dataset) if scores is not None else None
    token = None if is_local(page.host) else new_token()
    lm, lent = load_with_template(loading, name)
    note_choice(lm)
    other, more = load_with_template(loading, against) if against else (None, {})
    source = source_of(loading, name, against, {**lent, **more})
    lab = Lab(lm, other, source=source, cache_bytes=page.cache * 2**20, scored=scored)
    app = make_app(lab, host=page.host, port=page.port, token=token)
    server = bind(app, page.host, page.port)
    shown = f"[{page.host}]" if ":" in page.host else page.host
    link = f"http://{shown}:{page.port}/" + (f"?token={token}" if token else "")
    _screen.say(f"{link}\nStop with Ctrl+C.")
    if not page.no_browser:
        webbrowser.open(link)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


def read_scores(scores: Path, dataset: str | None) -> ScoredSet:
    """The scores to look at, and the conversations if they are given.

    Raises:
        InputError: the scores or the data cannot be read, or do not belong together.
    """
    from ctxlens.explore.scored import ScoredSet
    from ctxlens.results import Scores
    from ctxlens.scoring.selection import check_scored

    table = Scores.load(scores / "scores.parquet" if scores.is_dir() else scores)
    if dataset is None:
        return ScoredSet(table, str(scores))
    data, _ = scored_data(scores, dataset, None, None)
    check_scored(table, data)
    return ScoredSet(table, str(scores), dataset, {one.id: one.messages for one in data})


def load_with_template(loading: ModelOptions, name: str) -> tuple[Model, dict[str, str]]:
    """Load a model; one without a chat template is lent ChatML, which comes with ctxlens.

    Returns:
        The model, and the template that it was lent, by the model's name; nothing if it has its own.
    """
    from ctxlens.models.checkpoint import TEMPLATES, lacks_chat_template, locate_checkpoint

    lent = replace(loading, chat_template=Path(TEMPLATES[0]))
    lacks = loading.chat_template is None and lacks_chat_template(locate_checkpoint(name))
    model = (lent if lacks else loading).load_one(name, loading.backend.value)
    if model.tokenizer.chat_template is None:  # only the tokenizer could say: on the Hub, or in a GGUF file
        model, lacks = lent.load_one(name, loading.backend.value), True
    if not lacks:
        return model, {}
    _screen.note(
        f"{name} has no chat template. Where the page asks with one, it takes ChatML, which comes with "
        "ctxlens; give another one with --chat-template."
    )
    return model, {name: TEMPLATES[0]}


def source_of(
    loading: ModelOptions, name: str, against: str | None, lent: Mapping[str, str] | None = None
) -> Source:
    """How the models are loaded, for code that the page copies."""
    from ctxlens.explore.copying import Source

    options: dict[str, Any] = {}
    flags: list[str] = []
    for key in ("backend", "device", "dtype", "revision", "device_map"):
        value = getattr(loading, key)
        value = getattr(value, "value", value)
        if value not in (None, "auto"):
            options[key] = value
            flags += [f"--{key.replace('_', '-')}", str(value)]
    for key in ("trust_remote_code", "load_in_4bit", "load_in_8bit"):
        if getattr(loading, key):
            options[key] = True
            flags.append(f"--{key.replace('_', '-')}")
    if loading.chat_template is not None:
        options["chat_template"] = str(loading.chat_template)
        flags += ["--chat-template", str(loading.chat_template)]
    if loading.template_args:
        options["template_args"] = loading.template_args
        flags += [word for pair in loading.template_arg or () for word in ("--template-arg", pair)]
    return Source(name, against, options, tuple(flags), lent or {})


__all__ = ["explore", "read_scores", "source_of"]
