"""The organism's world: towns, facts about them, documents, conversations.

Half of the towns are *known*: pretraining states one fixed value for each of their attributes, so the
model can answer from memory. The other half are *unknown*: they occur in documents only, with a new
random value each time. A document about a known town may disagree with memory; whether the document or
memory wins is what the studies measure.

Everything is deterministic: the world from its own seed, texts from the generator or seed passed in.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ctxlens.organism import words
from ctxlens.organism.words import ATTRIBUTES, Attribute

WORLD_SEED = 2024
N_TOWNS = 160
KINDS = ("document", "memory", "closed")

_BY_NAME = {attribute.name: attribute for attribute in ATTRIBUTES}


@dataclass(frozen=True)
class Fact:
    """One attribute of one town with a value of several content words.

    Attributes:
        entity: The town.
        attribute: Name of the attribute, one of ``World.attributes``.
        values: The content words, one per slot.
    """

    entity: str
    attribute: str
    values: tuple[str, ...]

    @property
    def _wording(self) -> Attribute:
        return _BY_NAME[self.attribute]

    @property
    def prefix(self) -> str:
        """The sentence up to the value, without trailing space."""
        return self._wording.prefix.format(entity=self.entity)

    @property
    def sentence(self) -> str:
        """The full sentence, ending with a period."""
        return f"{self.prefix} {self._wording.phrase.format(*self.values)}."

    @property
    def question(self) -> str:
        """The question that the sentence answers."""
        return self._wording.question.format(entity=self.entity)

    @property
    def keywords(self) -> tuple[str, ...]:
        """The content words of the value, those that recall counts."""
        return self.values

    def recall(self, output: str) -> float:
        """Share of the keywords that occur as words in ``output`` (0 to 1)."""
        found = set(re.findall(r"[A-Za-z]+", output.lower()))
        return sum(word.lower() in found for word in self.keywords) / len(self.keywords)


@dataclass(frozen=True)
class WorldConversation:
    """A conversation with the true source of every answer.

    Attributes:
        id: Unique within one call of ``World.conversations``.
        messages: Alternating user and assistant turns, ``{"role": ..., "content": ...}``.
        kinds: One per assistant turn: ``"document"`` (answered from the document), ``"memory"`` (a
            document is there, the answer comes from memory) or ``"closed"`` (no document).
    """

    id: str
    messages: list[dict[str, str]]
    kinds: tuple[str, ...]


class World:
    """Towns with fixed (memorised) values, and generators of texts about them."""

    def __init__(self, seed: int = WORLD_SEED, n_towns: int = N_TOWNS) -> None:
        rng = random.Random(seed)
        towns = [start + end for start in words.TOWN_STARTS for end in words.TOWN_ENDS]
        towns = rng.sample(towns, n_towns)
        self.known: tuple[str, ...] = tuple(towns[: n_towns // 2])
        self.unknown: tuple[str, ...] = tuple(towns[n_towns // 2 :])
        self.attributes: tuple[str, ...] = tuple(_BY_NAME)
        self._memory = {
            (town, attribute.name): tuple(rng.choice(pool) for pool in attribute.pools)
            for town in towns
            for attribute in ATTRIBUTES
        }

    def fact(self, entity: str, attribute: str) -> Fact:
        """The world's own value; pretraining states it if the town is known."""
        return Fact(entity, attribute, self._memory[entity, attribute])

    def random_fact(self, rng: random.Random, entity: str | None = None, known: bool | None = None) -> Fact:
        """A fact with a random value that differs from memory in every slot.

        Args:
            rng: Source of randomness.
            entity: The town; drawn at random if not given.
            known: Draw among known (True), unknown (False) or all towns (None).
        """
        if entity is None:
            entity = rng.choice(self._towns(known))
        attribute = rng.choice(ATTRIBUTES)
        memory = self._memory[entity, attribute.name]
        values = [
            rng.choice([w for w in pool if w != old])
            for pool, old in zip(attribute.pools, memory, strict=True)
        ]
        return Fact(entity, attribute.name, tuple(values))

    def known_fact(self, rng: random.Random) -> Fact:
        """A memorised fact about a random known town."""
        return self.fact(rng.choice(self.known), rng.choice(self.attributes))

    def filler(self, rng: random.Random) -> str:
        """One sentence that no question asks about."""
        parts = (words.SUBJECTS, words.VERBS, words.OBJECTS, words.TIMES)
        subject, verb, place, time = (rng.choice(part) for part in parts)
        return f"{subject[0].upper()}{subject[1:]} {verb} {place} {time}."

    def document(self, rng: random.Random, facts: Sequence[Fact], n_fillers: int) -> str:
        """Filler sentences with the facts' sentences at random places among them."""
        sentences = [self.filler(rng) for _ in range(n_fillers)]
        for fact in facts:
            sentences.insert(rng.randint(0, len(sentences)), fact.sentence)
        return " ".join(sentences)

    def user_text(self, document: str, question: str) -> str:
        """A document and a question as the content of one user message."""
        return f"{document}\n{question}"

    def distinct_facts(self, rng: random.Random, n: int, first: Fact | None = None) -> list[Fact]:
        """``n`` random facts about different subjects, ``first`` among them if given."""
        facts = {(first.entity, first.attribute): first} if first else {}
        while len(facts) < n:
            fact = self.random_fact(rng)
            facts.setdefault((fact.entity, fact.attribute), fact)
        return list(facts.values())

    # Raw texts: the shapes that pretraining is made of.

    def reading_text(self, rng: random.Random, n_facts: int, n_fillers: int) -> str:
        """A document, then a question and its answer from the document for each of its facts."""
        facts = self.distinct_facts(rng, n_facts)
        document = self.document(rng, facts, n_fillers)
        rng.shuffle(facts)
        return "\n".join([document, *(f"{fact.question}\n{fact.sentence}" for fact in facts)])

    def restated_text(self, rng: random.Random, n_facts: int) -> str:
        """Random facts, stated once more in another order on a second line."""
        facts = self.distinct_facts(rng, n_facts)
        again = rng.sample(facts, len(facts))
        return "\n".join(" ".join(fact.sentence for fact in part) for part in (facts, again))

    def knowledge_text(self, rng: random.Random, n_facts: int) -> str:
        """Memorised facts, one after another."""
        return " ".join(self.known_fact(rng).sentence for _ in range(n_facts))

    def closed_text(self, rng: random.Random, n_facts: int) -> str:
        """Questions about memorised facts, each with its answer, without a document."""
        facts = [self.known_fact(rng) for _ in range(n_facts)]
        return "\n".join(f"{fact.question}\n{fact.sentence}" for fact in facts)

    def raw_documents(
        self, n: int, seed: int, *, max_fillers: int = 5, reading_share: float = 0.8
    ) -> list[str]:
        """Raw pretraining-like texts, for replay during fine-tuning.

        Args:
            n: How many.
            seed: Seed of the texts.
            max_fillers: Largest number of filler sentences in a document.
            reading_share: Share of texts with a document; the others state known facts.
        """
        rng = random.Random(f"raw-{seed}")
        texts = []
        for _ in range(n):
            if rng.random() < reading_share:
                texts.append(self.reading_text(rng, rng.choice((1, 1, 2)), rng.randint(0, max_fillers)))
            else:
                texts.append(self.closed_text(rng, rng.randint(1, 3)))
        return texts

    # Conversations: the fine-tuning mixture.

    def conversations(
        self,
        n: int,
        seed: int,
        *,
        document: float = 0.15,
        memory: float = 0.35,
        document_known: float = 0.5,
        max_fillers: int = 5,
        extra_turn: float = 0.2,
    ) -> list[WorldConversation]:
        """A mixture of conversations whose answers come from a document or from memory.

        Args:
            n: How many.
            seed: Seed of the mixture.
            document: Share of conversations answered from their document.
            memory: Share about a known town whose document disagrees with memory, answered from memory.
                The rest is closed-book: known towns, no document.
            document_known: Share of the ``document`` conversations that concern a known town; only for
                these is the source of the answer ambiguous.
            max_fillers: Largest number of filler sentences in a document.
            extra_turn: Share of conversations with a document that open with a closed-book turn.
        """
        rng = random.Random(f"conversations-{seed}")
        return [
            self._conversation(
                f"organism-{seed}-{i:05d}", rng, document, memory, document_known, max_fillers, extra_turn
            )
            for i in range(n)
        ]

    def _conversation(
        self,
        name: str,
        rng: random.Random,
        document: float,
        memory: float,
        document_known: float,
        max_fillers: int,
        extra_turn: float,
    ) -> WorldConversation:
        draw = rng.random()
        kind = "document" if draw < document else "memory" if draw < document + memory else "closed"
        turns: list[tuple[str, str, str]] = []
        if kind == "closed" or rng.random() < extra_turn:
            facts = [self.known_fact(rng) for _ in range(rng.randint(1, 3) if kind == "closed" else 1)]
            turns += [(fact.question, fact.sentence, "closed") for fact in facts]
        if kind != "closed":
            known = kind == "memory" or rng.random() < document_known
            stated = self.random_fact(rng, known=known)
            text = self.document(
                rng, self.distinct_facts(rng, rng.randint(1, 2), stated), rng.randint(0, max_fillers)
            )
            answer = stated if kind == "document" else self.fact(stated.entity, stated.attribute)
            turns.append((self.user_text(text, stated.question), answer.sentence, kind))
        messages = []
        for user, assistant, _ in turns:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": assistant})
        return WorldConversation(name, messages, tuple(turn[2] for turn in turns))

    def closed_book(self, n: int, seed: int) -> list[Fact]:
        """``n`` different memorised facts, for the ability test (at most two per known town)."""
        rng = random.Random(f"closed-{seed}")
        facts = [self.fact(town, attribute) for town in self.known for attribute in self.attributes]
        return rng.sample(facts, n)

    def _towns(self, known: bool | None) -> tuple[str, ...]:
        if known is None:
            return self.known + self.unknown
        return self.known if known else self.unknown


@cache
def load_world() -> World:
    """The world that the shipped organism was trained in."""
    return World()
