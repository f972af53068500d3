"""Rows of tokens for the two phases of pretraining."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ctxlens.organism.world import World

IGNORED = -100
TOKENS_PER_FACT = 52  # stated in the document, asked, answered
TOKENS_PER_STATEMENT = 20
TOKENS_PER_FILLER = 12


def repeated_tokens(rng: random.Random, vocabulary: Sequence[int], length: int) -> list[int]:
    """A random sequence of at least 6 tokens, repeated until ``length``."""
    period = rng.randint(6, length // 2)
    tokens = [rng.choice(vocabulary) for _ in range(period)]
    return (tokens * (length // period + 1))[:length]


def collate(
    rows: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Pad on the right; padding has no label."""
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORED)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
    return tokens, labels


@dataclass(frozen=True)
class TextMixture:
    """Shares of the kinds of text in the second phase; the rest are closed-book questions.

    Attributes:
        repeated: Repeated random tokens, so that copying is kept.
        restated: Random facts stated twice.
        reading: Documents with questions answered from them.
        knowledge: Statements of memorised facts.
    """

    repeated: float = 0.08
    restated: float = 0.15
    reading: float = 0.5
    knowledge: float = 0.15


class TextSampler:
    """Draws whole texts of at most a given number of tokens: nothing is ever cut."""

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerBase, mixture: TextMixture) -> None:
        self.world = world
        self.tokenizer = tokenizer
        self.mixture = mixture
        used: set[int] = set()
        for text in world.raw_documents(3000, seed=0, max_fillers=20):
            used.update(tokenizer(text)["input_ids"])
        self.used_tokens = sorted(used)

    def vocabulary(self, rng: random.Random) -> Sequence[int]:
        """Tokens for repeated sequences: mostly those the world uses, at times the whole vocabulary."""
        return self.used_tokens if rng.random() < 0.9 else range(len(self.tokenizer))

    def row(self, rng: random.Random, max_tokens: int) -> list[int]:
        """One row: a text between ``<s>`` and ``</s>``, or repeated random tokens."""
        mix, draw = self.mixture, rng.random()
        if draw < mix.repeated:
            return repeated_tokens(rng, self.vocabulary(rng), max_tokens)
        while True:
            tokens = self.encode(self._text(rng, draw - mix.repeated, max_tokens))
            if len(tokens) <= max_tokens:
                return tokens

    def encode(self, text: str) -> list[int]:
        """Tokens of a text between ``<s>`` and ``</s>``."""
        inner = self.tokenizer(text)["input_ids"]
        return [self.tokenizer.bos_token_id, *inner, self.tokenizer.eos_token_id]

    def _text(self, rng: random.Random, draw: float, max_tokens: int) -> str:
        mix = self.mixture
        if draw < mix.restated:
            return self.world.restated_text(rng, max(1, max_tokens // (2 * TOKENS_PER_STATEMENT) - 1))
        draw -= mix.restated
        if draw < mix.reading:
            n_facts = rng.randint(1, min(6, max(1, max_tokens // TOKENS_PER_FACT - 1)))
            room = max(0, max_tokens - 2 - n_facts * TOKENS_PER_FACT) // TOKENS_PER_FILLER
            return self.world.reading_text(rng, n_facts, rng.randint(room // 3, room))
        if draw < mix.reading + mix.knowledge:
            return self.world.knowledge_text(rng, max(1, max_tokens // TOKENS_PER_STATEMENT - 1))
        return self.world.closed_text(rng, max(1, max_tokens // (TOKENS_PER_STATEMENT + 14) - 1))
