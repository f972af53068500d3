"""Figures of the documentation, from the committed verdicts: `python -m experiments.real_model.figures`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ctxlens.files import write_atomic
from ctxlens.report.plots.theme import DIVERGING, INK, SERIES, colorbar, colorscale, style

HERE = Path(__file__).parent
IMAGES = HERE.parents[1] / "docs" / "images"
PLAIN, TEMPLATE, OTHER = SERIES[0], SERIES[1], SERIES[2]
CONDITIONS = (("without template", "plain", PLAIN), ("with template", "template", TEMPLATE))
Found = Mapping[str, Any]


def main() -> None:
    """Write one SVG for every part that was judged."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results-smollm2.json")
    parser.add_argument("--out", type=Path, default=IMAGES)
    given = parser.parse_args()
    found = json.loads(given.results.read_text(encoding="utf-8"))
    for name, (needs, draw) in FIGURES.items():
        if all(need in found for need in needs):
            figure = draw(found).update_layout(paper_bgcolor="white", plot_bgcolor="white")
            image = figure.to_image("svg", width=860, height=figure.layout["height"])
            path = given.out / f"real-model-{name}.svg"
            write_atomic(path, image.decode())
            print(path)


def draw_loss(found: Found) -> go.Figure:
    """Recall by length of the context, without and with the first words of the answer."""
    by_length = found["loss"]["by length"]
    figure = make_subplots(
        1, 2, subplot_titles=["the model answers freely", "the answer's first words are given"],
        shared_yaxes=True, horizontal_spacing=0.05,
    )  # fmt: skip
    for column, prefix in enumerate(("", "+prefix"), start=1):
        for name, base, shade in (
            ("without template", "plain", PLAIN),
            ("with template", "template", TEMPLATE),
        ):
            rows = [one["levels"][base + prefix] for one in by_length.values()]
            figure.add_trace(
                go.Scatter(
                    x=[int(length) for length in by_length], y=[one["estimate"] for one in rows],
                    error_y=_bars(rows), name=name, legendgroup=name, showlegend=column == 1,
                    mode="lines+markers", line={"color": shade.built},
                    marker={"symbol": "circle" if base == "plain" else "square", "size": 8},
                ),
                1, column,
            )  # fmt: skip
    style(figure, height=380)
    lengths = [int(length) for length in by_length]
    figure.update_xaxes(
        type="log", tickvals=lengths, ticktext=[f"{n:,}" for n in lengths], title="tokens of text"
    )
    figure.update_yaxes(range=[0, 1.02])
    figure.update_yaxes(title="recall of the fact", col=1)
    figure.update_layout(legend={"y": 1.12})
    return figure


def draw_controls(found: Found) -> go.Figure:
    """Recall at 4,000 tokens under every control of hypothesis 2."""
    names = {
        "template+prefix": "chat template",
        "template+nosystem+prefix": "chat template, no system prompt",
        "a foreign template": "Llama 3's template",
        "plain+bos+prefix": "text after the model's first special token",
        "plain+matched+prefix": "text after as much neutral text",
    }
    recall, differences = found["controls"]["recall"], found["controls"]["template minus control"]
    shown = [name for name in names if name in recall][::-1]
    figure = go.Figure()
    for name in shown:
        width = differences.get(name)
        error = None
        if width:  # the interval of the difference to the template, drawn around the control
            error = {"type": "data", "symmetric": False, "array": [width["estimate"] - width["low"]],
                     "arrayminus": [width["high"] - width["estimate"]]}  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=[recall[name]],
                y=[names[name]],
                mode="markers",
                error_x=error,
                showlegend=False,
                marker={"size": 9, "color": (TEMPLATE if name == "template+prefix" else PLAIN).built},
            )
        )
    style(figure, height=110 + 34 * len(shown))
    figure.add_vline(x=recall["template+prefix"], line={"color": TEMPLATE.built, "dash": "dot", "width": 1})
    figure.update_xaxes(
        range=[0, 1.02], title="recall of the fact at 4,000 tokens, the answer's first words given"
    )
    return figure


def draw_bias(found: Found) -> go.Figure:
    """Change of the user's share by layer, in three views."""
    views = {"raw": ("raw", OTHER, "dot"), "as in the paper": ("as in the paper", TEMPLATE, "dash"),
             "without sinks": ("without attention sinks", PLAIN, "solid")}  # fmt: skip
    figure = go.Figure()
    for key, (name, shade, dash) in views.items():
        values = found["attention"]["by layer"][key]
        figure.add_trace(
            go.Scatter(
                x=list(range(len(values))),
                y=values,
                name=name,
                mode="lines",
                line={"color": shade.built, "dash": dash},
            )
        )
    style(figure, height=340)
    figure.add_hline(y=0, line={"color": INK.built, "width": 1})
    figure.update_xaxes(title="layer")
    figure.update_yaxes(title="change of the user's share", tickformat="+.1f")
    return figure


