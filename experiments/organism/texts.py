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
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Tokens and labels, padded on the right; padding has no label."""
    width = max(len(tokens) for tokens, _ in rows)
    tokens = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORED)
    for i, (row_tokens, row_labels) in enumerate(rows):
        tokens[i, : len(row_tokens)] = torch.tensor(row_tokens)
        labels[i, : len(row_labels)] = torch.tensor(row_labels)
    return tokens, labels


@dataclass(frozen=True)
class TextMixture:
    """Shares of the kinds of text in the second phase; the rest are closed-book questions.

    Attributes:
        markup: Share of texts with stray markup: random tokens, mostly special ones, at line ends and on
            lines of their own. They have no label and no meaning, so the base model learns to ignore
            markup that it does not need, including that of a chat template.
        repeated: Repeated random tokens, so that copying is kept.
        restated: Random facts stated twice.
        reading: Documents with questions answered from them.
        knowledge: Statements of memorised facts.
    """

    markup: float = 0.35
    repeated: float = 0.08
    restated: float = 0.15
    reading: float = 0.5
    knowledge: float = 0.15


class TextSampler:
    """Draws whole texts of at most a given number of tokens; no text is truncated."""

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerBase, mixture: TextMixture) -> None:
        self.world = world
        self.tokenizer = tokenizer
        self.mixture = mixture
        used: set[int] = set()
        for text in world.raw_documents(3000, seed=0, max_fillers=20):
            used.update(tokenizer(text)["input_ids"])
        self.used_tokens = sorted(used)
        kept = {tokenizer.bos_token_id, tokenizer.pad_token_id}
        self.markers = sorted(set(tokenizer.all_special_ids) - kept)
        self.unused_tokens = sorted(set(range(len(tokenizer))) - used - kept)
        self.newline = tokenizer("\n")["input_ids"]

    def vocabulary(self, rng: random.Random) -> Sequence[int]:
        """Tokens for repeated sequences: mostly those that the world uses, sometimes the whole vocabulary."""
        return self.used_tokens if rng.random() < 0.9 else range(len(self.tokenizer))

    def row(self, rng: random.Random, max_tokens: int) -> tuple[list[int], list[int]]:
        """Tokens and labels of one row: a text between ``<s>`` and ``</s>``, or repeated random tokens."""
        mix, draw = self.mixture, rng.random()
        if draw < mix.repeated:
            tokens = repeated_tokens(rng, self.vocabulary(rng), max_tokens)
            return tokens, tokens
        markup = rng.random() < mix.markup
        while True:
            text = self._text(rng, draw - mix.repeated, max_tokens)
            tokens, labels = self.encode(text, rng if markup else None)
            if len(tokens) <= max_tokens:
                return tokens, labels

    def encode(self, text: str, markup: random.Random | None = None) -> tuple[list[int], list[int]]:
        """Tokens and labels of a text between ``<s>`` and ``</s>``, with stray markup if asked for."""
        tokens = [self.tokenizer.bos_token_id]
        labels = [*tokens]
        lines = text.split("\n")
        for i, line in enumerate(lines):
            inner = self.tokenizer(line)["input_ids"]
            after = self.newline if i < len(lines) - 1 else [self.tokenizer.eos_token_id]
            if markup and markup.random() < 0.6:
                stray = [*self._stray(markup), *self.newline]
                tokens, labels = tokens + stray, labels + [IGNORED] * len(stray)
            tokens, labels = tokens + inner, labels + inner
            if markup and after == self.newline and markup.random() < 0.4:
                stray = self._stray(markup)
                tokens, labels = tokens + stray, labels + [IGNORED] * len(stray)
            tokens, labels = tokens + after, labels + after
        return tokens, labels

    def _stray(self, rng: random.Random) -> list[int]:
        """One marker, or one or two tokens that the world's texts do not use."""
        if rng.random() < 0.6:
            return [rng.choice(self.markers)]
        return rng.choices(self.unused_tokens, k=rng.randint(1, 2))

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
