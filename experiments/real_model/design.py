"""What the experiment asks: texts with four drawn facts each, wordings and prefixes, all from one seed.

Written before the first run; a change makes other cells, which earlier grids refuse to be mixed with.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctxlens.chat.condition import parse_conditions
from ctxlens.evals.needle.config import WORDINGS, NeedleConfig
from ctxlens.evals.needle.contexts import gather_straw, place_needles
from ctxlens.evals.needle.haystack import Haystack, load_haystack
from ctxlens.evals.needle.needles import NEEDLES, Needle, load_needles
from ctxlens.evals.needle.prompts import Cell

SEED = 2026
LENGTHS = (500, 1000, 2000, 4000, 7800)
"""Context lengths in tokens; the longest leaves room for question and answer in the window of 8,192."""
LONG = 2000
"""The loss is judged on texts of at least this many tokens."""
DETAIL = 4000
"""The length at which controls, attention and steering are measured."""
TEXTS, PER_BLOCK, PER_TEXT = 20, 4, 4
"""Texts of each length, texts of a block (one for each wording), and facts of a text."""
CHOOSING, JUDGING = (0, 2, 4), (1, 3)
"""Blocks that choose α and heads, and blocks that judge them."""
FRESH = (5, 6, 7)
"""Blocks of the second judgement: twelve texts that nothing was chosen on, and that no other part has."""
CONDITIONS = "plain,plain+prefix,template,template+prefix"
PREFIXED = "plain+prefix,template+prefix"
OTHER_MODES = ("prompt-only", "compounding")
CONTROLS = "plain+matched+prefix,plain+bos+prefix,template+nosystem+prefix"
MAX_NEW_TOKENS = 40
BATCH_TOKENS = 32_768
"""Prompt and new tokens answered together: changes time and memory, not the measure."""
ALPHAS, ALPHAS_OF_HEADS = (0.95, 0.7, 0.4, 0.15), (0.4, 0.15, 0.05)
"""Steering strengths to choose from, for all heads and for those that attend to the needle."""
DRAWS = 3
"""Random sets of heads."""
MAP_BLOCKS, MAP_ALPHA = (0, 2), 0.1
"""Blocks whose texts give the maps of single heads, and the strength of steering there and of small sets."""
SIZES = (3, 9, 27)
"""Numbers of heads of the small sets."""
PAPERS = ("sf", "pizza-short")
INVENTED = Path(__file__).with_name("needles.yaml")
"""Twelve invented facts that were recalled in a short text."""


def blocks(measure: str) -> range | tuple[int, ...]:
    """The numbers of the blocks of a measurement."""
    return FRESH if measure.startswith("fresh") else range(TEXTS // PER_BLOCK)


def config(wording: str, conditions: str = CONDITIONS, *, score: str = "recall,contains") -> NeedleConfig:
    """The configuration of the texts of one wording."""
    return NeedleConfig(
        lengths=LENGTHS, depths=PER_TEXT, needles=tuple(_facts().values()),
        conditions=parse_conditions(conditions), wording=wording, max_new_tokens=MAX_NEW_TOKENS,
        seed=SEED, score=tuple(score.split(",")),
    )  # fmt: skip


def load_haystacks(essays: Path | None) -> list[Haystack]:
    """The neutral texts and the essays; twice the neutral texts where there are no essays."""
    neutral = load_haystack("neutral", seed=SEED)
    return [neutral, neutral if essays is None else load_haystack(str(essays), seed=SEED)]


def build_block(tokenizer: Any, haystacks: list[Haystack], block: int) -> dict[str, list[Cell]]:
    """The cells of a block by wording: one text of every length, four questions about each.

    A cell's number says where it stands in the whole experiment, and its case is the number of the text among
    those of its length.
    """
    cells: dict[str, list[Cell]] = {}
    for within, wording in enumerate(WORDINGS):
        text = block * PER_BLOCK + within
        haystack = haystacks[(block + within) % 2]
        for at, length in enumerate(LENGTHS):
            first = (at * TEXTS + text) * PER_TEXT
            cells.setdefault(wording, []).extend(_build_text(tokenizer, haystack, length, text, first))
    return cells


def _build_text(tokenizer: Any, haystack: Haystack, length: int, text: int, first: int) -> list[Cell]:
    rng = random.Random(f"real-model-{SEED}-{length}-{text}")
    known = _facts()
    invented = tuple(name for name in known if name not in PAPERS)
    chosen = [known[PAPERS[text % 2]], *(known[name] for name in rng.sample(invented, PER_TEXT - 1))]
    rng.shuffle(chosen)
    facts = [draw_prefix(fact, rng) for fact in chosen]
    depths = [100 * (part + rng.random()) / PER_TEXT for part in range(PER_TEXT)]
    contexts = place_needles(
        tokenizer,
        gather_straw(tokenizer, haystack, text, length),
        [fact.sentence for fact in facts],
        context_tokens=length,
        depths=depths,
    )
    return [
        Cell(first + i, fact, context, length, 100 * (i + 0.5) / PER_TEXT, text)
        for i, (fact, context) in enumerate(zip(facts, contexts, strict=True))
    ]


def draw_prefix(fact: Needle, rng: random.Random) -> Needle:
    """The fact with its full prefix, or with the first half of that prefix's words; its name says which."""
    kind = rng.choice(("full", "short"))
    words = fact.prefix.split()
    prefix = fact.prefix if kind == "full" else " ".join(words[: (len(words) + 1) // 2])
    return replace(fact, name=f"{fact.name}/{kind}", prefix=prefix)


def haystack_of(case: int) -> str:
    """Which haystack a text comes from: `neutral` or `essays`."""
    return ("neutral", "essays")[(case // PER_BLOCK + case % PER_BLOCK) % 2]


def _facts() -> dict[str, Needle]:
    return {
        **{name: NEEDLES[name] for name in PAPERS},
        **{fact.name: fact for fact in load_needles(INVENTED)},
    }
