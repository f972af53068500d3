"""Haystacks: the texts in which needles are hidden, from files, data sets and the built-in world."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ctxlens.errors import InputError, first_line
from ctxlens.evals.needle.sentences import LONG_SENTENCE, find_start, split_keeping_lines, tidy_sentences
from ctxlens.files import decode_text

_TEXT_COLUMNS = ("text", "content", "document")
_TEXT_SUFFIXES = (".txt", ".md")
_DATA_SUFFIXES = (
    ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".gz", ".xz", ".zst", ".bz2", ".zip",
)  # fmt: skip
_ABOUT = ("license", "licence", "readme")
"""How the names of files begin that are about the texts."""
_MOST_CHARACTERS = 20_000_000


@runtime_checkable
class Haystack(Protocol):
    """A source of sentences to hide needles in."""

    @property
    def name(self) -> str:
        """The source of the sentences, for tables."""
        ...

    def sentences(self, case: int, context_tokens: int) -> Iterator[str]:
        """The sentences of one context; each case has different ones, so that the cells vary.

        A line break inside a sentence becomes a space in the context, which may be cut there.
        """
        ...


@dataclass(frozen=True)
class TextHaystack:
    """Sentences of real text, in order.

    Case 0 starts at the beginning, as in the paper. Further cases start at a random sentence (inside of it
    if it is very long) and continue from the beginning when they reach the end.

    Attributes:
        text: the sentences; line breaks inside them are kept.
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
        once = self.once(case)
        return itertools.cycle(once) if self.repeat else iter(once)

    def once(self, case: int) -> tuple[str, ...]:
        """The whole text once, from the case's starting point."""
        rng = random.Random(f"{self.seed}-{case}")
        start = rng.randrange(len(self.text)) if case else 0
        first, others = self.text[start], (*self.text[start + 1 :], *self.text[:start])
        inside = find_start(first, rng.randrange(len(first))) if case and len(first) > LONG_SENTENCE else 0
        if not inside:
            return (first, *others)
        return (first[inside:], *others, first[:inside].rstrip())


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

    Text files are decoded as their byte-order mark says, without one as UTF-8. Hidden files are skipped.

    Args:
        source: `"organism"` (filler of the embedded world); `"neutral"` (everyday prose of this package); a
            folder whose .txt and .md files are read in sorted order (licence and readme files are skipped),
            or one such file; a data set on disk (JSON lines, Parquet, CSV, a folder that the `datasets`
            library reads) or on the Hub, by its id; any iterable of sentences; or a haystack, which is
            returned as it is.
        seed: seed of filler and of starting points.
        repeat: whether a text that is too short may start over.
        split: the split of a data set.
        column: the data set's column of texts; by default `text`, `content` or `document`, or else the only
            column that contains text. Rows are read in order, up to 20 million characters.

    Raises:
        InputError: the folder or data set does not exist, contains no text, or has no such column; or a file
            is not text.
    """
    if isinstance(source, Haystack):
        return source
    if source == "organism":
        return WorldHaystack(seed)
    if source == "neutral":
        from ctxlens.evals.needle.neutral import NeutralHaystack

        return NeutralHaystack(seed)
    if not isinstance(source, str | Path):
        return _text_haystack(tidy_sentences(source), "sentences", seed, repeat)
    path = Path(source).expanduser()
    if files := _find_texts(path):
        texts, name = [_read_text(path, file) for file in files], path.name
    else:
        texts, name = _read_data_set(str(source), path, split, column), str(source)
    return _text_haystack([s for text in texts for s in split_keeping_lines(text)], name, seed, repeat)


def _find_texts(path: Path) -> list[Path]:
    """The text files that a path names; none if it names a data set.

    Raises:
        InputError: it is a folder without any file to read.
    """
    if not path.is_dir():
        return [path] if path.suffix.lower() in _TEXT_SUFFIXES else []
    found = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    found = [file for file in found if not file.name.lower().startswith(_ABOUT)]
    if not found:
        raise InputError(f"haystack folder {path} contains no texts; put .txt or .md files there.")
    texts = [file for file in found if file.suffix.lower() in _TEXT_SUFFIXES and file.is_file()]
    if any(file.suffix.lower() == ".txt" for file in texts):
        return texts
    has_data = any(file.suffix.lower() in _DATA_SUFFIXES for file in path.rglob("*"))
    return [] if has_data else texts  # .md files describe the data


def _read_text(source: Path, file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(
            f"haystack {source} cannot be read ({error.strerror}); give a folder of .txt or .md files, a "
            "data set, or organism for the built-in world."
        ) from error
    return decode_text(content, file)


def _read_data_set(source: str, path: Path, split: str, column: str | None) -> list[str]:
    from ctxlens.chat.data.reading import read_rows

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
            f"haystack {source} cannot be read ({first_line(error)}); give a folder of .txt or .md files, a "
            "data set with a column of texts, or organism for the built-in world."
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


__all__ = ["Haystack", "TextHaystack", "WorldHaystack", "load_haystack"]
