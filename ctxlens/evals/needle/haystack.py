"""Haystacks, and contexts that contain a needle; lengths and depths are counted in the model's own tokens."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from ctxlens.errors import InputError, first_line

_TEXT_COLUMNS = ("text", "content", "document")
_MOST_CHARACTERS = 20_000_000


@runtime_checkable
class Haystack(Protocol):
    """A source of sentences to hide needles in."""

    @property
    def name(self) -> str:
        """The source of the sentences, for tables."""
        ...

    def sentences(self, case: int, context_tokens: int) -> Iterator[str]:
        """The sentences of one context; each case has different ones, so that the cells vary."""
        ...


@dataclass(frozen=True)
class TextHaystack:
    """Sentences of real text, in order.

    Case 0 starts at the beginning, as in the paper. Further cases start at a random sentence and continue
    from the beginning when they reach the end.

    Attributes:
        text: the sentences.
        name: their source.
        seed: seed of the starting points.
        repeat: whether the text starts over at its end.
    """

    text: tuple[str, ...]
    name: str = "text"
    seed: int = 0
    repeat: bool = False

    def sentences(self, case: int, context_tokens: int) -> Iterator[str]:
        """The whole text from the case's starting point; endless if it may repeat."""
        start = random.Random(f"{self.seed}-{case}").randrange(len(self.text)) if case else 0
        once = self.text[start:] + self.text[:start]
        return itertools.cycle(once) if self.repeat else iter(once)


@dataclass(frozen=True)
class WorldHaystack:
    """Filler sentences of the organism's world: an endless stream, different for every length and case."""

    seed: int = 0
    name: str = "organism"

    def sentences(self, case: int, context_tokens: int) -> Iterator[str]:
        """An endless stream of filler."""
        from ctxlens.organism.world import load_world

        world, rng = load_world(), random.Random(f"haystack-{self.seed}-{context_tokens}-{case}")
        return (world.filler(rng) for _ in itertools.count())


def load_haystack(
    source: str | Path | Iterable[str] | Haystack,
    *,
    seed: int = 0,
    repeat: bool = False,
    split: str = "train",
    column: str | None = None,
) -> Haystack:
    """Load the haystack that the user names.

    Args:
        source: `"organism"` (filler of the embedded world); `"neutral"` (everyday prose of this package);
            a folder whose .txt files are read in sorted order (licence and readme files are skipped), or one
            .txt file; a data set on disk (JSON lines, Parquet, CSV, a folder that the `datasets` library
            reads) or on the Hub, by its id; any iterable of sentences; or a haystack, which is returned as it
            is.
        seed: seed of filler and of starting points.
        repeat: whether a text that is too short may start over.
        split: the split of a data set.
        column: the data set's column of texts; by default `text`, `content` or `document`, or else the only
            column that contains text. Rows are read in order, up to 20 million characters.

    Raises:
        InputError: the folder or data set does not exist, contains no text, or has no such column.
    """
    if isinstance(source, Haystack):
        return source
    if source == "organism":
        return WorldHaystack(seed)
    if source == "neutral":
        from ctxlens.evals.needle.neutral import NeutralHaystack

        return NeutralHaystack(seed)
    if not isinstance(source, str | Path):
        sentences = [" ".join(sentence.split()) for sentence in source]
        return _text_haystack(sentences, "sentences", seed, repeat)
    path = Path(source).expanduser()
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path] if path.suffix == ".txt" else []
    files = [file for file in files if not file.name.lower().startswith(("license", "licence", "readme"))]
    if files:
        texts, name = _read_files(path, files), path.name
    else:
        texts, name = _read_data_set(str(source), path, split, column), str(source)
    return _text_haystack([s for text in texts for s in split_sentences(text)], name, seed, repeat)


def _read_files(source: Path, files: Iterable[Path]) -> list[str]:
    try:
        return [file.read_text(encoding="utf-8", errors="replace") for file in files]
    except OSError as error:
        raise InputError(
            f"haystack {source} cannot be read ({error.strerror}); give a folder of .txt files, a data set, "
            "or organism for the built-in world."
        ) from error


