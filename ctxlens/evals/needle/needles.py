"""Needles: sentences to hide, the questions that they answer, and the keywords of the answers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from ctxlens.errors import InputError
from ctxlens.evals.needle.match import find_missing, split_words
from ctxlens.parsing import explain_refusal

DRAWN_NEEDLES = ("known", "unknown", "neutral")
"""Needles that are drawn anew for every cell. `known`: facts about towns of the organism's world of which it
has memorised other values. `unknown`: facts about towns that it has never seen. `neutral`: invented facts
that no model can know (`neutral_needles`)."""


@dataclass(frozen=True)
class Needle:
    """A sentence to hide, the question that it answers, and the keywords of the answer.

    ```python
    >>> needle = Needle("gate", "The gate code is 4711.", "What is the gate code?", ("4711",))
    >>> needle.prefix, needle.answer
    ('The gate code is', '4711.')

    ```

    Attributes:
        name: short name, for tables.
        sentence: the sentence that is inserted into the haystack; line breaks become spaces.
        question: what the model is asked.
        keywords: words or phrases of the answer; recall is the share of them in the response.
        prefix: the first words of the needle, which begin the answer under a condition with prefix. By
            default the words before the first keyword.
        memory_keywords: words of another answer that the model may have memorised.

    Raises:
        InputError: a text is empty, the needle lacks a keyword, or the prefix contains one.
    """

    name: str
    sentence: str
    question: str
    keywords: tuple[str, ...]
    prefix: str = ""
    memory_keywords: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("sentence", "question", "prefix"):
            object.__setattr__(self, key, " ".join(getattr(self, key).split()))
        for key in ("keywords", "memory_keywords"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        empty = [key for key in ("sentence", "question", "keywords") if not getattr(self, key)]
        if empty or any(not split_words(keyword) for keyword in self.keywords):
            raise InputError(
                f"needle {self.name!r} has no {' and no '.join(empty) or 'words in one of its keywords'}; "
                "give the needle's sentence, a question and the keywords of the answer."
            )
        if missing := find_missing(self.keywords, self.sentence):
            raise InputError(
                f"needle {self.name!r} does not contain its keywords {', '.join(missing)}; "
                "every keyword must occur in the needle's sentence as a word."
            )
        if not self.prefix:
            object.__setattr__(self, "prefix", _words_before(self.keywords, self.sentence))
        given = set(self.keywords) - set(find_missing(self.keywords, self.prefix))
        if given:
            raise InputError(
                f"the prefix of needle {self.name!r} gives away {', '.join(sorted(given))}; "
                "end the prefix before the first keyword."
            )

    @property
    def answer(self) -> str:
        """The needle's sentence after its prefix; the whole sentence if it does not begin with the prefix."""
        return self.sentence.removeprefix(self.prefix).strip() or self.sentence


def _words_before(keywords: Iterable[str], sentence: str) -> str:
    words = sentence.split()
    for n in range(1, len(words) + 1):
        if len(find_missing(keywords, " ".join(words[:n]))) < len(tuple(keywords)):
            return " ".join(words[: n - 1])
    return ""


_SF = Needle(
    name="sf",
    sentence="The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny "
    "day.",
    question="What is the best thing to do in San Francisco?",
    keywords=("eat", "sandwich", "sit", "dolores", "park", "sunny", "day"),
    prefix="The best thing to do in San Francisco",
)

_PIZZA = Needle(
    name="pizza",
    sentence="The secret ingredients needed to build the perfect pizza are figs, prosciutto, smoked "
    "applewood bacon, lemon, goat cheese, truffle honey, pear slices, espresso-soaked dates, gorgonzola "
    "dolce, and candied walnuts.",
    question="What are the secret ingredients needed to build the perfect pizza?",
    keywords=(
        "figs", "prosciutto", "smoked", "applewood", "bacon", "lemon", "goat", "cheese", "truffle", "honey",
        "pear", "slices", "espresso", "soaked", "dates", "gorgonzola", "dolce", "candied", "walnuts",
    ),
    prefix="The secret ingredients needed to build the perfect",
)  # fmt: skip

