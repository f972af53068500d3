"""`ctxlens init`: files to begin with, one for every option that takes a file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ctxlens.cli import _screen
from ctxlens.cli._options import verb


@verb("ctxlens init my-audit", "ctxlens init . --overwrite")
def init(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.", metavar="DIR", show_default=False)],
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Write into a folder that holds files; files of the same name are kept as NAME.old.",
        ),
    ] = False,
) -> None:
    """Write example files for every verb: a chat, needles, a haystack, data, recipes and questions.

    The README.md in the folder says what each file is and shows commands that use it. Nothing is loaded from
    the network, and the files are the same every time.
    """
    from ctxlens.evals.starter import write_starter

    for path in write_starter(folder, overwrite=overwrite):
        _screen.say(_screen.printable(str(path)))
    _screen.note(f"next: cd {shlex.quote(str(folder))}, and see the README.md there")
