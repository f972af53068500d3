"""Contexts that contain a needle: as long as requested, with the needle as deep as requested.

Lengths and depths are counted in the model's own tokens. A context ends with a whole sentence where that
reaches the length, and otherwise with a whole line, word or character.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

from ctxlens.errors import InputError
from ctxlens.evals.needle.haystack import Haystack, TextHaystack
from ctxlens.evals.needle.sentences import find_character_ends, find_word_ends

_UNITS = ("sentences", "lines", "words", "characters")
_TOLERATED_SHARE = 0.05
_TOLERATED_TOKENS = 16
_DIVISIBLE = 128
"""Tokens above which a sentence, line or word is divided where the needle belongs inside it."""

_CHUNK = 512
"""Characters of a long sentence that are read at once."""


def tolerance(context_tokens: int) -> float:
    """The largest difference between the requested and the built length: 5 %, but at least 16 tokens."""
    return max(float(_TOLERATED_TOKENS), _TOLERATED_SHARE * context_tokens)


@dataclass(frozen=True, eq=False)
class Straw:
    """The haystack of one context before it is cut to length.

    Attributes:
        text: its sentences, joined by single spaces.
        starts: the first character of each token.
        sentence_ends: the ends of its sentences, in characters.
        line_ends: the ends of the lines within its sentences, in characters.
        source: name of the haystack.
        once: number of characters before the haystack starts over; None if it never does.
    """

    text: str
    starts: Int[np.ndarray, " token"]
    sentence_ends: Int[np.ndarray, " sentence"]
    line_ends: Int[np.ndarray, " line"]
    source: str
    once: int | None = None

    @cached_property
    def _ends(self) -> dict[str, Int[np.ndarray, " unit"]]:
        """The ends of the units that were asked for so far; each kind includes all that come before it."""
        return {"sentences": self.sentence_ends}

    def ends(self, unit: str) -> Int[np.ndarray, " unit"]:
        """The ends of all sentences, lines, words or characters, including those of all larger units."""
        if unit not in self._ends:
            coarser = self.ends(_UNITS[_UNITS.index(unit) - 1])
            find = {"words": find_word_ends, "characters": find_character_ends}
            found = self.line_ends if unit == "lines" else find[unit](self.text)
            self._ends[unit] = np.union1d(coarser, found)
        return self._ends[unit]

    def count(self, ends: Int[np.ndarray, " unit"]) -> Int[np.ndarray, " unit"]:
        """The number of tokens up to each of these ends."""
        return np.searchsorted(self.starts, ends, side="left").astype(np.int64)


def gather_straw(tokenizer: Any, haystack: Haystack, case: int, context_tokens: int) -> Straw:
    """Take sentences until they fill a context of the given length, or until there are no more."""
    once = None
    if isinstance(haystack, TextHaystack) and haystack.repeat:
        once = sum(len(sentence) + 1 for sentence in haystack.once(case)) - 1
    stream = _in_chunks(haystack.sentences(case, context_tokens))
    chunks: list[tuple[str, bool]] = []
    wanted = max(8, context_tokens // 16)
    while True:
        fresh = list(itertools.islice(stream, wanted))
        chunks += fresh
        straw = _bundle(tokenizer, chunks, haystack.name, once)
        if not fresh or len(straw.starts) > context_tokens:
            return straw
        wanted = len(chunks)


def _in_chunks(sentences: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Parts of limited length, so that no more of a long text is read than needed; True ends a sentence."""
    for sentence in sentences:
        for start in range(0, len(sentence), _CHUNK):
            stop = start + _CHUNK
            yield sentence[start:stop], stop >= len(sentence)


def _bundle(tokenizer: Any, chunks: list[tuple[str, bool]], source: str, once: int | None) -> Straw:
    text = "".join(f"{chunk} " if is_end else chunk for chunk, is_end in chunks).removesuffix(" ")
    stops = np.cumsum([len(chunk) + is_end for chunk, is_end in chunks], dtype=np.int64) - 1
    is_end = np.asarray([is_end for _, is_end in chunks], dtype=bool)
    line_ends = [at for at, character in enumerate(text) if character == "\n"] if "\n" in text else []
    text = text.replace("\n", " ")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
    return Straw(
        text,
        np.maximum.accumulate(starts),
        stops[is_end],
        np.asarray(line_ends, dtype=np.int64),
        source,
        once,
    )


