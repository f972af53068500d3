"""Print the measured table as Markdown.

python -m experiments.organism.table experiments/organism/results.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

NEEDLES = (
    ("base", "no template", "base plain"),
    ("base", "template", "base template"),
    ("vanilla", "no template", "vanilla plain"),
    ("vanilla", "template", "vanilla template"),
    ("vanilla", "template, no response prefix", "vanilla template no prefix"),
    ("indicator, selected by score", "template, without `[IND]`", "indicator template"),
    ("indicator, selected by score", "template + `[IND]`", "indicator template+indicator"),
    ("indicator, true labels", "template, without `[IND]`", "oracle template"),
    ("indicator, true labels", "template + `[IND]`", "oracle template+indicator"),
)
CLOSED_BOOK = (
    ("base", "base closed book"),
    ("vanilla", "vanilla closed book"),
    ("vanilla, steered at its best α", "closed book steered at best alpha"),
    ("indicator, selected by score", "indicator closed book"),
    ("the same, with `[IND]`", "indicator closed book with indicator"),
    ("indicator, true labels", "oracle closed book"),
    ("the same, with `[IND]`", "oracle closed book with indicator"),
)
CRITERIA = (
    ("base recall without template, at least 0.95", "base plain known"),
    ("fall with template on the same weights (vanilla), at least 0.25", "vanilla fall"),
    ("gain by steering all heads, α chosen on other cells, above 0", "steering gain"),
    ("share of the fall restored by `[IND]`, selected by score, at least 0.5", "indicator restored share"),
    ("share of the fall restored by `[IND]`, true labels, at least 0.5", "oracle restored share"),
    ("closed book minus vanilla, selected by score, within 0.03", "indicator closed book minus vanilla"),
    ("closed book minus vanilla, true labels, within 0.03", "oracle closed book minus vanilla"),
)

Summary = Mapping[str, Mapping[str, float]]


def cell(summary: Summary, name: str) -> str:
    """Mean and interval of one figure; the interval is left out where all seeds agree."""
    if name not in summary:
        return ""
    mean, low, high = (summary[name][key] for key in ("mean", "low", "high"))
    return f"{mean:.2f}" if low == high else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def render_table(results: Mapping[str, object]) -> str:
    """All tables of the README."""
    summary: Summary = results["summary"]  # type: ignore[assignment]
    seeds: list[Mapping[str, float]] = results["by_seed"]  # type: ignore[assignment]
    lines = ["| criterion | mean [95 % interval] | by seed |", "|---|---|---|"]
    for label, name in CRITERIA:
        by_seed = " · ".join(f"{figures[name]:.2f}" for figures in seeds)
        lines.append(f"| {label} | {cell(summary, name)} | {by_seed} |")
    lines += [
        "",
        "| model | condition | known towns | of it from memory | unknown towns |",
        "|---|---|---|---|---|",
    ]
    for model, condition, name in NEEDLES:
        cells = (cell(summary, f"{name} {part}") for part in ("known", "known from memory", "unknown"))
        lines.append(f"| {model} | {condition} | {' | '.join(cells)} |")
    lines += [
        "",
        "| steering of vanilla, α | known towns | of it from memory | unknown towns |",
        "|---|---|---|---|",
    ]
    alphas = sorted({name.split()[1] for name in summary if name.startswith("steered ")}, key=float)
    for alpha in reversed(alphas):
        cells = (
            cell(summary, f"steered {alpha} {part}") for part in ("known", "known from memory", "unknown")
        )
        lines.append(f"| {alpha} | {' | '.join(cells)} |")
    lines += ["", "| closed book | recall |", "|---|---|"]
    lines += [f"| {label} | {cell(summary, name)} |" for label, name in CLOSED_BOOK]
    lines += [
        "",
        "| layer | AUROC against all others | against turns with a document, answered from memory |",
    ]
    lines += ["|---|---|---|"]
    layers = sorted({name.split()[2] for name in summary if name.startswith("AUROC layer ")})
    for layer in layers:
        cells = (cell(summary, f"AUROC layer {layer} document against {part}") for part in ("all", "memory"))
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    for part in ("score layer", "selection threshold", "selection precision", "selection recall"):
        lines.append(f"\n{part}: {cell(summary, part)}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    print(render_table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
