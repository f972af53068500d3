"""One head at a time: the effect on the needle of steering it or switching it off."""

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
    """Steer or ablate one head at a time and measure the change, paired by cell.

    Args:
        model: the model.
        answers: the cells, how they are asked and what is measured. `mean` takes the heads' mean outputs
            from these cells, with the needle as the answer.
        kind: `steer`, `zero`, `mean` or `blind`.
        alpha: strength of steering.
        heads: the heads to measure, by default all; the others are NaN.
        out: a run folder in which each finished head is kept.
        progress: called with the number of finished heads and the total.

    Returns:
        The measure with the intervention minus the measure without it, by cell. A value below zero means that
        the head helps to produce the needle (or that steering it harms).

    Raises:
        InputError: the kind is unknown, alpha is outside (0, 1], or the model lacks a head.
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
    """The map with the opposite sign: what is lost by switching a head off is what the head contributes."""
    return replace(found, effects=-found.effects)


def rank_heads(found: HeadMap) -> tuple[Head, ...]:
    """Rank all heads by how much they contribute to the needle according to a map.

    For ablations, the head whose removal costs most comes first; for all other maps, the largest value.

    Raises:
        InputError: the map does not cover all heads.
    """
    if np.isnan(found.values).any():
        raise InputError("only a map of all heads can rank them; measure the whole map first.")
    return found.ranking(ascending=found.kind in ("zero", "mean", "blind"))


__all__ = ["act_on_each_head", "opposite", "rank_heads"]
