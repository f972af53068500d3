"""`ctxlens demo`: the complete argument on the built-in model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxlens.cli import _outcomes, _screen, _tables
from ctxlens.cli._inputs import parse_threshold
from ctxlens.cli._options import Device, verb
from ctxlens.cli._output import OutputOptions


@verb(
    "ctxlens demo",
    "ctxlens demo --smoke --out /tmp/demo",
    "ctxlens demo --seed 1 --threshold 0.6 --out runs/demo-1",
)
def demo(
    output: OutputOptions,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A few steps of every stage, to check an installation (40 s).")
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.", metavar="DIR")] = Path(
        "ctxlens-demo"
    ),
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of data, training and random heads.", metavar="N")
    ] = 0,
    threshold: Annotated[
        str,
        typer.Option(
            help="β of the selection: 0 to 1 (paper: 0.6), mixture, valley or otsu.", metavar="BETA"
        ),
    ] = "mixture",
    device: Annotated[
        Device, typer.Option(help="auto, cpu or cuda; auto uses CUDA if it is available.", metavar="DEVICE")
    ] = Device.auto,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Start again; an earlier run in the folder is kept as DIR.old."),
    ] = False,
) -> None:
    """Run the complete argument on the built-in model: loss, role bias, cause, source, cure, report."""
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
    output.show(lambda: _verdicts(out), lambda: _tables.show_verdicts(out))
    if smoke:
        _screen.note("a smoke run only checks the installation; its verdicts have no meaning")
    if not output.for_machines:
        _screen.say(str(page))


def _verdicts(folder: Path) -> _outcomes.Outcome:
    """The verdicts as a table."""
    from ctxlens.results import Verdicts

    found = Verdicts.load(folder / "verdicts.json")
    words = [f"{verdict.claim}: {verdict.word}" for verdict in found.verdicts]
    table = _outcomes.table_of(found.to_frame())
    return _outcomes.Outcome("demo", f"{'; '.join(words)}.", table, "organism", folder)