def count_tokens(tokenizer: Any, text: str) -> int:
    """Count the tokens of a text, without special tokens."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True)
class Context:
    """A haystack with its needle.

    Attributes:
        text: the whole text.
        tokens: its length in tokens, at most the requested length.
        needle_span: start and end of the needle, in characters of the text.
        depth_percent: the share of the haystack's tokens that precede the needle in the built text.
        repeated: whether the haystack was too short and started over.
    """

    text: str
    tokens: int
    needle_span: tuple[int, int]
    depth_percent: float
    repeated: bool = False


def place_needle(
    tokenizer: Any, straw: Straw, sentence: str, *, context_tokens: int, depth_percent: float
) -> Context:
    """Cut the haystack to the requested length and insert one needle; see `place_needles`."""
    (context,) = place_needles(
        tokenizer, straw, [sentence], context_tokens=context_tokens, depths=[depth_percent]
    )
    return context


def place_needles(
    tokenizer: Any, straw: Straw, sentences: Sequence[str], *, context_tokens: int, depths: Sequence[float]
) -> list[Context]:
    """Cut the haystack to the requested length, needles included, and insert each needle at its depth.

    The haystack is cut after the last whole sentence that fits. If that misses the length by more than
    5 % and 16 tokens, it is cut after the last line that fits, or else the last word, or else the last
    character. A needle follows the sentence whose end is nearest to its depth in haystack tokens: 0 is the
    very start, 100 the very end. A sentence of more than 128 tokens is divided at its lines, words or
    characters. Everything is joined by single spaces, so no line break surrounds a needle.

    Args:
        tokenizer: the model's tokenizer.
        straw: the haystack.
        sentences: the needles.
        context_tokens: the length.
        depths: the depth of each needle in percent, ascending.

    Returns:
        The same text for every needle, each with the place and depth of that needle.

    Raises:
        InputError: the needles alone are longer than the context, the haystack is too short, contains a
            needle already, or cannot be cut to the length.
    """
    needle_tokens = sum(count_tokens(tokenizer, f" {sentence}") for sentence in sentences)
    budget = context_tokens - needle_tokens
    if budget < 0:
        what = "the needle, which has" if len(sentences) == 1 else f"{len(sentences)} needles, which have"
        raise InputError(
            f"a context of {context_tokens} tokens cannot hold {what} {needle_tokens}; "
            "ask for longer contexts."
        )
    total = len(straw.starts)
    if total < budget:
        raise InputError(
            f"the haystack {straw.source} has {total} tokens, but a context of {context_tokens} needs "
            f"{budget}; give more text, ask for shorter contexts, or let it repeat (--repeat)."
        )
    allowed = tolerance(context_tokens)
    for unit in _UNITS:
        contexts = _cut(tokenizer, straw, sentences, unit, context_tokens, budget, depths)
        if abs(context_tokens - contexts[0].tokens) <= allowed:
            break
    else:
        raise InputError(
            f"the haystack {straw.source} cannot be cut to a context of {context_tokens} tokens: the nearest "
            f"has {contexts[0].tokens}, because the character that follows is too long; give another text or "
            "other lengths."
        )
    for sentence in sentences:
        if contexts[0].text.count(sentence) > 1:
            raise InputError(
                f"the haystack {straw.source} already contains the needle {sentence!r}; give other texts or "
                "another needle."
            )
    return contexts


def _cut(
    tokenizer: Any,
    straw: Straw,
    sentences: Sequence[str],
    unit: str,
    context_tokens: int,
    budget: int,
    depths: Sequence[float],
) -> list[Context]:
    """The longest context that ends with a whole unit and has at most the requested length."""
    ends = straw.ends(unit)
    kept = int(np.searchsorted(straw.count(ends), budget, side="right"))
    while True:
        cut = int(ends[kept - 1]) if kept else 0
        places = [_find_place(straw, cut, depth) for depth in depths]
        text, spans = insert_sentences(straw.text[:cut], sentences, [at for at, _ in places])
        tokens = count_tokens(tokenizer, text)
        if tokens <= context_tokens or kept == 0:
            break
        kept -= 1
    repeated = straw.once is not None and cut > straw.once
    return [
        Context(text, tokens, span, depth, repeated) for span, (_, depth) in zip(spans, places, strict=True)
    ]


def insert_sentences(
    text: str, sentences: Sequence[str], places: Sequence[int]
) -> tuple[str, list[tuple[int, int]]]:
    """Insert sentences into a text, surrounded by single spaces; also the characters of each in the result.

    Args:
        text: the text.
        sentences: what is inserted.
        places: where, in characters of the text, ascending.
    """
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    done = length = 0
    for sentence, at in zip(sentences, places, strict=True):
        for piece in (text[done:at].removeprefix(" ") if done else text[:at], sentence):
            if piece:
                length += len(piece) + (1 if pieces else 0)
                pieces.append(piece)
        spans.append((length - len(sentence), length))
        done = at
    pieces.append(text[done:].removeprefix(" "))
    return " ".join(piece for piece in pieces if piece), spans


def _find_place(straw: Straw, cut: int, depth_percent: float) -> tuple[int, float]:
    """Where the needle goes, in characters of the text up to the cut, and its depth in percent.

    This is the end nearest to the depth. Ends of sentences come first; where the depth is inside of a long
    sentence and not near its ends, the lines of that sentence follow, then words, then characters.
    """
    total = int(straw.count(np.asarray([cut]))[0])
    wanted, near = total * depth_percent / 100, total * _TOLERATED_SHARE
    place, tokens = 0, 0
    for unit in _UNITS:
        ends = straw.ends(unit)
        places = np.concatenate([[0], ends[ends < cut], [cut] if cut else []]).astype(np.int64)
        counts = straw.count(places)
        nearest = int(np.abs(counts - wanted).argmin())
        place, tokens = int(places[nearest]), int(counts[nearest])
        if abs(tokens - wanted) <= near or _unit_length(straw, ends, wanted) <= _DIVISIBLE:
            break
    return place, 100.0 * tokens / total if total else 0.0


def _unit_length(straw: Straw, ends: Int[np.ndarray, " unit"], wanted: float) -> int:
    """The length in tokens of the unit that contains a position given in tokens."""
    counts = straw.count(ends)
    index = int(np.searchsorted(counts, wanted, side="left"))
    start = int(counts[index - 1]) if index else 0
    return (int(counts[index]) if index < len(counts) else len(straw.starts)) - start


__all__ = [
    "Context", "Straw", "count_tokens", "gather_straw", "insert_sentences", "place_needle", "place_needles",
    "tolerance",
]  # fmt: skip
