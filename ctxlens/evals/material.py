"""The texts, facts and questions for a model: the project's own, or an embedded model's own world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ctxlens.evals.knowledge import KNOWLEDGE
from ctxlens.evals.needle.defaults import is_organism
from ctxlens.evals.needle.haystack import Haystack, load_haystack
from ctxlens.evals.needle.needles import Needle, draw_needle, neutral_needles
from ctxlens.evals.texts import Material
from ctxlens.organism.world import load_world

_DRAWN = 60
_ASKED = 40


def choose_material(
    model: str, *, haystack: str | Haystack | None = None, facts: Sequence[Needle] = (), seed: int = 0
) -> Material:
    """The texts, facts and questions for a model.

    Args:
        model: name or folder of the model.
        haystack: the user's own haystack; None for the default.
        facts: the user's own facts; empty for the default.
        seed: seed of texts and drawn facts.
    """
    if is_organism(model):
        drawn = {}
        for number in range(_DRAWN):
            fact = draw_needle("known", f"audit-{seed}-{number}")
            drawn.setdefault(fact.question, fact)
        named = tuple(replace(fact, name=f"known-{number}") for number, fact in enumerate(drawn.values()))
        questions = tuple(load_world().closed_book(_ASKED, seed=seed))
        straw = load_haystack(haystack or "organism", seed=seed)
        return Material("the embedded model's own world", straw, tuple(facts) or named, questions)
    straw = load_haystack(haystack or "neutral", seed=seed)
    name = "neutral texts and invented facts" if haystack is None else f"{straw.name} and invented facts"
    return Material(name, straw, tuple(facts) or tuple(neutral_needles().values()), KNOWLEDGE)


__all__ = ["choose_material"]
