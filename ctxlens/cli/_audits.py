"""What the verbs that audit share: their options, and an audit as JSON and as a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctxlens.cli._output import INTERVAL, Outcome, Table, interval_cells
from ctxlens.errors import InputError

if TYPE_CHECKING:
    from ctxlens.auditing import Audit

BudgetOption = Annotated[
    str, typer.Option(help="Time for the audit of each model, such as 90s, 10m or 2h.", metavar="TIME")
]
TextsOption = Annotated[
    str | None,
    typer.Option(
        help="Your own texts: folder, text file or data set. [dim]default: neutral texts of "
        "this project[/dim]",
        metavar="DATA",
    ),
]
FactsOption = Annotated[
    str | None, typer.Option(help="YAML file with your own facts, at least four.", metavar="FILE")
]
LengthsOption = Annotated[
    str | None,
    typer.Option(
        help="Context lengths in tokens, such as 500,2000. [dim]default: what the budget allows[/dim]",
        metavar="LENGTHS",
    ),
]

_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|)")
_MINUTES = {"s": 1 / 60, "m": 1.0, "min": 1.0, "": 1.0, "h": 60.0}


def parse_budget(text: str) -> float:
    """Minutes of a time such as `90s`, `10m`, `2h` or `10`.

    Raises:
        InputError: it is not such a time, or zero.
    """
    match = _BUDGET.fullmatch(text.strip().lower())
    if match is None or not float(match[1]):
        raise InputError(f"--budget got {text!r}; expected a time such as 90s, 10m or 2h.")
    return float(match[1]) * _MINUTES[match[2]]


def check_questions(text: str | None) -> tuple[str, ...]:
    """The names of --fail-on.

    Raises:
        InputError: a name is unknown.
    """
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    known = ("loss", "template", "bias", "cause", "cost")
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--fail-on got {', '.join(unknown)}; choose from {', '.join(known)}.")
    return names


def outcome_of(found: Sequence[Audit]) -> Outcome:
    """The answers of one or several audits as a table."""
    rows = [
        [one.ready.model.split(":")[0], verdict.claim, verdict.word, *interval_cells(verdict.figure),
         verdict.quantity, verdict.sentence]
        for one in found for verdict in one.verdicts
    ]  # fmt: skip
    columns = ("model", "question", "answer", "estimate", *INTERVAL, "quantity", "sentence")
    summary = "; ".join(f"{verdict.claim}: {verdict.word}" for one in found for verdict in one.verdicts)
    models = ", ".join(one.ready.model.split(":")[0] for one in found)
    return Outcome("audit", summary, Table(columns, rows), models, found[0].folder)


def describe(found: Audit) -> dict[str, Any]:
    """An audit as JSON values."""
    return {
        "model": found.ready.model.split(":")[0],
        "folder": str(found.folder),
        "ready": found.ready.as_dict(),
        "plan": found.plan.as_dict(),
        "seconds": found.seconds,
        "answers": [
            {
                "question": verdict.claim,
                "answer": verdict.word,
                "sentence": verdict.sentence,
                "quantity": verdict.quantity,
                "rule": verdict.rule,
                **describe_interval(verdict.figure),
                "notes": [{"what": what, **describe_interval(one)} for what, one in verdict.notes],
            }
            for verdict in found.verdicts
        ],
        "note": found.note,
    }


def describe_interval(one: Any) -> dict[str, Any]:
    """An interval as JSON values; what is not a number becomes null."""
    values = {"estimate": one.estimate, "low": one.low, "high": one.high}
    return {**{name: None if value != value else value for name, value in values.items()}, "n": one.n}


__all__ = [
    "BudgetOption", "FactsOption", "LengthsOption", "TextsOption", "check_questions", "describe",
    "describe_interval", "outcome_of", "parse_budget",
]  # fmt: skip
