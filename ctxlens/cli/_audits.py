"""An audit as JSON and as a table, for the output of `ctxlens audit`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ctxlens.cli._output import INTERVAL, Outcome, Table, interval_cells

if TYPE_CHECKING:
    from ctxlens.auditing import Audit


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


__all__ = ["describe", "describe_interval", "outcome_of"]
