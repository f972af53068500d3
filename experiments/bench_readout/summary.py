"""From the results file to a table and a figure; nothing is measured here and no model is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ctxlens.report.plots.theme import SERIES

_SYMBOLS = {"floor": "line-ew", "ours": "circle", "peer": "x"}


def timing_rows(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """For every length and way, seconds and ratio to plain of the same round: median, least, most."""
    for length, found in sorted(data["lengths"].items(), key=lambda item: int(item[0])):
        for name in data["ways"]:
            row: dict[str, Any] = {"length": int(length), "way": name, "dead": found["dead"].get(name)}
            rounds = [r for r in found["rounds"] if name in r]
            if rounds:
                ratios = [r[name] / r["plain"] for r in rounds]
                row["seconds"] = [f(r[name] for r in rounds) for f in (median, min, max)]
                row["ratio"] = [f(ratios) for f in (median, min, max)]
            memory = found["memory"]
            if "peak_bytes" in memory.get(name, {}) and "peak_bytes" in memory.get("plain", {}):
                row["extra_bytes"] = memory[name]["peak_bytes"] - memory["plain"]["peak_bytes"]
                row["once_seconds"] = memory[name].get("seconds")
            row["forecast_bytes"] = found["forecast_bytes"][name]
            row["goal"] = found["goals"][name]
            yield row


def markdown(data: Mapping[str, Any]) -> str:
    """Tables of time, memory, decoding, accuracy and profile."""
    lines = [
        "| L | way | s, median | least–most | × plain | least–most | goal | extra peak, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in timing_rows(data):
        label = data["ways"][row["way"]]["label"]
        time, span, ratio, ratios = "–", "–", "–", "–"
        if row["dead"]:
            time = f"dead: {row['dead']}"
        elif "seconds" in row:
            time, span = f"{row['seconds'][0]:.3g}", "–".join(f"{s:.3g}" for s in row["seconds"][1:])
            ratio, ratios = f"{row['ratio'][0]:.2f}", "–".join(f"{r:.2f}" for r in row["ratio"][1:])
        elif row.get("once_seconds"):
            time = f"{row['once_seconds']:.3g} (one cold pass)"
        goal = f"≤ {row['goal']:.2f}" if row["goal"] else ""
        extra = f"{row['extra_bytes'] / 1e6:.0f}" if "extra_bytes" in row else "–"
        lines.append(
            f"| {row['length']} | {label} | {time} | {span} | {ratio} | {ratios} | {goal} | {extra} |"
        )
    if data.get("decode"):
        lines += [
            "",
            "| after L tokens | plain, ms a token | steered, ms a token | ratio of medians | of least |",
        ]
        lines += ["|---|---|---|---|---|"]
        for length, times in data["decode"].items():
            plain, steered = times["plain"], times["steered"]
            lines.append(
                f"| {length} | {1e3 * median(plain):.2f} | {1e3 * median(steered):.2f} "
                f"| {median(steered) / median(plain):.3f} | {min(steered) / min(plain):.3f} |"
            )
    if data.get("accuracy"):
        lines += ["", "| shares | largest difference | mean |", "|---|---|---|"]
        for name, value in data["accuracy"].items():
            if isinstance(value, dict):
                lines.append(f"| {name.replace('_', ' ')} | {value['max']:.1e} | {value['mean']:.1e} |")
    if data.get("profile"):
        ways = data["profile"]["ms"]
        lines += ["", f"| ms at L {data['profile']['length']} | " + " | ".join(ways) + " |"]
        lines += ["|---|" + "---|" * len(ways)]
        for kind in next(iter(ways.values())):
            lines.append(f"| {kind} | " + " | ".join(f"{ms[kind]:.1f}" for ms in ways.values()) + " |")
    return "\n".join(lines)


def draw(data: Mapping[str, Any]) -> go.Figure:
    """Time over the plain forward's, and peak memory beyond it, against prompt length."""
    figure = make_subplots(1, 2, subplot_titles=("time, × plain forward", "peak memory beyond plain, MB"))
    rows = list(timing_rows(data))
    for i, (name, way) in enumerate(data["ways"].items()):
        colour = SERIES[i % len(SERIES)].built
        style = {
            "name": way["label"],
            "legendgroup": name,
            "mode": "lines+markers",
            "line": {"color": colour, "dash": "dot" if way["kind"] == "peer" else "solid"},
            "marker": {"symbol": _SYMBOLS[way["kind"]], "size": 9},
        }
        own = [row for row in rows if row["way"] == name]
        timed = [row for row in own if "ratio" in row]
        middle = [row["ratio"][0] for row in timed]
        error = {
            "type": "data",
            "symmetric": False,
            "array": [row["ratio"][2] - row["ratio"][0] for row in timed],
            "arrayminus": [row["ratio"][0] - row["ratio"][1] for row in timed],
        }
        figure.add_scatter(x=[row["length"] for row in timed], y=middle, error_y=error, row=1, col=1, **style)
        weighed = [row for row in own if row.get("extra_bytes", 0) > 0]
        figure.add_scatter(
            x=[row["length"] for row in weighed],
            y=[row["extra_bytes"] / 1e6 for row in weighed],
            showlegend=False,
            row=1,
            col=2,
            **style,
        )
    figure.update_xaxes(type="log", title="prompt length, tokens")
    figure.update_yaxes(type="log")
    config, machine = data["config"], data["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {config['threads']} threads"
    figure.update_layout(
        title=f"{config['n_layers']} layers, d_model {config['d_model']}, {config['dtype']}: {where}",
        template="plotly_white",
    )
    return figure


__all__ = ["draw", "markdown", "timing_rows"]