def _read_data_set(source: str, path: Path, split: str, column: str | None) -> list[str]:
    from ctxlens.chat.data.reading import read_rows

    if path.is_dir() and not any(path.iterdir()):
        raise InputError(f"haystack folder {path} is empty; put .txt files there.")
    texts: list[str] = []
    left = _MOST_CHARACTERS
    try:
        for row in read_rows(source, split=split, limit=None):
            column = column or _find_column(row)
            if not isinstance(row, Mapping) or not isinstance(row.get(column), str):
                raise InputError(f"row {len(texts)} has no text in column {column!r}.")
            texts.append(row[column][:left])
            left -= len(texts[-1])
            if left <= 0:
                break
    except InputError as error:
        raise InputError(
            f"haystack {source} cannot be read ({first_line(error)}); give a folder of .txt files, a data "
            "set with a column of texts, or organism for the built-in world."
        ) from error
    return texts


def _find_column(row: Any) -> str:
    """The column that contains the texts of a data set, derived from its first row."""
    if not isinstance(row, Mapping):
        raise InputError(f"its rows must have named columns, but the first is {type(row).__name__}")
    texts = [str(name) for name, value in row.items() if isinstance(value, str)]
    known = [name for name in _TEXT_COLUMNS if name in texts]
    if not known and len(texts) != 1:
        raise InputError(
            f"its columns of text are {', '.join(texts) or 'none'}; name the column to read "
            "(--haystack-column)"
        )
    return (known or texts)[0]


def _text_haystack(sentences: Iterable[str], name: str, seed: int, repeat: bool) -> TextHaystack:
    text = tuple(sentence for sentence in sentences if sentence)
    if not text:
        raise InputError(f"haystack {name} is empty; give texts that contain sentences.")
    return TextHaystack(text, name, seed, repeat)


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences without surrounding blanks; line breaks inside become single spaces.

    A sentence ends at `.`, `!`, `?` or `…` (together with closing quotes and brackets) before a blank, at
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
    """The haystack of one context before it is cut to length.

    Attributes:
        sentences: its sentences.
        ends: number of tokens up to the end of each sentence when all are joined by single spaces.
        source: name of the haystack.
        once: number of sentences before the haystack starts over; None if it never does.
    """

    sentences: tuple[str, ...]
    ends: Int[np.ndarray, " sentence"]
    source: str
    once: int | None = None


def gather_straw(tokenizer: Any, haystack: Haystack, case: int, context_tokens: int) -> Straw:
    """Take sentences until they fill a context of the given length, or until there are no more."""
    stream = haystack.sentences(case, context_tokens)
    once = len(haystack.text) if isinstance(haystack, TextHaystack) else None
    sentences: list[str] = []
    wanted = max(8, context_tokens // 16)
    while True:
        fresh = list(itertools.islice(stream, wanted))
        sentences += fresh
        ends = _sentence_ends(tokenizer, sentences)
        if not fresh or ends[-1] > context_tokens:
            return Straw(tuple(sentences), ends, haystack.name, once)
        wanted = len(sentences)


def _sentence_ends(tokenizer: Any, sentences: list[str]) -> Int[np.ndarray, " sentence"]:
    encoded = tokenizer(
        " ".join(sentences), add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
    chars = np.cumsum([len(sentence) + 1 for sentence in sentences]) - 1
    return np.searchsorted(np.maximum.accumulate(starts), chars, side="left").astype(np.int64)


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
    """Cut the haystack to the requested length, needle included, and insert the needle at its depth.

    The haystack is cut after the last whole sentence that fits. The needle follows the sentence whose end is
    nearest to the depth in haystack tokens: 0 is the very start, 100 the very end. Everything is joined by
    single spaces, so no line break surrounds the needle.

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
            f"the haystack {straw.source} has {total} tokens, but a context of {context_tokens} needs "
            f"{budget}; give more text, ask for shorter contexts, or let it repeat (--repeat)."
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
    repeated = straw.once is not None and kept > straw.once
    return Context(text, tokens, (start, start + len(sentence)), float(depth), repeated)


__all__ = [
    "Context", "Haystack", "Straw", "TextHaystack", "WorldHaystack", "count_tokens", "gather_straw",
    "load_haystack", "place_needle", "split_sentences",
]  # fmt: skip
