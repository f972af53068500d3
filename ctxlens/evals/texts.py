"""Long texts with several facts in each, so that one reading of a text serves several questions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ctxlens.errors import InputError
from ctxlens.evals.closed_book import AnsweredQuestion
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.contexts import gather_straw, place_needles
from ctxlens.evals.needle.controls import Renderer
from ctxlens.evals.needle.haystack import Haystack
from ctxlens.evals.needle.needles import Needle
from ctxlens.evals.needle.prompts import Cell

_SHOWN_PARTS = 4
"""Depths that tables and figures distinguish."""


@dataclass(frozen=True)
class Material:
    """The texts of an audit or of the readings during a training.

    Attributes:
        name: what they are, for the output.
        haystack: the texts around the facts.
        facts: facts that the model cannot know, each with its question.
        questions: questions that need no text, for the side effects of steering.
    """

    name: str
    haystack: Haystack
    facts: tuple[Needle, ...]
    questions: tuple[AnsweredQuestion, ...]


def build_cells(
    model: Renderer, material: Material, config: NeedleConfig, per_text: int | Sequence[int]
) -> list[Cell]:
    """Hide several facts in every text, and ask for each of them.

    All questions about a text have the same text before them, so that a model with a cache reads it once. The
    depths of a text's facts are drawn from equal parts of the text; the depth of a cell is the middle of its
    quarter of the text, and the depth that was built stands in its context. Texts and facts depend on
    `config.seed`.

    Args:
        model: tokenizer and window.
        material: the haystack and the facts.
        config: `lengths` (numbers of tokens) and `cases_per_cell` (texts of each length).
        per_text: facts in every text, or in the texts of each length.

    Returns:
        Cells in the order of length, text and depth; `case` is the number of the text.

    Raises:
        InputError: there are fewer facts than a text needs, or the haystack is too short.
    """
    assert not isinstance(config.lengths, int), "lengths are numbers of tokens"
    counts = [per_text] * len(config.lengths) if isinstance(per_text, int) else list(per_text)
    if max(counts) > len(material.facts):
        raise InputError(f"a text needs {max(counts)} facts, but there are only {len(material.facts)}.")
    cells: list[Cell] = []
    for length, n in zip(config.lengths, counts, strict=True):
        for text in range(config.cases_per_cell):
            rng = random.Random(f"audit-{config.seed}-{length}-{text}")
            facts = rng.sample(list(material.facts), n)
            depths = [100 * (part + rng.random()) / n for part in range(n)]
            straw = gather_straw(model.tokenizer, material.haystack, text, length)
            contexts = place_needles(
                model.tokenizer,
                straw,
                [fact.sentence for fact in facts],
                context_tokens=length,
                depths=depths,
            )
            cells += [
                Cell(len(cells) + i, fact, context, length, middle_of_part(i, n), text)
                for i, (fact, context) in enumerate(zip(facts, contexts, strict=True))
            ]
    return cells


def middle_of_part(number: int, parts: int) -> float:
    """The depth in percent that stands for a fact: the middle of its part, of one of at most four."""
    shown = min(parts, _SHOWN_PARTS)
    return 100 * (number * shown // parts + 0.5) / shown


__all__ = ["Material", "build_cells"]
