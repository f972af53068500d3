"""The section on how a model used its context while it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ctxlens.report.blocks import Block, Cell, Figure, Figures, Note, Table, figure_json, number
from ctxlens.report.collect import RunContents
from ctxlens.report.plots.context import context_curves

_COLUMNS = {
    "recall_plain": "recall without template", "recall_template": "recall with template",
    "recall_indicator": "recall with indicator", "user_share_plain": "user's share without template",
    "user_share_template": "user's share with template", "closed_book": "questions without a text",
}  # fmt: skip
_SHOWN = 12
"""Readings in the table; of more, the first, the last and some between."""


def context_blocks(run: RunContents) -> list[Block]:
    """The curves of a training's readings and their table; empty without readings."""
    lines = run.extras.get("context")
    if not isinstance(lines, list) or not lines:
        return []
    readings = [line for line in lines if line.get("by_text")]
    notes: list[Block] = [
        Note(f"No reading at step {line.get('step')}: {line['error']}") for line in lines if line.get("error")
    ]
    if not readings:
        return notes
    label = f"Recall and the user's share of attention in {len(readings)} readings during the training."
    return [
        Figures([Figure(figure_json(context_curves(readings)), label)], _caption(readings[-1])),
        _table(readings),
        *notes,
    ]


def _caption(last: Mapping[str, Any]) -> str:
    spent, elapsed = float(last.get("spent_seconds", 0)), float(last.get("elapsed_seconds", 0))
    cost = f" The readings took {spent / elapsed:.1%} of the training's time." if elapsed else ""
    return (
        "Top: the share of facts that the model finds in short texts, without and with the chat template, "
        "and of questions of general knowledge that it answers without a text. Bottom: the user's share of "
        "the attention where the answer begins, without sinks. A curve that falls with the template and not "
        "without it shows a loss of context under the template; if both fall, the model uses its context "
        "less in any case. All readings ask the same questions. Bars are 95 % intervals over "
        f"{last.get('texts')} texts.{cost}"
    )


def _table(readings: Sequence[Mapping[str, Any]]) -> Table:
    names = {name: title for name, title in _COLUMNS.items() if any(name in one for one in readings)}
    shown = [readings[at] for at in _spread(len(readings))]
    rows = []
    for one in shown:
        values = [Cell(_value(one.get(name))) for name in names]
        rows.append([Cell(str(one.get("step"))), *values, Cell(f"{one.get('seconds') or 0:.1f}")])
    left_out = len(readings) - len(shown)
    caption = f"{left_out} readings between these are in readings.jsonl." if left_out else ""
    return Table(["step", *names.values(), "seconds"], rows, caption, title="Readings")


def _spread(n: int) -> list[int]:
    """At most `_SHOWN` numbers below n, evenly spread, with the first and the last."""
    if n <= _SHOWN:
        return list(range(n))
    return [round(at * (n - 1) / (_SHOWN - 1)) for at in range(_SHOWN)]


def _value(value: Any) -> str:
    return "–" if value is None else number(float(value))


__all__ = ["context_blocks"]
