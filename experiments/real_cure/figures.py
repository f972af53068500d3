"""Figures of the documentation, from what is committed: `python -m experiments.real_cure.figures`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from ctxlens.files import write_atomic
from ctxlens.report.plots.context import context_curves
from ctxlens.report.plots.theme import SERIES, style
from experiments.real_cure.answers import KEPT, READINGS

HERE = Path(__file__).parent
IMAGES = HERE.parents[1] / "docs" / "images"
WAYS = {
    "plain": "without template",
    "template": "with template",
    "template+indicator": "with template and indicator",
}
MODELS = ("base", "vanilla", "indicator", "random", "upsample")


def main() -> None:
    """Write the figures whose results are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results-gemma3.json")
    parser.add_argument("--kept", type=Path, default=KEPT)
    parser.add_argument("--out", type=Path, default=IMAGES)
    given = parser.parse_args()
    figures = {}
    if given.results.is_file():
        figures["recall"] = draw_recall(json.loads(given.results.read_text(encoding="utf-8"))["levels"])
    for path in sorted(given.kept.glob(f"*.{READINGS}")):
        lines = path.read_text(encoding="utf-8").split("\n")
        figures["readings"] = context_curves([json.loads(line) for line in lines if line])
    for name, figure in figures.items():
        figure.update_layout(paper_bgcolor="white", plot_bgcolor="white")
        image = figure.to_image("svg", width=860, height=figure.layout["height"])
        print(write_atomic(given.out / f"real-cure-{name}.svg", image.decode()))


def draw_recall(levels: Mapping[str, Any]) -> go.Figure:
    """Recall of the facts by model and by how it was asked, with 95 % intervals over texts."""
    figure = go.Figure()
    for shade, (way, name) in zip(SERIES, WAYS.items(), strict=False):
        found = {model: levels[f"{model}, {way}"]["needles"] for model in MODELS
                 if "needles" in levels.get(f"{model}, {way}", {})}  # fmt: skip
        if not found:
            continue
        figure.add_trace(
            go.Bar(
                x=list(found), y=[one["estimate"] for one in found.values()], name=name,
                marker={"color": shade.built},
                error_y={
                    "type": "data", "symmetric": False, "thickness": 1.5, "width": 4,
                    "array": [one["high"] - one["estimate"] for one in found.values()],
                    "arrayminus": [one["estimate"] - one["low"] for one in found.values()],
                },
            )
        )  # fmt: skip
    style(figure, height=380)
    figure.update_yaxes(title="recall of the fact", range=[0, 1.04])
    return figure.update_layout(barmode="group", legend={"y": 1.12})


__all__ = ["draw_recall"]

if __name__ == "__main__":
    main()