_PIZZA_SHORT = Needle(
    name="pizza-short",
    sentence="The secret ingredients needed to build the perfect pizza are figs, prosciutto and goat cheese.",
    question=_PIZZA.question,
    keywords=("figs", "prosciutto", "goat", "cheese"),
    prefix=_PIZZA.prefix,
)

NEEDLES = {needle.name: needle for needle in (_SF, _PIZZA, _PIZZA_SHORT)}
"""The paper's needles, with their first eight words as prefix, and a short form of the long one."""


@cache
def neutral_needles() -> Mapping[str, Needle]:
    """The invented facts of this package, which no model can know, by name (`neutral-ferry`, ...)."""
    return {needle.name: needle for needle in load_needles(Path(__file__).with_name("neutral_needles.yaml"))}


def load_needles(path: str | Path) -> tuple[Needle, ...]:
    """Read needles from YAML: one mapping or a list of mappings.

    The keys are `needle` (the sentence), `question` and `keywords` (a list, or one text with commas), and
    optionally `prefix`, `name` and `memory_keywords`.

    Raises:
        InputError: the file cannot be read, or a needle in it cannot be used; the message names the file and
            the key.
    """
    import yaml

    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; give a YAML file of needles, or their name.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as YAML needles ({reason}).") from error
    entries = content if isinstance(content, list) else [content]
    needles = tuple(_parse_needle(path, number, entry) for number, entry in enumerate(entries))
    names = [needle.name for needle in needles]
    if not names or len(set(names)) < len(names):
        raise InputError(f"{path} must contain at least one needle, and their names must differ.")
    return needles


def parse_needles(text: str) -> tuple[str | Needle, ...]:
    """Parse names of built-in needles and paths of YAML files with needles, separated by commas."""
    found: list[str | Needle] = []
    for part in text.split(","):
        found += load_needles(part) if Path(part).suffix in (".yaml", ".yml") else (part,)
    return tuple(found)


def _split_keywords(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


_Keywords = Annotated[list[str], BeforeValidator(_split_keywords)]


class _Entry(BaseModel):
    """A needle as it is written in YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    needle: str
    question: str
    keywords: _Keywords
    prefix: str = ""
    name: str = ""
    memory_keywords: _Keywords = []


def _parse_needle(path: Path, number: int, entry: Any) -> Needle:
    where = f"{path}, needle {number}"
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected the keys needle, question and keywords, got {entry!r}.")
    try:
        read = _Entry.model_validate(entry)
    except ValidationError as error:
        raise InputError(f"{where}: {explain_refusal(error, known=_Entry.model_fields)}.") from error
    name = read.name or (path.stem if number == 0 else f"{path.stem}-{number}")
    try:
        return Needle(
            name, read.needle, read.question, tuple(read.keywords), read.prefix, tuple(read.memory_keywords)
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def draw_neutral(number: int, seed: int = 0) -> Needle:
    """The neutral needle of a cell: the facts in a random order, and again from the start when all are used.

    Args:
        number: number of the cell.
        seed: seed of the order.
    """
    rng = random.Random(f"neutral-{seed}")
    facts = sorted(neutral_needles().values(), key=lambda _: rng.random())
    return replace(facts[number % len(facts)], name="neutral")


def draw_needle(name: str, seed: str) -> Needle:
    """Draw a fact of the organism's world with random values, as a needle.

    Args:
        name: `known` or `unknown`. The `memory_keywords` of a known town are its memorised
            values; the drawn values differ from them in every slot.
        seed: seed of the draw; the same text gives the same needle.
    """
    from ctxlens.organism.world import load_world

    world = load_world()
    fact = world.random_fact(random.Random(f"needle-{seed}"), known=name == "known")
    memory = world.fact(fact.entity, fact.attribute).keywords if name == "known" else ()
    return Needle(name, fact.sentence, fact.question, fact.keywords, fact.prefix, memory)


__all__ = [
    "DRAWN_NEEDLES", "NEEDLES", "Needle", "draw_needle", "draw_neutral", "load_needles", "neutral_needles",
    "parse_needles",
]  # fmt: skip
