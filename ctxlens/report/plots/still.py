"""Attention drift as an SVG picture, for pages that run no scripts, such as model cards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from ctxlens.report.plots.allocation import choose_view
from ctxlens.report.plots.look import DIVERGING, FONT, GRID, INK, MUTED, PAGE
from ctxlens.results import Drift

_LEFT, _TOP, _GAP, _FOOT = 56, 72, 64, 70
_WIDEST, _HIGHEST = 640, 720
_LABELLED = 34


def drift_still(
    drifts: Sequence[Drift], role: str = "user", view: str | None = None, *, title: str = ""
) -> str:
    """Draw the change of one role's share by layer and head as SVG, one panel per drift, on one scale.

    All text is escaped. Frames mark the retrieval heads. A number stands in parentheses if its 95 % interval
    contains zero. Where cells are too small for numbers, pointing at a cell shows its number.

    Args:
        drifts: what to draw, from top to bottom.
        role: the role whose share is shown.
        view: a name of `ctxlens.results.VIEWS`; by default `without sinks`, or `raw` where sinks were not
            measured. The heading names it.
        title: heading of the picture.
    """
    seen, remark = choose_view(drifts, view)
    maps = [drift.difference(role, seen) for drift in drifts]
    values = [found.values for found in maps]
    finite = [np.abs(one[np.isfinite(one)]) for one in values]
    top = max([1e-6, *(float(one.max()) for one in finite if one.size)])
    panels, y, width = [], _TOP, 560
    for drift, found, shown in zip(drifts, maps, values, strict=True):
        panel = _panel(drift, shown, found.decided(), top, y)
        panels.append(panel)
        y = panel["bottom"] + _GAP
        width = max(width, panel["right"] + 16)
    height = y - _GAP + 30 + _FOOT
    environment = Environment(
        loader=PackageLoader("ctxlens.report.plots", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    steps = np.linspace(-top, top, 41)
    return environment.get_template("drift.svg.j2").render(
        title=f"{title or f'Change of the attention on {role} tokens'} ({remark or seen})",
        width=width, height=height, font=FONT, ink=INK.light, muted=MUTED.light, panels=panels,
        scale=[
            {"x": _LEFT + 5 * i, "width": 5, "fill": _colour(step, top)} for i, step in enumerate(steps)
        ],
        scale_ticks=[
            {"x": _LEFT + 5 * at + 2.5, "text": f"{steps[at]:+.2f}" if at != 20 else "0"}
            for at in (0, 20, 40)
        ],
        note_x=_LEFT + 250,
    )  # fmt: skip


def _panel(drift: Drift, values: np.ndarray, decided: np.ndarray, top: float, y0: int) -> dict[str, Any]:
    n_layers, n_heads = values.shape
    width = int(np.clip(_WIDEST // n_heads, 5, 56))
    height = int(np.clip(_HIGHEST // n_layers, 5, 26))
    cells, frames = [], []
    for i, layer in enumerate(drift.layers):
        for head in range(n_heads):
            value = float(values[i, head])
            text = "–" if np.isnan(value) else f"{value:+.2f}"
            text = text if decided[i, head] or np.isnan(value) else f"({text})"
            is_strong = not np.isnan(value) and abs(value) > 0.6 * top
            cells.append(
                {
                    "x": _LEFT + head * width, "y": y0 + i * height, "fill": _colour(value, top),
                    "text": text if width >= _LABELLED and height >= 14 else "",
                    "ink": PAGE["card"].light if is_strong else INK.light,
                    "label": f"layer {layer}, head {head}: {text}",
                }
            )  # fmt: skip
        frames.append({"x": _LEFT + int(drift.retrieval[i]) * width, "y": y0 + i * height})
    bottom = y0 + n_layers * height
    first, second = drift.sides
    every_layer, every_head = max(1, -(-n_layers // 16)), max(1, -(-n_heads // 16))
    ticks = [
        {"x": _LEFT - 8, "y": y0 + i * height + height / 2 + 4, "anchor": "end",
         "text": f"layer {layer}" if not i else str(layer)}
        for i, layer in enumerate(drift.layers) if i % every_layer == 0
    ] + [
        {"x": _LEFT + head * width + width / 2, "y": bottom + 16, "anchor": "middle",
         "text": f"head {head}" if not head and width >= _LABELLED else str(head)}
        for head in range(0, n_heads, every_head)
    ]  # fmt: skip
    return {
        "title": f"{second} minus {first}", "top": y0, "bottom": bottom, "right": _LEFT + n_heads * width,
        "cell_width": width - 1, "cell_height": height - 1, "cells": cells, "frames": frames, "ticks": ticks,
    }  # fmt: skip


def _colour(value: float, top: float) -> str:
    """The colour of a value on the diverging scale; grey for NaN."""
    if np.isnan(value):
        return GRID.light
    stops = np.array([[int(stop.light[i : i + 2], 16) for i in (1, 3, 5)] for stop in DIVERGING])
    at = float(np.clip((value / top + 1) / 2, 0, 1)) * (len(stops) - 1)
    mixed = [round(float(np.interp(at, np.arange(len(stops)), stops[:, channel]))) for channel in range(3)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


__all__ = ["drift_still"]
