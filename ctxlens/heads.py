"""Experiments on heads: steering some of them, with random controls, and where the needle is carried.

Steering is the paper's section 2.3; the retrieval head of a layer is its B.3. The paper shows neither
the controls (as many random heads of the same layers) nor the side effect beside the gain.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from ctxlens.cells import Cell, NeedleConfig, NeedleModel, render_cell
from ctxlens.errors import InputError
from ctxlens.needle import Progress, Setting, run_settings
from ctxlens.results import NeedleGrid, RoleAllocation
from ctxlens.roles import RenderedChat, Role
from ctxlens.runs import Run
from ctxlens.stats import bootstrap_mean
from ctxlens.steering import DEFAULT_ROLES, Steering, SteeringMode

if TYPE_CHECKING:
    import pandas as pd

HEAD_SETS = ("all", "retrieval", "random")
"""All heads; the retrieval head of every layer; as many others of the same layers, drawn at random."""
Head = tuple[int, int]


@runtime_checkable
class HeadModel(NeedleModel, Protocol):
    """What head experiments need of a model; `ctxlens.models.Model` has it."""

    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    def read_roles(
        self, chats: Sequence[RenderedChat], *, queries: Any = ..., batch_tokens: int = ...
    ) -> list[RoleAllocation]: ...


def find_retrieval_heads(allocation: RoleAllocation) -> tuple[Head, ...]:
    """The head of each layer with most attention from the answer's position to the user's tokens (B.3).

    Args:
        allocation: shares of `first_answer` queries, read without template as in the paper; the heads
            are then followed with it.

    Returns:
        One pair of layer and head for each layer.
    """
    heads = allocation.retrieval_heads(Role.USER)
    return tuple((int(layer), int(head)) for layer, head in zip(allocation.layers, heads, strict=True))


def draw_random_heads(
    others_than: Sequence[Head], n_heads: int, *, n_draws: int, seed: int = 0
) -> list[tuple[Head, ...]]:
    """Control sets: as many heads of the same layers as the given ones, drawn among the others.

    Args:
        others_than: the heads that a control stands against.
        n_heads: how many heads a layer has.
        n_draws: how many sets; they differ as far as there are enough.
        seed: seed of the draws.

    Raises:
        InputError: a layer has too few other heads.
    """
    taken: dict[int, set[int]] = {}
    for layer, head in others_than:
        taken.setdefault(layer, set()).add(head)
    if crowded := [layer for layer, heads in taken.items() if 2 * len(heads) > n_heads]:
        raise InputError(
            f"layer {crowded[0]} has {n_heads} heads, too few for as many random ones beside "
            f"{len(taken[crowded[0]])}; leave out the random heads."
        )
    rng = random.Random(f"heads-{seed}")
    sets: list[tuple[Head, ...]] = []
    for _ in range(n_draws):
        for _attempt in range(20):
            drawn = tuple(
                (layer, head)
                for layer, heads in taken.items()
                for head in sorted(rng.sample(sorted(set(range(n_heads)) - heads), len(heads)))
            )
            if drawn not in sets:
                break
        sets.append(drawn)
    return sets


def steering_sweep(
    model: HeadModel,
    cells: Sequence[Cell],
    config: NeedleConfig,
    *,
    alphas: Sequence[float] = (0.7, 0.5, 0.3, 0.1, 0.03),
    head_sets: Sequence[str] | Mapping[str, Sequence[Head]] = HEAD_SETS,
    retrieval: Sequence[Head] | None = None,
    n_draws: int = 3,
    roles: tuple[Role, ...] = DEFAULT_ROLES,
    mode: SteeringMode = "paper",
    indicator: bool = False,
    seed: int = 0,
    side_effect: Callable[[Setting], float] | None = None,
    label: str | None = None,
    batch_tokens: int = 8192,
    out: Run | None = None,
    name: str = "steering.parquet",
    progress: Progress | None = None,
) -> NeedleGrid:
    """Recall by α and steered heads, with the same cells throughout.

    Args:
        model: the model.
        cells: from `build_cells`.
        config: their configuration; its conditions are run, usually `template+prefix` alone.
        alphas: what the attention to all other tokens is multiplied by, in (0, 1]. The unsteered model
            (α = 1, heads `none`) is always run, once.
        head_sets: of `HEAD_SETS`, or names with heads of one's own.
        retrieval: the retrieval heads; by default they are found on the cells themselves, without
            template.
        n_draws: how many random sets, each run at every α.
        roles: the roles that are steered to.
        mode: see `Steering`.
        indicator: whether the question carries the model's indicator.
        seed: seed of the random heads.
        side_effect: called once for every setting while it applies; its value, for instance closed-book
            recall, becomes the column `side_effect`.
        label: the model's name in the table; its own by default.
        batch_tokens: how many prompt and new tokens are worked on at once.
        out: a run folder; finished batches are kept there, as in `run_needle`.
        name: file name of the grid.
        progress: called with the numbers of finished and of all answers.

    Raises:
        InputError: an unknown head set, a head that the model does not have, α outside (0, 1].
    """
    settings = [Setting(label or model.name, indicator)]
    sets = _head_sets(model, cells, config, head_sets, retrieval, n_draws, seed)
    for set_name, draw, heads in sets:
        for alpha in dict.fromkeys(alphas):
            steering = Steering(alpha, roles, heads, mode)
            steering.check_heads(model.n_layers, model.n_heads)
            if alpha != 1:
                settings.append(replace(settings[0], steering=steering, heads=set_name, draw=draw))
    meta = {
        "config": config.as_dict(),
        "mode": mode,
        "roles": [role.label for role in roles],
        "head_sets": [{"heads": set_name, "draw": draw, "chosen": heads} for set_name, draw, heads in sets],
    }

    def measure(setting: Setting) -> dict[str, float]:
        return {"side_effect": float(side_effect(setting))} if side_effect else {}

    return run_settings(
        model, cells, config, settings, meta=meta, measure=measure if side_effect else None,
        batch_tokens=batch_tokens, out=out, name=name, progress=progress,
    )  # fmt: skip


def _head_sets(
    model: HeadModel,
    cells: Sequence[Cell],
    config: NeedleConfig,
    wanted: Sequence[str] | Mapping[str, Sequence[Head]],
    retrieval: Sequence[Head] | None,
    n_draws: int,
    seed: int,
) -> list[tuple[str, int, Any]]:
    """Name, draw and heads of each set."""
    if isinstance(wanted, Mapping):
        return [(name, 0, tuple(heads)) for name, heads in wanted.items()]
    if unknown := [name for name in wanted if name not in HEAD_SETS]:
        raise InputError(f"unknown heads {', '.join(unknown)}; choose of {', '.join(HEAD_SETS)}.")
    sets: list[tuple[str, int, Any]] = [("all", 0, "all")] if "all" in wanted else []
    if "retrieval" in wanted or "random" in wanted:
        if retrieval is None:
            chats = [render_cell(model, cell, config, "plain+prefix") for cell in _spread(cells, 64)]
            read = model.read_roles(chats, queries="first_answer")
            retrieval = find_retrieval_heads(RoleAllocation.concat(read))
        if "retrieval" in wanted:
            sets.append(("retrieval", 0, tuple(retrieval)))
        if "random" in wanted:
            drawn = draw_random_heads(retrieval, model.n_heads, n_draws=n_draws, seed=seed)
            sets += [("random", draw, heads) for draw, heads in enumerate(drawn)]
    return sets


@dataclass(frozen=True)
class NeedleLayers:
    """How much each layer's best head looks at the needle while the needle is repeated.

    Attributes:
        table: one row a layer: `layer`; `head` (the layer's best); `needle_share` (attention from the
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
    """Find the layer that carries the needle: a stated rule for the layer to score with.

    The right answer, the needle's own sentence, is put in the model's mouth without template, and the
    attention from its positions to the needle in the context is read. Heads that copy look there. The
    layer whose best head has most is the one in which dependence on the context can be seen.

    Args:
        model: the model.
        cells: from `build_cells`.
        config: their configuration.
        at_most: how many cells are read, spread evenly over the grid.
        batch_tokens: padded tokens in one forward pass.
    """
    import pandas as pd

    chats, uniform = [], []
    for cell in _spread(cells, at_most):
        # The needle's tokens are told apart by giving them a role that no other token has here.
        chat = render_cell(model, cell, config, "plain+prefix", answer=cell.needle.sentence)
        role = chat.role.copy()
        role[_needle_tokens(chat, cell)] = Role.TOOL
        chats.append(replace(chat, role=role))
        uniform.append(float(np.mean((role == Role.TOOL).sum() / (chat.response_positions() + 1))))
    read = model.read_roles(chats, queries="response_mean", batch_tokens=batch_tokens)
    by_cell = np.stack([allocation.share(Role.TOOL)[..., 0] for allocation in read])
    shares = by_cell.mean(0)
    rows = []
    for row, layer in enumerate(read[0].layers):
        head = int(shares[row].argmax())
        share = bootstrap_mean(by_cell[:, row, head])
        rows.append(
            {
                "layer": int(layer),
                "head": head,
                "needle_share": share.estimate,
                "low": share.low,
                "high": share.high,
                "uniform": float(np.mean(uniform)),
            }
        )
    return NeedleLayers(pd.DataFrame(rows), shares)


def _needle_tokens(chat: RenderedChat, cell: Cell) -> np.ndarray:
    start, end = (chat.text.index(cell.context.text) + at for at in cell.context.needle_span)
    return (chat.spans[:, 0] < end) & (chat.spans[:, 1] > start) & (chat.role == Role.USER)


def _spread(cells: Sequence[Cell], at_most: int) -> list[Cell]:
    chosen = np.linspace(0, len(cells) - 1, min(at_most, len(cells))).round().astype(int)
    return [cells[i] for i in dict.fromkeys(chosen.tolist())]


__all__ = [
    "HEAD_SETS", "HeadModel", "NeedleLayers", "draw_random_heads", "find_retrieval_heads", "needle_layer",
    "steering_sweep",
]  # fmt: skip
