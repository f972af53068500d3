"""What empty answers do to a comparison of conditions, in words for the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ctxlens.chat.condition import Condition
from ctxlens.errors import InputError
from ctxlens.results import Evaluation

_UNEVEN = 0.05
"""Shares of empty answers that differ by less are not remarked upon."""


def describe_faults(evaluation: Evaluation, task: str) -> list[str]:
    """Shares by variant, one line each of empty answers and of answers cut off, where a task has any."""
    variants = list(dict.fromkeys(variant for name, _, variant in evaluation.rows() if name == task))
    told = []
    for column, what in (("empty", "empty"), ("cut", "cut off")):
        if any(evaluation.count(column, task, variant) for variant in variants):
            shares = (
                f"{_name(evaluation, one)} {evaluation.share(column, task, one):.0%}" for one in variants
            )
            told.append(f"{what}: {', '.join(shares)}")
    return told


def explain_empties(evaluation: Evaluation) -> str:
    """One sentence if conditions differ in their share of empty answers; else an empty text."""
    worst, conditions, others = _find_uneven(evaluation)
    if not worst:
        return ""
    more = f", and {others} more" if others else ""
    advice = _advise(conditions, evaluation.meta)
    return (
        f"Conditions differ in their share of empty answers ({worst}{more}), and an empty answer counts as "
        f"wrong, so their difference is partly one of answering at all: {advice}."
    )


def _find_uneven(evaluation: Evaluation) -> tuple[str, list[str], int]:
    """The task and model with the largest difference in words, its conditions, and the number of others."""
    found = []
    for task in evaluation.tasks:
        for model in dict.fromkeys(model for model, _ in evaluation.variants):
            shares = {
                condition: evaluation.share("empty", task, (model, condition))
                for name, condition in evaluation.variants
                if name == model and len(evaluation.where(task=task, model=model, condition=condition))
            }
            if shares and max(shares.values()) - min(shares.values()) >= _UNEVEN:
                found.append((max(shares.values()) - min(shares.values()), task, model, shares))
    if not found:
        return "", [], 0
    _, task, model, shares = max(found, key=lambda one: one[0])
    several = len({name for name, _ in evaluation.variants}) > 1
    where = f"{task}, {model}" if several else task
    told = ", ".join(f"{condition} {share:.0%}" for condition, share in shares.items())
    return f"{where}: {told}", list(shares), len(found) - 1


def _advise(conditions: list[str], meta: Mapping[str, Any]) -> str:
    """What to do: ask with examples, otherwise with a prefix, otherwise read."""
    if not meta.get("num_fewshot"):
        return "ask with examples (--num-fewshot 2), which show under every condition that an answer follows"
    try:
        asked = [Condition.parse(one) for one in conditions]
    except InputError:
        asked = []
    if asked and not any(one.prefix for one in asked):
        names = ",".join(replace(one, prefix=True).name for one in asked)
        return f"let every answer begin with the same words (--conditions {names})"
    return "read the answers before you compare means"


def _name(evaluation: Evaluation, variant: tuple[str, str]) -> str:
    """The parts of a variant that tell it from the others."""
    models, conditions = ({one[i] for one in evaluation.variants} for i in (0, 1))
    parts = [part for part, all_ in zip(variant, (models, conditions), strict=True) if len(all_) > 1]
    return " ".join(parts or [variant[1]])


__all__ = ["describe_faults", "explain_empties"]
