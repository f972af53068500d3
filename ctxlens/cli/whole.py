"""Verbs over whole runs: report, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxlens.cli import _screen, _tables
from ctxlens.cli._inputs import parse_threshold
from ctxlens.cli._options import Device, verb


@verb(
    "ctxlens report runs/allocate",
    "ctxlens report runs/vanilla runs/with-indicator --out compare.html",
)
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders; several are drawn side by side.", metavar="RUN…")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The HTML file. [dim]default: report.html in the first run[/dim]"),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
) -> None:
    """Draw everything that run folders hold into one HTML file that opens without network."""
    from ctxlens.report import write_report

    _screen.say(str(write_report(runs, out or runs[0] / "report.html", title)))


@verb(
    "ctxlens demo",
    "ctxlens demo --smoke --out /tmp/demo",
    "ctxlens demo --seed 1 --threshold 0.6 --out runs/demo-1",
)
def demo(
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A few steps of everything, to check an installation (40 s).")
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.", metavar="DIR")] = Path(
        "ctxlens-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, training and random heads.")] = 0,
    threshold: Annotated[
        str, typer.Option(help="β of the selection, 0 to 1 (the paper: 0.6), mixture, valley or otsu.")
    ] = "mixture",
    device: Annotated[Device, typer.Option(help="auto takes CUDA where there is one.")] = Device.auto,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew; a run in the folder is kept as DIR.old.")
    ] = False,
) -> None:
    """The whole argument, live on the built-in model: loss, role bias, cause, source, cure, report."""
    from ctxlens.demo import STAGES, run_demo

    with _screen.stages(STAGES) as progress:
        page = run_demo(
            out,
            smoke=smoke,
            seed=seed,
            threshold=parse_threshold(threshold),
            device=device.value,
            overwrite=overwrite,
            progress=progress,
        )
    _tables.show_verdicts(out)
    _screen.say(str(page))
