"""`ctxlens doctor`: are the results for a model exact, and does it fit into memory?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctxlens.cli import _screen
from ctxlens.cli._messages import MessagesOptions
from ctxlens.cli._options import CheckpointOptions, note_choice, verb
from ctxlens.cli._output import STDOUT, Outcome, OutputOptions, Table
from ctxlens.errors import InputError

if TYPE_CHECKING:
    from ctxlens.models import Model
    from ctxlens.models.doctor import Diagnosis

_MARKS = {"pass": "✓", "fail": "✗", "skipped": "–"}


@dataclass(frozen=True)
class DoctorOutput(OutputOptions):
    """As for every verb, but `--json FILE` writes a file."""

    json_out: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]
        str | None,
        typer.Option(
            "--json",
            help="Print the result as one JSON document on stdout; with FILE, write all findings there.",
            metavar="[FILE]",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.json_out == STDOUT and self.csv_out:
            raise InputError("--json and --csv both print to stdout; give only one of them.")

    @property
    def json_file(self) -> Path | None:
        """The file of `--json FILE`."""
        return None if self.json_out in (None, STDOUT) else Path(self.json_out)

    @property
    def prints_json(self) -> bool:
        """Whether the JSON document is printed."""
        return self.json_out == STDOUT


@verb(
    "ctxlens doctor",
    "ctxlens doctor -m TinyLlama/TinyLlama-1.1B-Chat-v1.0 --dtype bfloat16 --length 2048",
    "ctxlens doctor -m path/to/a/large/model --skip-lens --skip-eager --json doctor.json",
)
def doctor(
    model: CheckpointOptions,
    messages: MessagesOptions,
    output: DoctorOutput,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Length of the memory forecast in tokens. [dim]default: the window, up to 8192[/dim]",
            metavar="N",
        ),
    ] = None,
    skip_lens: Annotated[
        bool,
        typer.Option(
            "--skip-lens", help="Skip the comparison with TransformerLens, which loads the model again."
        ),
    ] = False,
    skip_eager: Annotated[
        bool, typer.Option("--skip-eager", help="Skip the comparison with transformers' eager attention.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the JSON file if it exists.")
    ] = False,
) -> None:
    """Check a model: roles, attention shares in three ways, steering and memory. Exit code 1 on failure.

    Of conversations that are given, the roles of all are checked, and attention is read from the first.
    The model is loaded with transformers, released, and loaded with TransformerLens: one copy at a time.
    """
    json_file = output.json_file
    if json_file is not None and json_file.is_dir():
        raise InputError(f"--json got {json_file}, which is a folder; name a file.")
    if json_file is not None and json_file.exists() and not overwrite:
        raise InputError(f"{json_file} exists; choose another file or give --overwrite.")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise InputError(
            f"{json_file.parent} is not a folder, so {json_file.name} cannot be written there; name "
            "another file."
        )
    model.check()
    conversations = messages.read().conversations if messages.given else []
    if messages.messages is None and messages.limit is not None:
        raise InputError("--limit is for --messages; give --messages DATA, or leave out --limit.")

    from ctxlens.models.doctor import diagnose

    tokenizer = model.load_tokenizer()
    with _screen.stage("self-check") as progress:
        diagnosis = diagnose(
            tokenizer,
            partial(_load, model),
            conversations=conversations,
            length=length,
            with_lens=not skip_lens,
            with_eager=not skip_eager,
            progress=progress,
        )
    output.show(lambda: _outcome(diagnosis, model.model), lambda: _show(diagnosis))
    if json_file is not None:
        json_file.write_text(json.dumps(diagnosis.as_dict(), indent=2, ensure_ascii=False), encoding="utf-8")
        _screen.note(f"all findings are in {json_file}")
    if not diagnosis.ok:
        raise typer.Exit(1)


def _load(model: CheckpointOptions, backend: str) -> Model:
    """Load the model and say how it was loaded."""
    loaded = model.load_as(backend)
    note_choice(loaded)
    return loaded


def _outcome(diagnosis: Diagnosis, model: str) -> Outcome:
    """The findings as a table; all else as it is written to a file."""
    rows = [[f.outcome, f.area, f.check, f.said] for f in diagnosis.findings]
    table = Table(("outcome", "area", "check", "said"), rows)
    known = {key: value for key, value in diagnosis.as_dict().items() if key not in ("model", "summary")}
    return Outcome(
        "doctor", " ".join(diagnosis.summary), table, model, more={"ok": diagnosis.ok, "diagnosis": known}
    )


def _show(diagnosis: Diagnosis) -> None:
    """Print findings, layers and memory as tables, then the verdict."""
    rows = [[_MARKS[f.outcome], f.area, f.check, f.said] for f in diagnosis.findings]
    _screen.show_table("self-check", ["", "", "", ""], rows, n_labels=4)
    if diagnosis.layers:
        alike = groupby(diagnosis.layers, key=lambda layer: (layer.path, layer.window))
        rows = []
        for (path, window), group in alike:
            layers = [layer.layer for layer in group]
            name = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
            rows.append([name, path, "all" if window is None else f"{window} tokens"])
        _screen.show_table("layers", ["layer", "path", "sees"], rows, n_labels=3)
    if diagnosis.forecasts:
        _show_memory(diagnosis)
    failed = sum(finding.outcome == "fail" for finding in diagnosis.findings)
    skipped = sum(finding.outcome == "skipped" for finding in diagnosis.findings)
    verdict = "nothing failed" if diagnosis.ok else f"{failed} of {len(diagnosis.findings)} checks failed"
    _screen.say(verdict + (f"; {skipped} skipped" if skipped else ""))
    for sentence in diagnosis.summary:
        _screen.say(_screen.printable(sentence))


def _show_memory(diagnosis: Diagnosis) -> None:
    """Print the memory forecasts side by side, in MB."""
    from ctxlens.models.memory import ROW_NAMES

    tables = [{name: (size, said) for name, size, said in f.table()} for f in diagnosis.forecasts]
    names = [name for name in ROW_NAMES if any(name in table for table in tables)]
    rows = []
    for name in names:
        sizes = [f"{table[name][0] / 1e6:,.1f}" if name in table else "" for table in tables]
        rows.append([name, next(table[name][1] for table in tables if name in table), *sizes])
    first = diagnosis.forecasts[0]
    title = f"memory forecast in MB, one conversation of {first.length} tokens, {first.dtype}"
    _screen.show_table(title, ["", "", *(f.what for f in diagnosis.forecasts)], rows, n_labels=2)
