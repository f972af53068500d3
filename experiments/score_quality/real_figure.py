"""The score on a real model by layer, from `results-smollm2.json`: `python real_figure.py [--out FILE]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from ctxlens.files import write_atomic
from ctxlens.report.plots.theme import INK, SERIES, style

HERE = Path(__file__).parent
BASELINES = ("response length", "prompt length", "lp_gap")


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results-smollm2.json")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs" / "images" / "score-layers.svg")
    given = parser.parse_args()
    figure = draw(json.loads(given.results.read_text(encoding="utf-8")))
    write_atomic(given.out, figure.to_image("svg", width=860, height=figure.layout["height"]).decode())


def draw(found: Mapping[str, Any]) -> go.Figure:
    """AUROC at equal prompt length on held-out rows, by layer, with the rules' choices and the baselines."""
    every = found["every score"]
    layers = list(range(sum(name.endswith(", mean_of_best") for name in every)))

    def held_out(name: str) -> list[float]:
        return every[name]["at equal length"][1:]

    best = [held_out(f"layer {layer}, mean_of_best") for layer in layers]
    bare = [held_out(f"layer {layer}, mean_heads without sinks")[0] for layer in layers]
    figure = go.Figure()
    figure.add_trace(
        go.Scatter(
            x=[*layers, *layers[::-1]], y=[*(one[1] for one in best), *(one[2] for one in best[::-1])],
            fill="toself", fillcolor=SERIES[0].faded(), line={"width": 0}, showlegend=False,
        )
    )  # fmt: skip
    for name, values, shade, dash in (
        ("mean_of_best, 95 % interval", [one[0] for one in best], SERIES[0], "solid"),
        ("mean_heads without sinks", bare, SERIES[1], "dash"),
    ):
        line = {"color": shade.built, "dash": dash}
        figure.add_trace(go.Scatter(x=layers, y=values, name=name, mode="lines", line=line))
    for name in BASELINES:
        figure.add_hline(
            y=held_out(name)[0], line={"color": INK.built, "dash": "dot", "width": 1}, annotation_text=name,
            annotation={"x": 1.01, "xanchor": "left", "yanchor": "middle"},
        )  # fmt: skip
    for number, (layer, rules) in enumerate(sorted(_chosen(found).items())):
        figure.add_annotation(
            x=layer, y=best[layer][0], text=f"{', '.join(rules)}: {layer}", ax=0, arrowhead=6, arrowwidth=1,
            ayref="y", ay=1.02 - 0.05 * (number % 4), font={"size": 11},
        )  # fmt: skip
    style(figure, height=420)
    figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", margin={"r": 120}, legend={"y": 1.05})
    figure.update_xaxes(title="layer")
    figure.update_yaxes(title="AUROC at equal prompt length", range=[0.1, 1.05])
    return figure


def _chosen(found: Mapping[str, Any]) -> dict[int, list[str]]:
    """The rules by the layer that they choose."""
    chosen: dict[int, list[str]] = {}
    for rule, layer in found["layers"].items():
        chosen.setdefault(layer, []).append(rule)
    return chosen


if __name__ == "__main__":
    main()