def draw_steering(found: Found) -> go.Figure:
    """Gains by strength of steering on the choosing texts, and on the judging texts beside the controls."""
    cause = found["cause"]
    figure = make_subplots(
        1, 2, subplot_titles=["texts that choose α", "texts that judge"], column_widths=[0.55, 0.45],
        horizontal_spacing=0.2,
    )  # fmt: skip
    sets = {"all": ("all heads", OTHER), "retrieval": ("heads that attend to the fact", PLAIN)}
    for heads, (name, shade) in sets.items():
        doses = cause["gains while choosing"][heads]
        figure.add_trace(
            go.Scatter(
                x=[float(alpha) for alpha in doses], y=[one["estimate"] for one in doses.values()],
                error_y=_bars(list(doses.values())), name=name, mode="lines+markers",
                line={"color": shade.built},
            ),
            1, 1,
        )  # fmt: skip
    judging = found.get("fresh", cause)
    judged = {"all heads": judging["judged"]["all heads, template"],
              "all heads,<br>no template": judging["all heads, no template"],
              "heads that attend<br>to the fact": judging["chosen heads"],
              "as many<br>random heads": judging["random heads"]}  # fmt: skip
    if "small" in judging:
        judged["a small set"] = judging["small"]["small set"]
        if "no template" in judging["small"]:
            judged["a small set,<br>no template"] = judging["small"]["no template"]
    if "the paper's α of 0.95" in judging:
        judged["all heads, α .95,<br>by the formula"] = judging["the paper's α of 0.95"]
    if "modes" in judging:
        judged["all heads, α .95,<br>compounding"] = judging["modes"]["compounding"]["template"]
    rows = list(judged.values())[::-1]
    figure.add_trace(
        go.Scatter(
            x=[one["estimate"] for one in rows], y=list(judged)[::-1], mode="markers", showlegend=False,
            error_x=_bars(rows), marker={"size": 9, "color": INK.built},
        ),
        1, 2,
    )  # fmt: skip
    style(figure, height=440)
    figure.add_hline(y=0, line={"color": INK.built, "width": 1}, row=1, col=1)  # pyright: ignore[reportArgumentType]
    figure.add_vline(x=0, line={"color": INK.built, "width": 1}, row=1, col=2)  # pyright: ignore[reportArgumentType]
    figure.update_xaxes(title="α (smaller is stronger)", autorange="reversed", col=1)
    figure.update_yaxes(title="gain of recall", tickformat="+.1f", col=1)
    figure.update_xaxes(title="gain of recall", tickformat="+.1f", col=2)
    figure.update_layout(legend={"y": 1.12})
    return figure


def draw_heads(found: Found) -> go.Figure:
    """Effect of every head on the fact's log-probability: steered, and switched off."""
    maps = {"steered (α .1)": found["maps"]["steer"], "switched off": found["maps"]["zero"]}
    limit = max(abs(value) for one in maps.values() for row in one["values"] for value in row)
    figure = make_subplots(1, 2, subplot_titles=list(maps), shared_yaxes=True, horizontal_spacing=0.06)
    for column, one in enumerate(maps.values(), start=1):
        figure.add_trace(
            go.Heatmap(
                z=one["values"], colorscale=colorscale(DIVERGING), zmin=-limit, zmax=limit,
                showscale=column == 2, colorbar=colorbar("nats per token"),
            ),
            1, column,
        )  # fmt: skip
    style(figure, height=520)
    figure.update_layout(margin={"t": 40})
    figure.update_xaxes(title="head", dtick=1)
    figure.update_yaxes(title="layer", col=1)
    return figure


def _bars(rows: Sequence[Found]) -> dict[str, Any]:
    """Error bars from intervals."""
    return {
        "type": "data", "symmetric": False, "thickness": 1.5, "width": 3,
        "array": [one["high"] - one["estimate"] for one in rows],
        "arrayminus": [one["estimate"] - one["low"] for one in rows],
    }  # fmt: skip


FIGURES: Mapping[str, tuple[Sequence[str], Callable[[Found], go.Figure]]] = {
    "loss": (["loss"], draw_loss),
    "controls": (["controls"], draw_controls),
    "bias": (["attention"], draw_bias),
    "steering": (["cause"], draw_steering),
    "heads": (["maps"], draw_heads),
}
"""Every figure: the parts that it needs, and what draws it."""


if __name__ == "__main__":
    main()
