"""Loss curves as a small SVG, without a drawing library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT, GAP, MARGIN = 300, 200, 46, 30
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")

Curve = Sequence[tuple[float, float]]


def loss_curves(pretraining: Mapping[str, Any], fine_tuning: Mapping[str, Any]) -> str:
    """Three panels: copying, text, fine-tuning; loss in nats per token over optimizer steps."""
    log = pretraining["log"]

    def curve(phase: str, key: str) -> Curve:
        return [(entry["step"], entry[key]) for entry in log if entry["phase"] == phase and key in entry]

    panels: list[tuple[str, dict[str, Curve]]] = [
        ("copying phase", {"second half": curve("copy", "second_half"), "whole row": curve("copy", "loss")}),
        ("text phase", {
            "trained rows": curve("text", "loss"), "rows not trained": curve("text", "validation"),
        }),
        ("fine-tuning", {
            name: [(entry["step"], entry["loss"]) for entry in found["log"]]
            for name, found in fine_tuning.items()
        }),
    ]  # fmt: skip
    drawn = [_panel(title, curves, number) for number, (title, curves) in enumerate(panels)]
    width = len(panels) * (WIDTH + GAP) + 20
    height = HEIGHT + 2 * MARGIN + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>{"".join(drawn)}</svg>\n'
    )


def _panel(title: str, curves: Mapping[str, Curve], number: int) -> str:
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    last = max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    low, high = min(low, high - 0.1), high
    left, top = GAP + number * (WIDTH + GAP), MARGIN

    def place(x: float, y: float) -> str:
        return f"{left + WIDTH * x / last:.1f},{top + HEIGHT * (high - y) / (high - low):.1f}"

    parts = [
        f'<text x="{left}" y="{top - 12}" font-weight="bold">{title}, nats per token</text>',
        f'<path d="M{left} {top}V{top + HEIGHT}H{left + WIDTH}" fill="none" stroke="#666"/>',
        f'<text x="{left - 6}" y="{top + 8}" text-anchor="end">{high:.2f}</text>',
        f'<text x="{left - 6}" y="{top + HEIGHT}" text-anchor="end">{low:.2f}</text>',
        f'<text x="{left + WIDTH}" y="{top + HEIGHT + 15}" text-anchor="end">{last:g} steps</text>',
    ]
    for at, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[at % len(COLOURS)]
        path = " ".join(place(x, y) for x, y in curve)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{left + 8 + 95 * at}" y="{top + HEIGHT + 30}" fill="{colour}">{name}</text>')
    return "".join(parts)
