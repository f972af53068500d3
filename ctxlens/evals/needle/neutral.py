"""Texts of this project for audits of real models: calm prose about everyday things, written by a grammar.

`neutral_prose.txt` holds the sentence patterns, in topics. A topic gives every paragraph its person, thing
and place, which all sentences of the paragraph share, and three kinds of patterns: openings (`o`), middles
(`m`, whose order is kept) and closings (`c`). In a pattern, `[a|b]` is a choice and `{name}` the value of a
slot or an entry of a list. A person is written `f a potter`: `{one}` is "a potter", `{who}` "the potter",
`{she}`, `{her}`, `{him}` and `{herself}` follow the letter. `{things}` is the plural of `{thing}`.

No sentence occurs twice in a volume of 30 documents, and no eight words in a row occur more than three times.
The texts contain no digits and no facts that a question could be about.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from ctxlens.errors import InputError

DOCUMENTS_PER_VOLUME = 30
"""Number of documents that share no sentence with one another; further documents come from a new volume."""

_LEAST_WORDS = 3960
"""Words of a document; about 4,500 tokens or more with today's tokenizers."""

_WINDOW, _MOST_REPEATS = 8, 3
_TRIES = 6
_FEWEST_MIDDLES, _MOST_MIDDLES = 4, 7
_FEWEST_SENTENCES = 4
_PRONOUNS = {
    "f": {"she": "she", "her": "her", "him": "her", "herself": "herself"},
    "m": {"she": "he", "her": "his", "him": "him", "herself": "himself"},
}
_CHOICE, _SLOT = re.compile(r"\[([^\]]*)\]"), re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"[a-z']+")
_SENTENCE_GAP = re.compile(r"(?<=[.?!]) ")
_SENTENCE_START = re.compile(r"(?:^|(?<=[.?!] ))[a-z]")
_ARTICLE = re.compile(r"\b([Aa]) (?=(?!one|once|use|usu|uni[^nm]|euro)[aeiou]|hour|honest)")


@dataclass(frozen=True)
class _Topic:
    """The patterns of one topic and the values of its slots."""

    name: str
    slots: dict[str, tuple[str, ...]] = field(default_factory=dict)
    patterns: dict[str, list[str]] = field(default_factory=lambda: {"o": [], "m": [], "c": []})


class _Bag:
    """Draws from a few values so that every value comes once before any comes again."""

    def __init__(self, values: Sequence[str], rng: random.Random) -> None:
        self.values, self.rng = list(values), rng
        self.left: list[str] = []

    def draw(self) -> str:
        if not self.left:
            self.left = _shuffled(self.values, self.rng)
        return self.left.pop()


class _Volume:
    """One seeded run through the patterns, which remembers every eight words in a row that it wrote."""

    def __init__(self, seed: str) -> None:
        self.rng = random.Random(f"neutral-{seed}")
        self.lists, self.topics = load_patterns()
        self.bags: dict[tuple[str, str], _Bag] = {}
        self.written: set[str] = set()
        self.runs: Counter[tuple[str, ...]] = Counter()
        self.tail: list[str] = []

    def document(self) -> list[list[str]]:
        """One document: paragraphs of sentences."""
        paragraphs, words = [], 0
        while words < _LEAST_WORDS:
            paragraphs.append(self.paragraph())
            words += sum(len(sentence.split()) for sentence in paragraphs[-1])
        return paragraphs

    def paragraph(self) -> list[str]:
        """The sentences of one paragraph; a topic that has nothing new to say is passed over."""
        for _ in range(2 * len(self.topics)):
            topic = self.topics[self._draw("", "topic", tuple(self.topics))]
            sentences = self._write_about(topic)
            if len(sentences) >= _FEWEST_SENTENCES:
                return sentences
        raise InputError("the patterns of the neutral texts are used up; make fewer documents per volume.")

    def _write_about(self, topic: _Topic) -> list[str]:
        """An opening, middles in their order, and a closing; only an opening is needed to go on."""
        bound = self._bind(topic)
        n_middles = _FEWEST_MIDDLES + _below(self.rng, _MOST_MIDDLES - _FEWEST_MIDDLES + 1)
        middles = {self._draw(topic.name, "m", topic.patterns["m"]) for _ in range(n_middles)}
        chosen = [pattern for pattern in topic.patterns["m"] if pattern in middles]
        opening = self._write_any(topic, "o", bound)
        if opening is None:
            return []
        written = [opening, *(self._write(pattern, bound) for pattern in chosen)]
        return [sentence for sentence in (*written, self._write_any(topic, "c", bound)) if sentence]

    def _bind(self, topic: _Topic) -> dict[str, str]:
        """The values that all sentences of a paragraph share."""
        bound: dict[str, str] = {}
        for name, values in topic.slots.items():
            value = self._draw(topic.name, name, values)
            if name == "who":
                gender, _, one = value.partition(" ")
                bound |= {**_PRONOUNS[gender], "one": one, "who": re.sub(r"^an? ", "the ", one)}
            else:
                bound[name], _, plural = value.partition("/")
                bound[f"{name}s"] = plural or f"{bound[name]}s"
        return bound

    def _write_any(self, topic: _Topic, kind: str, bound: dict[str, str]) -> str | None:
        """A sentence of one kind: the first of the topic's patterns that gives new words, if one does."""
        for _ in topic.patterns[kind]:
            if written := self._write(self._draw(topic.name, kind, topic.patterns[kind]), bound):
                return written
        return None

    def _write(self, pattern: str, bound: dict[str, str]) -> str | None:
        """A sentence that does not repeat what was written, or None if several tries all do."""
        for _ in range(_TRIES):
            sentence = self._fill(pattern, bound)
            words = [*self.tail, *_WORD.findall(sentence.lower())]
            runs = list(zip(*(words[at:] for at in range(_WINDOW)), strict=False))
            seen = self.runs.get
            pieces = _SENTENCE_GAP.split(sentence)
            if self.written.isdisjoint(pieces) and all(seen(run, 0) < _MOST_REPEATS for run in runs):
                self.written.update(pieces)
                self.runs.update(runs)
                self.tail = words[1 - _WINDOW :]
                return sentence
        return None

    def _fill(self, pattern: str, bound: dict[str, str]) -> str:
        """A pattern with its choices made and its slots filled."""
        parts = _split_pattern(pattern)
        text = "".join(part if isinstance(part, str) else self._pick(part) for part in parts)
        text = _SLOT.sub(lambda found: self._value(found[1], bound), text)
        text = _ARTICLE.sub(r"\1n ", text)
        return _SENTENCE_START.sub(lambda found: found[0].upper(), text)

    def _value(self, name: str, bound: dict[str, str]) -> str:
        return bound[name] if name in bound else self._draw("", name, self.lists[name])

    def _pick(self, values: Sequence[str]) -> str:
        return values[_below(self.rng, len(values))]

    def _draw(self, topic: str, name: str, values: Sequence[str]) -> str:
        return self.bags.setdefault((topic, name), _Bag(values, self.rng)).draw()


