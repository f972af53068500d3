"""More and more heads: steering or ablating the first k of a ranking, against k random ones."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence

import numpy as np

from ctxlens.errors import InputError
from ctxlens.heads.acting import Action
from ctxlens.heads.answers import Answers
from ctxlens.heads.choose import Head
from ctxlens.heads.kept import KeptUnits
from ctxlens.models import Model
from ctxlens.results import HeadCurves
from ctxlens.runs import Progress, Run

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
    """Act on the first k heads of every ranking, and of random orders.

    Args:
        model: the model.
        answers: the cells, how they are asked and what is measured.
        rankings: names with all heads in order, the best first (`rank_heads`).
        kind: `steer`, `zero`, `mean` or `blind`.
        alpha: strength of steering.
        sizes: the numbers of heads; by default 1, 2, 4 and so on up to all.
        n_draws: how many random orders of all heads; 0: no control.
        seed: seed of the draws.
        out: a run folder in which each finished set of heads is kept.
        progress: called with the numbers of finished and of all sets.

    Raises:
        InputError: no ranking, one with a head that the model does not have, a size that is none, or a model
            with a single head, for which there is no random control.
    """
    action = Action(model, kind, alpha, answers)
    everything = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    sizes = _check_sizes(sizes, len(everything))
    orders = [(name, 0, [(int(a), int(b)) for a, b in ranking]) for name, ranking in rankings.items()]
    if not orders or RANDOM in rankings:
        raise InputError(f"give at least one ranking of heads, by another name than {RANDOM!r}.")
    for name, _, order in orders:
        if len(set(order)) < max(sizes):
            raise InputError(f"ranking {name!r} has {len(set(order))} heads, too few for {max(sizes)}.")
        with action.apply(order):  # refuses heads that are not there
            pass
    if n_draws and len(everything) < 2:
        raise InputError("the model has a single head, so there is no random control; set the draws to 0.")
    for draw in range(n_draws):
        drawn = random.Random(f"cumulative-{seed}-{draw}").sample(everything, len(everything))
        orders.append((RANDOM, draw, drawn))

    units = KeptUnits.of(out, f"curves-{kind}", model.identity, answers.as_dict(), action.describe())
    measure = answers.scorer(model)
    before = units.get("untouched", measure)
    rows, done = [], 0
    for name, draw, order in orders:
        for k in sizes:
            chosen = sorted(order[:k])

            def score(chosen: list[Head] = chosen) -> np.ndarray:
                with action.apply(chosen):
                    return measure()

            effects = units.get(hashlib.sha256(str(chosen).encode()).hexdigest()[:16], score) - before
            rows += [
                {"ranking": name, "k": k, "draw": draw, "cell": cell.number, "context": int(context),
                 "effect": float(effect)}
                for cell, context, effect in zip(answers.cells, answers.contexts, effects, strict=True)
            ]  # fmt: skip
            done += 1
            if progress:
                progress(done, len(orders) * len(sizes))
    meta = {
        **answers.describe(model),
        **action.describe(),
        "quantity": f"change of {answers.quantity}",
        "untouched": float(np.nanmean(before)),
        "rankings": {name: order for name, _, order in orders if name != RANDOM},
        "draws": n_draws,
        "seed": seed,
    }
    return HeadCurves.from_rows(rows, meta)


def _check_sizes(sizes: Sequence[int] | None, n_heads: int) -> list[int]:
    if sizes is None:
        doubling = [2**i for i in range(n_heads.bit_length()) if 2**i < n_heads]
        return [*doubling, n_heads]
    if bad := [k for k in sizes if not 1 <= k <= n_heads]:
        raise InputError(f"cannot act on {bad[0]} heads: the model has {n_heads} in all.")
    if not sizes:
        raise InputError("no numbers of heads were given; give at least one, such as 1,2,4.")
    return sorted(set(sizes))


__all__ = ["RANDOM", "cumulative_curves"]
