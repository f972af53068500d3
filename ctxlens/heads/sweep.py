"""Steering sweeps: recall by α for all heads, the retrieval heads and equally many random ones.

The paper's section 2.3 shows the gain only, without the controls and the side effects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ctxlens.chat.roles import Role
from ctxlens.errors import InputError
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.prompts import Cell, render_cell
from ctxlens.evals.needle.run import Setting, run_settings
from ctxlens.heads.choose import Head, HeadModel, draw_random_heads, find_retrieval_heads, spread
from ctxlens.models.attention.steering import DEFAULT_ROLES, Steering, SteeringMode
from ctxlens.results import NeedleGrid, RoleAllocation
from ctxlens.runs import Progress, Run

HEAD_SETS = ("all", "retrieval", "random")
"""All heads; the retrieval head of every layer; as many random other heads of the same layers."""


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
    """Measure recall by α and set of steered heads, always on the same cells.

    Args:
        model: the model.
        cells: from `build_cells`.
        config: their configuration; its conditions are run, usually `template+prefix` alone.
        alphas: factors on the attention to all other tokens, in (0, 1]. The unsteered model (α = 1, heads
            `none`) always runs once.
        head_sets: names from `HEAD_SETS`, or a mapping of names to custom sets of heads.
        retrieval: the retrieval heads; by default they are found on the cells themselves, without the
            template.
        n_draws: number of random sets, each of which runs at every α.
        roles: the roles to which attention is steered.
        mode: see `Steering`.
        indicator: whether the question carries the model's indicator.
        seed: seed of the random heads.
        side_effect: called once per setting while the setting applies; its value, for instance closed-book
            recall, becomes the column `side_effect`.
        label: the name in the table; by default the model's own.
        batch_tokens: upper bound on the prompt and new tokens per batch.
        out: a run folder; finished batches are kept there, as in `run_needle`.
        name: file name of the grid.
        progress: called with the number of finished answers and the total.

    Raises:
        InputError: a head set is unknown, the model lacks a head, or α is outside (0, 1].
    """
    sets = _head_sets(model, cells, config, head_sets, retrieval, n_draws, seed)
    settings = sweep_settings(model, sets, alphas, label=label, roles=roles, mode=mode, indicator=indicator)
    meta = describe_sweep(config, sets, roles=roles, mode=mode)

    def measure(setting: Setting) -> dict[str, float]:
        return {"side_effect": float(side_effect(setting))} if side_effect else {}

    return run_settings(
        model, cells, config, settings, meta=meta, measure=measure if side_effect else None,
        batch_tokens=batch_tokens, out=out, name=name, progress=progress,
    )  # fmt: skip


def sweep_settings(
    model: HeadModel,
    sets: Sequence[tuple[str, int, Any]],
    alphas: Sequence[float],
    *,
    label: str | None = None,
    roles: tuple[Role, ...] = DEFAULT_ROLES,
    mode: SteeringMode = "paper",
    indicator: bool = False,
) -> list[Setting]:
    """The settings of a sweep: the unsteered model first, then every set of heads at every α.

    Args:
        model: the model.
        sets: name, number of the draw and heads of each set; `all` in place of heads steers all.
        alphas: factors on the attention to all other tokens, in (0, 1].
        label: the model's name in the table; by default its own.
        roles: the roles to which attention is steered.
        mode: see `Steering`.
        indicator: whether the question carries the model's indicator.

    Raises:
        InputError: the model lacks a head, or α is outside (0, 1].
    """
    settings = [Setting(label or model.name, indicator)]
    for name, draw, heads in sets:
        for alpha in dict.fromkeys(alphas):
            steering = Steering(alpha, roles, heads, mode)
            steering.check_heads(model.n_layers, model.n_heads)
            if alpha != 1:
                settings.append(replace(settings[0], steering=steering, heads=name, draw=draw))
    return settings


def describe_sweep(
    config: NeedleConfig,
    sets: Sequence[tuple[str, int, Any]],
    *,
    roles: tuple[Role, ...] = DEFAULT_ROLES,
    mode: SteeringMode = "paper",
) -> dict[str, Any]:
    """What the grid of a sweep says of its heads and its steering, in its `meta`."""
    return {
        "config": config.as_dict(),
        "mode": mode,
        "roles": [role.label for role in roles],
        "head_sets": [{"heads": name, "draw": draw, "chosen": heads} for name, draw, heads in sets],
    }


def _head_sets(
    model: HeadModel,
    cells: Sequence[Cell],
    config: NeedleConfig,
    wanted: Sequence[str] | Mapping[str, Sequence[Head]],
    retrieval: Sequence[Head] | None,
    n_draws: int,
    seed: int,
) -> list[tuple[str, int, Any]]:
    """Name, number of the draw and heads of each set."""
    if isinstance(wanted, Mapping):
        return [(name, 0, tuple(heads)) for name, heads in wanted.items()]
    if unknown := [name for name in wanted if name not in HEAD_SETS]:
        raise InputError(f"unknown heads {', '.join(unknown)}; choose from {', '.join(HEAD_SETS)}.")
    sets: list[tuple[str, int, Any]] = [("all", 0, "all")] if "all" in wanted else []
    if "retrieval" in wanted or "random" in wanted:
        if retrieval is None:
            chats = [render_cell(model, cell, config, "plain+prefix") for cell in spread(cells, 64)]
            read = model.read_roles(chats, queries="first_answer")
            retrieval = find_retrieval_heads(RoleAllocation.concat(read))
        if "retrieval" in wanted:
            sets.append(("retrieval", 0, tuple(retrieval)))
        if "random" in wanted:
            drawn = draw_random_heads(
                retrieval, model.n_heads, n_draws=n_draws, seed=seed, n_layers=model.n_layers
            )
            sets += [("random", draw, heads) for draw, heads in enumerate(drawn)]
    return sets


__all__ = ["HEAD_SETS", "describe_sweep", "steering_sweep", "sweep_settings"]
