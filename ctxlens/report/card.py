"""The data card of a selection on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ctxlens.report.blocks import Block, Cell, Table, number


def card_blocks(card: Mapping[str, Any]) -> list[Block]:
    """Shares by group, thresholds by length, and examples of a `ctxlens.scoring.card.make_card`."""
    blocks: list[Block] = [_groups(name, groups) for name, groups in card.get("shares", {}).items() if groups]
    if card.get("bins"):
        blocks.append(_bins(card["bins"]))
    left_out = [
        [Cell(f"{what}: {reason}"), Cell(str(count))]
        for what in ("dropped", "skipped")
        for reason, count in (card.get(what) or {}).items()
    ]
    if left_out:
        blocks.append(Table(["left out", "number"], left_out, "", title="Left out before selection"))
    examples = {name: rows for name, rows in card.get("examples", {}).items() if rows}
    if any("user" in row for rows in examples.values() for row in rows):
        blocks.append(_examples(examples))
    return blocks


def _groups(name: str, groups: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            Cell(str(one["name"])),
            Cell(str(one["turns"])),
            Cell(str(one["selected"])),
            Cell(f"{one['selected'] / max(one['turns'], 1):.1%}"),
            Cell(_number(one.get("score"))),
            Cell(_number(one.get("uniform"))),
        ]
        for one in groups
    ]
    return Table(
        [name, "turns", "selected", "share", "mean score", "if uniform"],
        rows,
        "“If uniform” is the mean share of the user's tokens if attention were spread evenly over all "
        "earlier tokens. A score near this value says nothing about the context.",
        title=f"Selected by {name}",
    )


def _bins(bins: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            Cell(f"{one['from']} to {one['to']}"),
            Cell(str(one["turns"])),
            Cell(_number(one["threshold"])),
            Cell(str(one["selected"])),
        ]
        for one in bins
    ]
    return Table(["context tokens", "turns", "threshold", "selected"], rows, "", title="Thresholds by length")


def _examples(examples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    rows = [
        [
            Cell(name, f"{one['conversation']}, turn {one['turn']}"),
            Cell(_number(one["score"]), f"if uniform {_number(one['uniform'])}"),
            Cell(str(one.get("user", ""))),
            Cell(str(one.get("response", ""))),
        ]
        for name, rows_of in examples.items()
        for one in rows_of
    ]
    return Table(
        ["example", "score", "the user wrote", "the answer"],
        rows,
        "Read these examples to judge whether selected answers really need the context. Long texts are "
        "shortened in the middle.",
        title="Examples to judge the selection by",
    )


def _number(value: float | None) -> str:
    return "–" if value is None else number(float(value))
