"""What an audit asks: long texts with several facts in each, so that one reading serves several questions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ctxlens.errors import InputError
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.controls import Renderer
from ctxlens.evals.needle.haystack import Context, Haystack, Straw, count_tokens, gather_straw
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
    depths of a text's facts are drawn from equal parts of the text. Texts and facts depend on `config.seed`.

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
            contexts = place_facts(model.tokenizer, straw, facts, depths, length)
            cells += [
                Cell(len(cells) + i, fact, context, length, round(depth, 1), text)
                for i, (fact, context, depth) in enumerate(zip(facts, contexts, depths, strict=True))
            ]
    return cells


def place_facts(
    tokenizer: object, straw: Straw, facts: Sequence[Needle], depths: Sequence[float], context_tokens: int
) -> list[Context]:
    """Cut the haystack to length, the facts included, and insert each fact after the sentence at its depth.

    Returns:
        The same text for every fact, each with the place of that fact.

    Raises:
        InputError: the facts alone are longer than the context, or the haystack is too short.
    """
    budget = context_tokens - sum(count_tokens(tokenizer, f" {fact.sentence}") for fact in facts)
    total = int(straw.ends[-1]) if len(straw.ends) else 0
    if budget < 0 or total < budget:
        raise InputError(
            f"a text of {context_tokens} tokens with {len(facts)} facts needs a haystack of {max(budget, 0)} "
            f"tokens, but {straw.source} has {total}; "
            + ("ask for longer texts." if budget < 0 else "give more text or ask for shorter texts.")
        )
    kept = int(np.searchsorted(straw.ends, budget, side="right"))
    while True:
        ends = np.concatenate([[0], straw.ends[:kept]])
        places = [int(np.abs(ends - ends[-1] * depth / 100).argmin()) for depth in depths]
        text, spans = insert_facts(straw.sentences[:kept], facts, places)
        tokens = count_tokens(tokenizer, text)
        if tokens <= context_tokens or kept == 0:
            break
        kept -= 1
    whole = float(ends[-1]) or 1.0
    return [
        Context(text, tokens, spans[i], 100.0 * float(ends[place]) / whole) for i, place in enumerate(places)
    ]


def insert_facts(
    sentences: Sequence[str], facts: Sequence[Needle], places: Sequence[int]
) -> tuple[str, list[tuple[int, int]]]:
    """Join sentences, each fact after as many of them as its place says; also the characters of each fact."""
    pieces: list[str] = []
    at = 0
    spans = [(0, 0)] * len(facts)
    for number in range(len(sentences) + 1):
        for i in (i for i, place in enumerate(places) if place == number):
            spans[i] = (at, at + len(facts[i].sentence))
            pieces.append(facts[i].sentence)
            at += len(pieces[-1]) + 1
        if number < len(sentences):
            pieces.append(sentences[number])
            at += len(pieces[-1]) + 1
    return " ".join(pieces), spans


__all__ = ["Material", "build_cells", "insert_facts", "place_facts"]
