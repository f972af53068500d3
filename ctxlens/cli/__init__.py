"""The command line: every verb mirrors one function of the library. Parse, call, print.

The verbs import what they need when they are called, so that `ctxlens --help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

import ctxlens
from ctxlens.cli import _screen
from ctxlens.cli.check import doctor
from ctxlens.cli.dissect import drift, heads
from ctxlens.cli.look import allocate, roles
from ctxlens.cli.measure import needle
from ctxlens.cli.rate import mt_bench
from ctxlens.cli.speak import generate, steer
from ctxlens.cli.trace import score, select
from ctxlens.cli.tune import train
from ctxlens.cli.whole import demo, report

app = typer.Typer(
    name="ctxlens",
    cls=_screen.Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_screen.examples(
        "ctxlens demo",
        "ctxlens allocate --model path/or/hub-id --messages chat.json --out runs/allocate",
        "ctxlens report runs/allocate",
    ),
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        _screen.say(ctxlens.__version__)
        raise typer.Exit
    return wanted


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help="Show the log messages and warnings of the libraries underneath."),
    ] = False,
) -> None:
    """See, prove, trace and cure the loss of context awareness in instruction-tuned language models.

    Each verb says by --help what it does, with a command to copy.
    """
    if not verbose:
        _screen.silence_libraries()


_VERBS = (
    allocate, roles, drift, needle, heads, steer, generate, score, select, train, mt_bench, report, demo,
    doctor,
)  # fmt: skip
for _verb in _VERBS:
    app.command(_verb.__name__.replace("_", "-"), epilog=_verb.epilog)(_verb)


def main() -> None:
    """Run the command line (entry point `ctxlens`)."""
    app()