@dataclass(frozen=True)
class NeutralHaystack:
    """Sentences of the neutral texts: case 0 starts with the first document, case 1 with the second.

    The stream is endless: after the last document of a volume follow those of the next.
    """

    seed: int = 0
    name: str = "neutral"

    def sentences(self, case: int, context_tokens: int) -> Iterator[str]:
        """The sentences from the case's document on."""
        library = _library(self.seed)
        for number in itertools.count(case):
            for paragraph in library.document(number):
                for sentence in paragraph:
                    yield from _SENTENCE_GAP.split(sentence)


def neutral_texts(n: int = DOCUMENTS_PER_VOLUME, seed: int = 0) -> Iterator[str]:
    """Write neutral documents, one after another.

    ```python
    >>> first, second = neutral_texts(2)
    >>> len(first.split()) > 3500, set(first.split(". ")) & set(second.split(". "))
    (True, set())

    ```

    Args:
        n: how many. Documents of one volume (30 documents) share no sentence.
        seed: seed of the texts; other seeds give other texts.

    Yields:
        Documents of at least 3,960 words, whose paragraphs are separated by empty lines.
    """
    for _, document in zip(range(n), _documents(seed), strict=False):
        yield "\n\n".join(" ".join(paragraph) for paragraph in document)


@cache
def _split_pattern(pattern: str) -> list[str | list[str]]:
    """The fixed parts of a pattern and its choices, in turn."""
    pieces = _CHOICE.split(pattern)
    return [piece.split("|") if at % 2 else piece for at, piece in enumerate(pieces)]


@cache
def load_patterns() -> tuple[dict[str, tuple[str, ...]], dict[str, _Topic]]:
    """The lists and topics of `neutral_prose.txt`."""
    lists: dict[str, tuple[str, ...]] = {}
    topics: dict[str, _Topic] = {}
    slots = lists
    topic = _Topic("")
    text = files("ctxlens.evals.needle").joinpath("neutral_prose.txt").read_text(encoding="utf-8")
    for line in text.split("\n## ", 1)[1].splitlines():
        head, _, rest = line.partition(" ")
        if head == "##":
            topic = topics[rest] = _Topic(rest)
            slots = topic.slots
        elif rest.startswith("= "):
            slots[head] = tuple(value.strip() for value in rest[2:].split("|"))
        elif rest:
            topic.patterns[head].append(rest)
    return lists, topics


def _documents(seed: int) -> Iterator[list[list[str]]]:
    number = 0
    while True:
        volume = _Volume(f"{seed}-{number}")
        for _ in range(DOCUMENTS_PER_VOLUME):
            yield volume.document()
        number += 1


class _Library:
    """The documents of a seed as far as they were asked for, each written once."""

    def __init__(self, seed: int) -> None:
        self.source = _documents(seed)
        self.written: list[list[list[str]]] = []

    def document(self, number: int) -> list[list[str]]:
        """The document of this number; those before it are written first, because they go on in turn."""
        while len(self.written) <= number:
            self.written.append(next(self.source))
        return self.written[number]


@cache
def _library(seed: int) -> _Library:
    return _Library(seed)


def _below(rng: random.Random, n: int) -> int:
    """A whole number from 0 to n - 1; `random()` gives the same numbers in every version of Python."""
    return int(rng.random() * n)


def _shuffled(values: Sequence[str], rng: random.Random) -> list[str]:
    left = list(values)
    return [left.pop(_below(rng, len(left))) for _ in values]


__all__ = ["DOCUMENTS_PER_VOLUME", "NeutralHaystack", "neutral_texts"]
