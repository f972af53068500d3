"""The command line: every verb parses its options, calls one function of the library and prints the result.

A verb imports what it needs only when it is called, so that `ctxlens --help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

import ctxlens
from ctxlens.cli import _screen
from ctxlens.cli.allocate import allocate
from ctxlens.cli.audit import audit
from ctxlens.cli.cure import cure
from ctxlens.cli.demo import demo
from ctxlens.cli.doctor import doctor
from ctxlens.cli.drift import drift
from ctxlens.cli.eval import eval
from ctxlens.cli.explore import explore
from ctxlens.cli.generate import generate
from ctxlens.cli.heads import heads
from ctxlens.cli.init import init
from ctxlens.cli.mt_bench import mt_bench
from ctxlens.cli.needle import needle
from ctxlens.cli.report import report
from ctxlens.cli.roles import roles
from ctxlens.cli.score import score
from ctxlens.cli.select import select
from ctxlens.cli.steer import steer
from ctxlens.cli.train import train

app = typer.Typer(
    name="ctxlens",
    cls=_screen.Verbs,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_screen.examples(
        "ctxlens demo",
        "ctxlens audit path/or/hub-id --budget 10m",
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
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True, metavar=""
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help="Show log messages and warnings of other libraries.", metavar=""),
    ] = False,
) -> None:
    """See, prove, trace and cure the loss of context awareness in instruction-tuned language models.

    Run ctxlens VERB --help for what a verb does and for commands to copy.
    """
    if not verbose:
        _screen.silence_libraries()


_VERBS = (
    init, audit, allocate, roles, drift, needle, heads, steer, generate, score, select, train, cure, eval,
    mt_bench, report, explore, demo, doctor,
)  # fmt: skip
for _verb in _VERBS:
    app.command(_verb.__name__.replace("_", "-"), cls=_screen.Verb, epilog=_verb.epilog)(_verb)


def main() -> None:
    """Run the command line (entry point `ctxlens`)."""
    app()
