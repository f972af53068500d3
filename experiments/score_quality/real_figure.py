"""The score on a real model by layer, from `results-smollm2.json`: `python real_figure.py [--out FILE]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctxlens.files import write_atomic

HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT, TOP = 560, 300, 52, 44
LOW, HIGH = 0.2, 1.0
SCORE, BARE, BASELINE = "#0068a8", "#d55e00", "#555555"
RIGHT = 190
"""Room for the names of the lines."""


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results-smollm2.json")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs" / "images" / "score-layers.svg")
    given = parser.parse_args()
    write_atomic(given.out, draw(json.loads(given.results.read_text(encoding="utf-8"))))


def draw(found: Mapping[str, Any]) -> str:
    """AUROC at equal length on held-out rows, by layer, with the rules' choices and the baselines."""
    every = found["every score"]
    n_layers = sum(name.endswith(", mean_of_best") for name in every)

    def across(layer: float) -> float:
        return LEFT + WIDTH * layer / (n_layers - 1)

    def held_out(name: str) -> Sequence[float]:
        return every[name]["at equal length"][1:]

    best = [held_out(f"layer {layer}, mean_of_best") for layer in range(n_layers)]
    bare = [held_out(f"layer {layer}, mean_heads without sinks") for layer in range(n_layers)]
    band = [f"{across(k):.1f},{_up(one[1]):.1f}" for k, one in enumerate(best)]
    band += [f"{across(k):.1f},{_up(best[k][2]):.1f}" for k in reversed(range(n_layers))]
    parts = [
        f'<text x="{LEFT}" y="20" font-weight="bold">AUROC at equal prompt length, '
        f"{found['rows']['held out']} held-out rows of T0, SmolLM2-135M-Instruct</text>",
        f'<path d="M{LEFT} {TOP}V{TOP + HEIGHT}H{LEFT + WIDTH}" fill="none" stroke="#666"/>',
        f'<polygon points="{" ".join(band)}" fill="{SCORE}" fill-opacity="0.18"/>',
        _line([(across(k), one[0]) for k, one in enumerate(best)], SCORE),
        _line([(across(k), one[0]) for k, one in enumerate(bare)], BARE, dashed=True),
    ]
    for value in (0.2, 0.4, 0.6, 0.8, 1.0):
        parts.append(f'<text x="{LEFT - 6}" y="{_up(value) + 4:.1f}" text-anchor="end">{value:.1f}</text>')
    for layer in range(0, n_layers, 5):
        parts.append(
            f'<text x="{across(layer):.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{layer}</text>'
        )
    parts.append(f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 34}" text-anchor="middle">layer</text>')
    ends = [
        (best[-1][0], SCORE, "mean_of_best, 95 % interval"),
        (bare[-1][0], BARE, "mean_heads without sinks"),
    ]
    for name in ("response length", "prompt length", "lp_gap"):
        value = held_out(name)[0]
        parts.append(
            f'<path d="M{LEFT} {_up(value):.1f}h{WIDTH}" stroke="{BASELINE}" stroke-dasharray="2 4"/>'
        )
        ends.append((value, BASELINE, name))
    parts += _names(ends)
    parts += _rules(found, [one[0] for one in best], across)
    width, height = LEFT + WIDTH + RIGHT, TOP + HEIGHT + 48
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _up(value: float) -> float:
    return TOP + HEIGHT * (HIGH - value) / (HIGH - LOW)


def _line(points: Sequence[tuple[float, float]], colour: str, *, dashed: bool = False) -> str:
    path = " ".join(f"{x:.1f},{_up(y):.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 3"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>'


def _names(ends: Sequence[tuple[float, str, str]]) -> list[str]:
    """The names of the lines at their right ends, moved apart where they would overlap."""
    parts, free = [], 0.0
    for value, colour, name in sorted(ends, reverse=True):
        free = max(_up(value) + 4, free + 15)
        parts.append(f'<text x="{LEFT + WIDTH + 8}" y="{free:.1f}" fill="{colour}">{name}</text>')
    return parts


def _rules(found: Mapping[str, Any], heights: Sequence[float], across: Any) -> list[str]:
    """A dot and a name for every layer that a rule chooses."""
    chosen: dict[int, list[str]] = {}
    for rule, layer in found["layers"].items():
        chosen.setdefault(layer, []).append(rule)
    parts = []
    for number, (layer, rules) in enumerate(sorted(chosen.items())):
        x, y, text = across(layer), _up(heights[layer]), TOP - 2 + 15 * (number % 3)
        parts.append(f'<path d="M{x:.1f} {text + 3}V{y:.1f}" stroke="#999" stroke-width="0.8"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{SCORE}"/>')
        label = f"{', '.join(rules)}: {layer}"
        parts.append(f'<text x="{x:.1f}" y="{text}" text-anchor="middle" font-size="11">{label}</text>')
    return parts


if __name__ == "__main__":
    main()
