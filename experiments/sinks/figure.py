"""Norm of the hidden state against attention received, for every token and layer, with the thresholds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ctxlens.models import load_model
from ctxlens.models.attention.sinks import (
    LATER,
    NORM_RATIO,
    RECEIVED,
    attention_received,
    norm_ratios,
    sample_queries,
)
from ctxlens.models.backends.batch import TokenBatch
from ctxlens.models.backends.native.layers import find_decoder_layers, note_hidden_states

WIDTH, HEIGHT, GAP, MARGIN = 360, 260, 60, 34
X_RANGE, Y_RANGE = (0.2, 300.0), (1e-4, 1.0)
COLOURS = {"first": "#d55e00", "sink": "#0072b2", "other": "#999999"}
LABELS = {"first": "first token or BOS", "sink": "other sinks", "other": "no sinks"}
CELLS = 60
ESSAY = "addiction.txt"


@torch.no_grad()
def measure_points(name: str, data: Path, n_tokens: int = 700) -> dict[str, Any]:
    """Cells of the plane of norm and attention received, with how many tokens and layers fall into each."""
    model = load_model(name, backend="native", dtype="float32", device="cpu")
    text = (data / "paul_graham" / ESSAY).read_text(encoding="utf-8")
    tokens = model.tokenizer(text, return_tensors="pt")["input_ids"][:, :n_tokens]
    ones = torch.ones_like(tokens)
    batch = TokenBatch(tokens, 2 * ones, ones, torch.tensor([tokens.shape[1]]))
    ratios: list[torch.Tensor] = []
    backend: Any = model.backend
    layers = find_decoder_layers(backend.hf_model, model.n_layers)
    sample = sample_queries(ones.sum(-1))
    with note_hidden_states(layers, lambda hidden: ratios.append(norm_ratios(hidden, ones.bool())[0])):
        pattern = backend.read_pattern(batch, range(model.n_layers), sample.positions, ())
    largest = torch.stack(ratios).cummax(0).values
    received = torch.stack(
        [attention_received(pattern[:, layer], sample)[0] for layer in range(model.n_layers)]
    )
    counts: Counter[tuple[str, int, int]] = Counter()
    words: Counter[str] = Counter()
    for layer in range(model.n_layers):
        for at in range(tokens.shape[1] - LATER):
            x, y = float(largest[layer, at]), float(received[layer][at])
            rests = y >= RECEIVED and (at == 0 or x >= NORM_RATIO)
            kind = "first" if at == 0 else "sink" if rests else "other"
            counts[kind, _cell(x, X_RANGE), _cell(y, Y_RANGE)] += 1
            words[model.tokenizer.decode(tokens[0, at : at + 1])] += rests
    return {
        "model": Path(name).name,
        "tokens": tokens.shape[1],
        "layers": model.n_layers,
        "cells": [[*cell, count] for cell, count in sorted(counts.items())],
        "sinks": {word: count for word, count in words.most_common(12) if count},
    }


def _cell(value: float, limits: tuple[float, float]) -> int:
    low, high = map(math.log, limits)
    place = (math.log(max(value, limits[0])) - low) / (high - low)
    return min(CELLS - 1, int(CELLS * place))


def draw(points: Sequence[Mapping[str, Any]]) -> str:
    """One panel per model, as SVG."""
    width = len(points) * (WIDTH + GAP) + 20
    height = HEIGHT + 2 * MARGIN + 30
    panels = "".join(_panel(of, GAP + number * (WIDTH + GAP)) for number, of in enumerate(points))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>{panels}</svg>\n'
    )


def _panel(of: Mapping[str, Any], left: int) -> str:
    top, bottom = MARGIN, MARGIN + HEIGHT

    def place(value: float, limits: tuple[float, float], size: int) -> float:
        low, high = map(math.log, limits)
        return size * (math.log(value) - low) / (high - low)

    def across(value: float) -> float:
        return left + place(value, X_RANGE, WIDTH)

    def up(value: float) -> float:
        return bottom - place(value, Y_RANGE, HEIGHT)

    title = f"{of['model']}: {of['tokens']} tokens, {of['layers']} layers"
    parts = [
        f'<text x="{left}" y="{top - 12}" font-weight="bold">{title}</text>',
        f'<path d="M{left} {top}V{bottom}H{left + WIDTH}" fill="none" stroke="#666"/>',
        f'<rect x="{across(NORM_RATIO):.1f}" y="{top}" width="{left + WIDTH - across(NORM_RATIO):.1f}" '
        f'height="{up(RECEIVED) - top:.1f}" fill="#0072b2" fill-opacity="0.08"/>',
        f'<path d="M{across(NORM_RATIO):.1f} {top}V{bottom}M{left} {up(RECEIVED):.1f}H{left + WIDTH}" '
        'stroke="#333" stroke-dasharray="4 3" fill="none"/>',
    ]
    for x in (0.3, 1, 3, 10, 30, 100):
        parts.append(f'<text x="{across(x):.1f}" y="{bottom + 14}" text-anchor="middle">{x:g}</text>')
    for y in (0.001, 0.01, 0.1, 1):
        parts.append(f'<text x="{left - 5}" y="{up(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for kind, column, row, count in of["cells"]:
        x = left + WIDTH * (column + 0.5) / CELLS
        y = bottom - HEIGHT * (row + 0.5) / CELLS
        radius = 1.2 + 0.7 * math.log10(count)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{COLOURS[kind]}" fill-opacity="0.75"/>'
        )
    parts.append(
        f'<text x="{left + WIDTH / 2}" y="{bottom + 30}" text-anchor="middle">norm of the hidden state, in '
        "medians of the text (largest so far)</text>"
    )
    parts.append(
        f'<text transform="translate({left - 36} {top + HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        "attention received from later tokens</text>"
    )
    for number, (kind, label) in enumerate(LABELS.items()):
        parts.append(
            f'<text x="{left + 8 + 125 * number}" y="{bottom + 48}" fill="{COLOURS[kind]}">{label}</text>'
        )
    return "".join(parts)


__all__ = ["draw", "measure_points"]
