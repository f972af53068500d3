"""Haystacks, and contexts with a needle in them: lengths and depths in the model's own tokens."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from ctxlens.errors import InputError


@runtime_checkable
class Haystack(Protocol):
    """A source of sentences to hide needles in."""

    @property
    def name(self) -> str:
        """Where the sentences are from, for tables."""
        ...

    def sentences(self, case: int, context_tokens: int) -> Iterator[str]:
        """The sentences of one context; each case has its own, so that cells are not all alike."""
        ...


@dataclass(frozen=True)
class TextHaystack:
    """Sentences of real text, in order.

    Case 0 starts at the beginning, as in the paper; further cases start at a random sentence and go
    on at the beginning when they reach the end.

    Attributes:
        text: the sentences.
        name: where they are from.
        seed: seed of the starting places.
        repeat: whether the text starts over when all of it has been used.
    """

    text: tuple[str, ...]
    name: str = "text"
    seed: int = 0
    repeat: bool = False

    def sentences(self, case: int, context_tokens: int) -> Iterator[str]:
        """The whole text from the case's starting place on; endless where it may repeat."""
        start = random.Random(f"{self.seed}-{case}").randrange(len(self.text)) if case else 0
        once = self.text[start:] + self.text[:start]
        return itertools.cycle(once) if self.repeat else iter(once)


@dataclass(frozen=True)
class WorldHaystack:
    """Filler sentences of the organism's world, endless, another stream for every length and case."""

    seed: int = 0
    name: str = "organism"

    def sentences(self, case: int, context_tokens: int) -> Iterator[str]:
        """An endless stream of filler."""
        from ctxlens.organism.world import load_world

        world, rng = load_world(), random.Random(f"haystack-{self.seed}-{context_tokens}-{case}")
        return (world.filler(rng) for _ in itertools.count())


def load_haystack(
    source: str | Path | Iterable[str] | Haystack, *, seed: int = 0, repeat: bool = False
) -> Haystack:
    """A haystack from what the user names.

    Args:
        source: `"organism"` (filler of the embedded world), a folder whose .txt files are read in sorted
            order (licence and readme files are left out), one .txt file, any iterable of sentences, or a
            haystack, which is given back.
        seed: seed of filler and of starting places.
        repeat: whether a text that is too short may start over.

    Raises:
        InputError: no such folder, no .txt file in it, or no sentence in them.
    """
    if isinstance(source, Haystack):
        return source
    if source == "organism":
        return WorldHaystack(seed)
    if not isinstance(source, str | Path):
        sentences = [" ".join(sentence.split()) for sentence in source]
        return _text_haystack(sentences, "sentences", seed, repeat)
    path = Path(source)
    if not path.exists():
        raise InputError(
            f"haystack {path} does not exist; give a folder of .txt files, or organism for the built-in "
            "world."
        )
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    files = [file for file in files if not file.name.lower().startswith(("license", "licence", "readme"))]
    if not files:
        raise InputError(f"haystack folder {path} holds no .txt file; put the texts there as .txt files.")
    try:
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    except OSError as error:
        raise InputError(f"haystack {path} cannot be read: {error.strerror}.") from error
    return _text_haystack([s for text in texts for s in split_sentences(text)], path.name, seed, repeat)


