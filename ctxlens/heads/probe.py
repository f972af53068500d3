"""Where the needle is carried: the layer whose best head attends to it most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from ctxlens.chat.condition import parse_conditions
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.prompts import Cell, render_cell
from ctxlens.heads.answers import needle_tokens
from ctxlens.heads.choose import HeadModel, spread
from ctxlens.stats import bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class NeedleLayers:
    """How much each layer's best head attends to the needle while the needle is repeated.

    Attributes:
        table: one row per layer: `layer`; `head` (the layer's best); `needle_share` (attention from the
            answer's positions to the needle, 0 to 1, mean over cells) with its 95 % interval `low`,
            `high`; `uniform` (the share if attention were uniform).
        shares: the mean share of every head.
    """

    table: pd.DataFrame
    shares: Float[np.ndarray, "layer head"]

    @property
    def best(self) -> int:
        """The layer that carries the needle: the one with the largest share."""
        return int(self.table["layer"].iloc[self.table["needle_share"].to_numpy().argmax()])


def needle_layer(
    model: HeadModel,
    cells: Sequence[Cell],
    config: NeedleConfig,
    *,
    at_most: int = 64,
    batch_tokens: int = 8192,
) -> NeedleLayers:
    """Find the layer that carries the needle, a stated rule for choosing the layer of the scores.

    The model is given the right answer, the needle's own sentence, without the template, and the attention
    from the answer's positions to the needle in the context is read. Heads that copy attend there, so the
    layer whose best head attends most is the one that shows dependence on the context.

    Args:
        model: the model.
        cells: from `build_cells`.
        config: their configuration.
        at_most: upper bound on the cells that are read, evenly spaced over the grid.
        batch_tokens: padded tokens in one forward pass.
    """
    import pandas as pd

    read = list(spread(cells, at_most))
    chats = [render_cell(model, cell, config, "plain+prefix", answer=cell.needle.sentence) for cell in read]
    needles = [needle_tokens(chat, cell) for chat, cell in zip(chats, read, strict=True)]
    uniform = [
        float(np.mean(needle.sum() / (chat.response_positions() + 1)))
        for chat, needle in zip(chats, needles, strict=True)
    ]
    by_cell = np.stack(
        [found[..., 0] for found in model.read_attention_to(chats, needles, batch_tokens=batch_tokens)]
    )
    shares = by_cell.mean(0)
    rows = []
    for layer in range(len(shares)):
        head = int(shares[layer].argmax())
        share = bootstrap_mean(by_cell[:, layer, head])
        rows.append(
            {
                "layer": layer,
                "head": head,
                "needle_share": share.estimate,
                "low": share.low,
                "high": share.high,
                "uniform": float(np.mean(uniform)),
            }
        )
    return NeedleLayers(pd.DataFrame(rows), shares)


def find_needle_layers(
    model: HeadModel, *, length: int = 250, texts: int = 24, seed: int = 0, batch_tokens: int = 8192
) -> NeedleLayers:
    """The same in neutral texts that ship with this package, each with an invented fact.

    Args:
        model: the model.
        length: length of the texts, in tokens; at most three quarters of the window.
        texts: number of texts, a multiple of four: a quarter of them for each of four depths.
        seed: seed of texts and facts.
        batch_tokens: padded tokens in one forward pass.

    Raises:
        InputError: the texts do not fit the model's window.
    """
    config = NeedleConfig(
        lengths=(min(length, 3 * model.n_ctx // 4),), depths=(10, 40, 60, 90), needles=("neutral",),
        cases_per_cell=max(1, texts // 4), conditions=parse_conditions("plain+prefix"), max_new_tokens=1,
        seed=seed,
    )  # fmt: skip
    cells = build_cells(model, config, load_haystack("neutral", seed=seed))
    return needle_layer(model, cells, config, batch_tokens=batch_tokens)


__all__ = ["NeedleLayers", "find_needle_layers", "needle_layer"]
