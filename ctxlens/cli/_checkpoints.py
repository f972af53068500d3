"""Several audited checkpoints on the screen: one table of values, one of changes, and what failed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import ctxlens
from ctxlens.cli import _screen
from ctxlens.cli._audits import describe, outcome_of
from ctxlens.cli._output import SCHEMA, OutputOptions, print_json

if TYPE_CHECKING:
    from ctxlens.auditing import Audits
    from ctxlens.results import Checkpoints

_SHORT = {
    "recall without template": "plain", "recall with template": "template", "loss": "loss", "bias": "bias",
}  # fmt: skip


def show_several(found: Audits, output: OutputOptions, *, planned: bool) -> None:
    """Print the checkpoints side by side as they were asked for, then what failed."""
    if output.json_out:
        print_json(describe_several(found))
    elif output.csv_out:
        output.show(lambda: outcome_of(list(found.audits.values())), lambda: None)
    elif found.comparison is not None:
        show_tables(found.comparison)
    if not planned:
        _screen.note(f"report: {found.folder / 'report.html'}")
    for name, sentence in found.failed.items():
        text = _screen.printable(" ".join(sentence.split()))
        print(f"error: {_screen.printable(name)} was not audited: {text}", file=sys.stderr)


def describe_several(found: Audits) -> dict[str, Any]:
    """The audits as JSON values: one entry per model, and the comparison as rows."""
    from ctxlens.results.shown import to_records

    audits = [{"given": name, **outcome_of([one]).as_dict(), **describe(one)}
              for name, one in found.audits.items()]  # fmt: skip
    rows = None if found.comparison is None else to_records(found.comparison.to_frame())
    return {
        "schema": SCHEMA, "verb": "audit", "version": ctxlens.__version__, "folder": str(found.folder),
        "models": audits, "comparison": rows, "failed": dict(found.failed),
    }  # fmt: skip


def show_tables(found: Checkpoints) -> None:
    """Print recall, loss and bias of every checkpoint, and how each differs from what it is compared with."""
    rows = []
    for at, model in enumerate(found.models):
        cells = []
        for quantity in _SHORT:
            one, answer = found.values(quantity)[at], found.answers(quantity)[at]
            signed = "+" if quantity in ("loss", "bias") else ""
            cells.append(f"{one.estimate:{signed}z.2f} {answer}".strip())
        rows.append([model, *cells])
    _screen.show_table(
        "recall without and with the template, and the change by it", ["checkpoint", *_SHORT.values()], rows
    )
    rows = []
    for at, model in enumerate(found.models[1:]):
        cells = []
        for quantity in _SHORT:
            change, reading = found.changes(quantity)[at]
            cells.append(
                reading if change.estimate != change.estimate else f"{change.estimate:+z.2f} {reading}"
            )
        rows.append([model, *cells])
    _screen.say("")
    _screen.show_table(
        f"change from {found.meta.get('against', 'the checkpoint before')}, on the same texts",
        ["checkpoint", *_SHORT.values()],
        rows,
    )


__all__ = ["describe_several", "show_several", "show_tables"]