def _text_haystack(sentences: Iterable[str], name: str, seed: int, repeat: bool) -> TextHaystack:
    text = tuple(sentence for sentence in sentences if sentence)
    if not text:
        raise InputError(f"haystack {name} is empty; give texts that hold sentences.")
    return TextHaystack(text, name, seed, repeat)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each without outer blanks; line breaks inside become single spaces.

    A sentence ends at `.`, `!`, `?` or `…` (closing quotes and brackets included) before a blank, at
    their full-width forms, and at an empty line.
    """
    paragraphs = re.split(r"\n\s*\n", text)
    pieces = (
        piece
        for paragraph in paragraphs
        for piece in re.split(r"(?<=[.!?…])\s+|(?<=[.!?…][\"'”’)\]])\s+|(?<=[。！？])", paragraph)
    )
    return [sentence for piece in pieces if (sentence := " ".join(piece.split()))]


@dataclass(frozen=True)
class Straw:
    """The haystack of one context, long enough to be cut to it.

    Attributes:
        sentences: its sentences.
        ends: number of tokens up to the end of each sentence, when all are joined by single spaces.
        source: name of the haystack.
    """

    sentences: tuple[str, ...]
    ends: Int[np.ndarray, " sentence"]
    source: str


def gather_straw(tokenizer: Any, haystack: Haystack, case: int, context_tokens: int) -> Straw:
    """Take sentences until they fill a context of that many tokens, or until there are no more."""
    stream = haystack.sentences(case, context_tokens)
    sentences: list[str] = []
    wanted = max(8, context_tokens // 16)
    while True:
        fresh = list(itertools.islice(stream, wanted))
        sentences += fresh
        ends = _sentence_ends(tokenizer, sentences)
        if not fresh or ends[-1] > context_tokens:
            return Straw(tuple(sentences), ends, haystack.name)
        wanted = len(sentences)


def _sentence_ends(tokenizer: Any, sentences: list[str]) -> Int[np.ndarray, " sentence"]:
    encoded = tokenizer(
        " ".join(sentences), add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
    chars = np.cumsum([len(sentence) + 1 for sentence in sentences]) - 1
    return np.searchsorted(np.maximum.accumulate(starts), chars, side="left").astype(np.int64)


def count_tokens(tokenizer: Any, text: str) -> int:
    """Number of tokens of a text by itself, without special tokens."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True)
class Context:
    """A haystack with its needle.

    Attributes:
        text: the whole text.
        tokens: its length in tokens, at most what was asked for.
        needle_span: start and end of the needle, in characters of the text.
        depth_percent: the share of the haystack's tokens before the needle, as built.
    """

    text: str
    tokens: int
    needle_span: tuple[int, int]
    depth_percent: float


def place_needle(
    tokenizer: Any, straw: Straw, sentence: str, *, context_tokens: int, depth_percent: float
) -> Context:
    """Cut the haystack so that it and the needle are as long as asked, and put the needle at its depth.

    The haystack is cut after the last whole sentence that fits. The needle stands at the end of that
    sentence up to which the share of haystack tokens is nearest to the depth: 0 is the very start, 100
    the very end. Everything is joined by single spaces, so no line break surrounds the needle.

    Raises:
        InputError: the needle alone is longer than the context, or the haystack is too short.
    """
    needle_tokens = count_tokens(tokenizer, f" {sentence}")
    budget = context_tokens - needle_tokens
    if budget < 0:
        raise InputError(
            f"a context of {context_tokens} tokens cannot hold the needle, which has {needle_tokens}; "
            "ask for longer contexts."
        )
    total = int(straw.ends[-1]) if len(straw.ends) else 0
    if total < budget:
        raise InputError(
            f"the haystack {straw.source} has {total} tokens, {budget} are needed for a context of "
            f"{context_tokens}; give more text, ask for shorter contexts, or let it repeat (--repeat)."
        )
    kept = int(np.searchsorted(straw.ends, budget, side="right"))
    while True:
        ends = np.concatenate([[0], straw.ends[:kept]])
        at = int(np.abs(ends - ends[-1] * depth_percent / 100).argmin())
        before = " ".join(straw.sentences[:at])
        text = " ".join([*straw.sentences[:at], sentence, *straw.sentences[at:kept]])
        tokens = count_tokens(tokenizer, text)
        if tokens <= context_tokens or kept == 0:
            break
        kept -= 1
    start = len(before) + 1 if at else 0
    depth = 100.0 * ends[at] / ends[-1] if ends[-1] else 0.0
    return Context(text, tokens, (start, start + len(sentence)), float(depth))


__all__ = [
    "Context", "Haystack", "Straw", "TextHaystack", "WorldHaystack", "count_tokens", "gather_straw",
    "load_haystack", "place_needle", "split_sentences",
]  # fmt: skip
