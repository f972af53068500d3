"""The verdicts of PLAN_REAL_MODEL.md as Markdown, from `results-smollm2.json`: `python real_table.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHOWN = ("prompt length", "response length", "uniform", "overlap, words", "overlap, pairs of words", "lp_gap")


def main() -> None:
    """Print the tables of a file of results, by default that of SmolLM2."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results-smollm2.json"
    print(tables(json.loads(path.read_text(encoding="utf-8"))))


def tables(found: Mapping[str, Any]) -> str:
    """The verdicts, the rules, and the scores beside the baselines."""
    return "\n".join([*verdicts(found), "", *rules(found), "", *scores(found)])


def verdicts(found: Mapping[str, Any]) -> list[str]:
    """One row per question."""
    first, second, third = (found[f"question {number}"] for number in (1, 2, 3))
    organism = found["organism"]["at equal length"]
    held = found["organism"]["winner is not below needle"]
    rows = [
        ["1. the score knows more than length", f"{_interval(first['score'])} against "
         f"{_interval(first['prompt length'])}", _interval(first["difference"]), _said(first["supported"])],
        [f"2. `{found['winner']}` finds a better layer than `middle`",
         f"layers {found['layers'][found['winner']]} and {found['layers']['middle']}",
         _interval(second["winner minus middle"]), _said(second["better than middle"])],
        ["2. and is not worse than `needle` on the organism",
         f"{organism[found['winner']]:.3f} against {organism['needle']:.3f}",
         f"{organism[found['winner']] - organism['needle']:+.3f}", _said(held)],
        ["3. a score corrected for length selects better", f"{third['corrected']:+.3f} against "
         f"{third['plain']:+.3f}", _interval(third["corrected minus plain"]), _said(third["supported"])],
    ]  # fmt: skip
    return ["| question | figures | difference | verdict |", "|---|---|---|---|", *map(_row, rows)]


def rules(found: Mapping[str, Any]) -> list[str]:
    """One row per rule: its layer and the AUROC there, on the model and on the organism."""
    own, other = found["question 2"]["held out"], found["organism"]
    head = [
        "| rule | layer | development | held out | organism: layer | organism |",
        "|---|---|---|---|---|---|",
    ]
    return head + [
        _row([
            f"`{rule}`", layer, f"{found['at equal length, development'][rule]:.3f}", _interval(own[rule]),
            other["layers"][rule], f"{other['at equal length'][rule]:.3f}",
        ])
        for rule, layer in found["layers"].items()
    ]  # fmt: skip


def scores(found: Mapping[str, Any]) -> list[str]:
    """Some scores on held-out rows: those at the rules' layers, the best of all, and the baselines."""
    every = found["every score"]
    of_layers = [name for name in every if name.startswith("layer ")]
    best = max(of_layers, key=lambda name: every[name]["at equal length"][1])
    chosen = [f"layer {layer}, mean_of_best" for layer in sorted(set(found["layers"].values()))]
    chosen = dict.fromkeys([*chosen, *SHOWN])
    both = found.get("at equal length of prompt and response", {})
    lines = ["| score | AUROC | at equal prompt length | and equal response length |", "|---|---|---|---|"]
    names = [best, *(one for one in chosen if one != best), *both]
    for name in dict.fromkeys(one for one in names if one in every):
        note = " (best of all layers and reductions, chosen afterwards)" if name == best else ""
        lines.append(
            _row([
                f"{name}{note}", f"{every[name]['auroc'][1]:.3f}", _three(every[name]["at equal length"][1:]),
                _three(both[name]) if name in both else "",
            ])
        )  # fmt: skip
    return lines


def _three(figures: list[float]) -> str:
    estimate, low, high = figures
    return f"{estimate:.3f} [{low:.3f}, {high:.3f}]"


def _row(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _interval(one: Mapping[str, float]) -> str:
    return f"{one['estimate']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


def _said(holds: bool) -> str:
    return "supported" if holds else "not supported"


if __name__ == "__main__":
    main()
