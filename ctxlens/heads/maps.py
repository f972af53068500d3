"""One head at a time: what steering it, or switching it off, does to the needle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ctxlens.errors import InputError
from ctxlens.heads.acting import Action
from ctxlens.heads.answers import Answers
from ctxlens.heads.choose import Head
from ctxlens.heads.parts import ARRAY_PARTS
from ctxlens.models import Model
from ctxlens.results import HeadMap
from ctxlens.runs import Parts, Progress, Run


def act_on_each_head(
    model: Model,
    answers: Answers,
    kind: str,
    *,
    alpha: float = 0.1,
    heads: Sequence[Head] | None = None,
    out: Run | None = None,
    progress: Progress | None = None,
) -> HeadMap:
    """Steer or ablate one head at a time; the change of the measure, paired by cell.

    Args:
        model: the model.
        answers: the cells, how they are asked and what is measured. `mean` takes the heads' mean outputs
            from these cells, with the needle as the answer.
        kind: `steer`, `zero`, `mean` or `blind`.
        alpha: strength of steering.
        heads: the heads to try, all by default; the others are NaN.
        out: a run folder in which each finished head is kept.
        progress: called with the numbers of finished and of all heads.

    Returns:
        With minus without, by cell: below zero, the head helps to say the needle (or steering it harms).

    Raises:
        InputError: an unknown kind, alpha outside (0, 1], heads that the model does not have.
    """
    action = Action(model, kind, alpha, answers)
    chosen = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    if heads is not None:
        chosen = list(dict.fromkeys((int(layer), int(head)) for layer, head in heads))
        with action.apply(chosen):
            pass
    made_of = [model.identity, answers.as_dict(), action.describe()]
    parts = Parts(out, f"map-{kind}", made_of, form=ARRAY_PARTS)
    measure = answers.scorer(model)
    before = parts.get("untouched", measure)
    effects = np.full((len(before), model.n_layers, model.n_heads), np.nan)
    for done, (layer, head) in enumerate(chosen, start=1):

        def score(layer: int = layer, head: int = head) -> np.ndarray:
            with action.apply([(layer, head)]):
                return measure()

        effects[:, layer, head] = parts.get(f"{layer}.{head}", score) - before
        if progress:
            progress(done, len(chosen))
    meta = {
        **answers.describe(model),
        **action.describe(),
        "quantity": f"change of {answers.quantity}",
        "untouched": float(np.nanmean(before)),
    }
    return HeadMap(effects, answers.contexts, kind, meta)


def opposite(found: HeadMap) -> HeadMap:
    """The map with its sign turned: what switching a head off takes away is what the head gives."""
    return replace(found, effects=-found.effects)


def rank_heads(found: HeadMap) -> tuple[Head, ...]:
    """All heads in the order in which a map says that they serve the needle.

    Ablations: the head whose loss costs most comes first; all other maps: the largest number.

    Raises:
        InputError: the map does not hold all heads.
    """
    if np.isnan(found.values).any():
        raise InputError("only a map of all heads can rank them; measure the whole map first.")
    return found.ranking(ascending=found.kind in ("zero", "mean", "blind"))


__all__ = ["act_on_each_head", "opposite", "rank_heads"]
