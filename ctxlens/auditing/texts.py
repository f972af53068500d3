"""What an audit asks: long texts with several facts in each, so that one reading serves several questions."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ctxlens.errors import InputError
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.contexts import gather_straw, place_needles
from ctxlens.evals.needle.controls import Renderer
from ctxlens.evals.needle.haystack import Haystack
from ctxlens.evals.needle.needles import Needle
from ctxlens.evals.needle.prompts import Cell
from ctxlens.heads.tradeoff import AnsweredQuestion


@dataclass(frozen=True)
class Material:
    """The texts of an audit.

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


def build_cells(model: Renderer, material: Material, config: NeedleConfig, per_text: int) -> list[Cell]:
    """Hide several facts in every text, and ask for each of them.

    All questions about a text have the same text before them, so that a model with a cache reads it once. The
    depths of a text's facts are drawn from equal parts of the text; the depth of a cell is the middle of its
    part, and the depth that was built stands in its context. Texts and facts depend on `config.seed`.

    Args:
        model: tokenizer and window.
        material: the haystack and the facts.
        config: `lengths` (numbers of tokens) and `cases_per_cell` (texts of each length).
        per_text: facts in every text.

    Returns:
        Cells in the order of length, text and depth; `case` is the number of the text.

    Raises:
        InputError: there are fewer facts than a text needs, or the haystack is too short.
    """
    if per_text > len(material.facts):
        raise InputError(f"a text needs {per_text} facts, but there are only {len(material.facts)}.")
    assert not isinstance(config.lengths, int), "lengths are numbers of tokens"
    cells: list[Cell] = []
    for length in config.lengths:
        for text in range(config.cases_per_cell):
            rng = random.Random(f"audit-{config.seed}-{length}-{text}")
            facts = rng.sample(list(material.facts), per_text)
            depths = [100 * (part + rng.random()) / per_text for part in range(per_text)]
            straw = gather_straw(model.tokenizer, material.haystack, text, length)
            contexts = place_needles(
                model.tokenizer,
                straw,
                [fact.sentence for fact in facts],
                context_tokens=length,
                depths=depths,
            )
            cells += [
                Cell(len(cells) + i, fact, context, length, 100 * (i + 0.5) / per_text, text)
                for i, (fact, context) in enumerate(zip(facts, contexts, strict=True))
            ]
    return cells


__all__ = ["Material", "build_cells"]
