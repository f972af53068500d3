"""`ctxlens report`: draw run folders as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxlens.cli import _screen
from ctxlens.cli._options import verb


@verb(
    "ctxlens report runs/allocate",
    "ctxlens report runs/vanilla runs/with-indicator --out compare.html",
)
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders; several are shown side by side.", metavar="RUN")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="HTML file. [dim]default: report.html in the first run[/dim]", metavar="FILE"
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.", metavar="TEXT")] = None,
) -> None:
    """Draw all results in run folders into one HTML file that needs no network."""
    from ctxlens.report import write_report

    _screen.say(str(write_report(runs, out or runs[0] / "report.html", title)))
