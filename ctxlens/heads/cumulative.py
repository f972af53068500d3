"""Cumulative interventions: steer or ablate the first k heads of a ranking, compared with k random ones."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from ctxlens.errors import InputError
from ctxlens.heads.acting import Action
from ctxlens.heads.answers import Answers
from ctxlens.heads.choose import Head
from ctxlens.heads.parts import ARRAY_PARTS
from ctxlens.models import Model
from ctxlens.results import HeadCurves
from ctxlens.runs import Parts, Progress, Run, digest

RANDOM = "random"


def cumulative_curves(
    model: Model,
    answers: Answers,
    rankings: Mapping[str, Sequence[Head]],
    kind: str = "steer",
    *,
    alpha: float = 0.1,
    sizes: Sequence[int] | None = None,
    n_draws: int = 5,
    seed: int = 0,
    out: Run | None = None,
    progress: Progress | None = None,
) -> HeadCurves:
    """Act on the first k heads of every ranking and of random orders.

    Args:
        model: the model.
        answers: the cells, how they are asked and what is measured.
        rankings: all heads in order, the best first, by name of the ranking (`rank_heads`).
        kind: `steer`, `zero`, `mean` or `blind`.
        alpha: strength of steering.
        sizes: the numbers of heads; by default 1, 2, 4 and so on up to all.
        n_draws: number of random orders of all heads; 0 for no control.
        seed: seed of the draws.
        out: a run folder in which each finished set of heads is kept.
        progress: called with the number of finished sets and the total.

    Raises:
        InputError: there is no ranking, the model lacks a head of a ranking, a size is out of range, or the
            model has a single head, so that there is no random control.
    """
    action = Action(model, kind, alpha, answers)
    orders = _check_rankings(rankings, action)
    sizes = _check_sizes(sizes, len(_all_heads(model)), orders)
    orders += _draw_orders(model, n_draws, seed)
    made_of = [model.identity, answers.as_dict(), action.describe()]
    parts = Parts(out, f"curves-{kind}", made_of, form=ARRAY_PARTS)
    measure = answers.scorer(model)

    def measure_without(heads: list[Head]) -> np.ndarray:
        with action.apply(heads):
            return measure()

    before = parts.get("untouched", measure)
    rows = []
    points = [(order, k) for order in orders for k in sizes]
    for done, (order, k) in enumerate(points, start=1):
        heads = sorted(order.heads[:k])
        effects = parts.get(digest(heads), partial(measure_without, heads)) - before
        rows += [
            {"ranking": order.name, "k": k, "draw": order.draw, "cell": cell.number,
             "context": int(context), "effect": float(effect)}
            for cell, context, effect in zip(answers.cells, answers.contexts, effects, strict=True)
        ]  # fmt: skip
        if progress:
            progress(done, len(points))
    meta = {
        **answers.describe(model),
        **action.describe(),
        "quantity": f"change of {answers.quantity}",
        "untouched": float(np.nanmean(before)),
        "rankings": {order.name: order.heads for order in orders if order.name != RANDOM},
        "draws": n_draws,
        "seed": seed,
    }
    return HeadCurves.from_rows(rows, meta)


class _Order(NamedTuple):
    """All heads in one order: a ranking, or a random draw."""

    name: str
    draw: int
    heads: list[Head]


def _all_heads(model: Model) -> list[Head]:
    return [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]


def _check_rankings(rankings: Mapping[str, Sequence[Head]], action: Action) -> list[_Order]:
    orders = [_Order(name, 0, [(int(a), int(b)) for a, b in ranking]) for name, ranking in rankings.items()]
    if not orders or RANDOM in rankings:
        raise InputError(f"give at least one ranking of heads, by another name than {RANDOM!r}.")
    for order in orders:
        with action.apply(order.heads):  # raises for heads that the model does not have
            pass
    return orders


def _draw_orders(model: Model, n_draws: int, seed: int) -> list[_Order]:
    heads = _all_heads(model)
    if n_draws and len(heads) < 2:
        raise InputError("the model has a single head, so there is no random control; set the draws to 0.")
    return [
        _Order(RANDOM, draw, random.Random(f"cumulative-{seed}-{draw}").sample(heads, len(heads)))
        for draw in range(n_draws)
    ]


def _check_sizes(sizes: Sequence[int] | None, n_heads: int, orders: Sequence[_Order]) -> list[int]:
    if sizes is None:
        doubling = [2**i for i in range(n_heads.bit_length()) if 2**i < n_heads]
        sizes = [*doubling, n_heads]
    if not sizes:
        raise InputError("no numbers of heads were given; give at least one, such as 1,2,4.")
    if bad := [k for k in sizes if not 1 <= k <= n_heads]:
        raise InputError(f"cannot act on {bad[0]} heads: the model has {n_heads} in all.")
    for order in orders:
        if len(set(order.heads)) < max(sizes):
            raise InputError(
                f"ranking {order.name!r} has {len(set(order.heads))} heads, too few for {max(sizes)}."
            )
    return sorted(set(sizes))


__all__ = ["RANDOM", "cumulative_curves"]
