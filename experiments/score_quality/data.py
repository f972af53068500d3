"""Two data sets with known answers to the question which answers need their context."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ctxlens.chat.data import Conversation, load_conversations
from ctxlens.organism import load_world, recipe

FAMILIES: Mapping[str, tuple[str, str]] = {
    # kind, family: pattern of task names. First answers that stand in, or are made of, a text of the prompt.
    "document: sciq": ("document", r"sciq_(Direct_Question|Multiple_Choice|Multiple_Choice_Question_First)"),
    "document: adversarial_qa": (
        "document",
        r"adversarial_qa_\w+_(answer_the_following_q|based_on|question_context_answer)",
    ),
    "document: dream": (
        "document",
        r"dream_(baseline|read_the_following_conversation_and_answer_the_question)",
    ),
    "document: samsum": ("document", r"samsum_(?!Write_a_dialogue).*"),
    "document: gigaword": (
        "document",
        r"gigaword_(TLDR|first_sentence_title|generate_summary_for_this|in_a_nutshell|make_a_title"
        r"|write_a_title_for_this_sentence)",
    ),
    # The question alone: the model has to know the answer.
    "closed: hotpotqa": ("closed", r"kilt_tasks_hotpotqa_.*"),
    "closed: sciq": ("closed", r"sciq_Direct_Question_Closed_Book_"),
    "closed: commonsense_qa": ("closed", r"commonsense_qa_answer_given_question_without_options"),
    # The answer is among the options of the question: the model has to know it, but it can copy it.
    "options: sciq": ("options", r"sciq_Multiple_Choice_Closed_Book_"),
    "options: commonsense_qa": ("options", r"commonsense_qa_(question_answering|most_suitable_answer)"),
}
"""Task families, what their answers need, and the task names (T0's) that belong to them."""


@dataclass(frozen=True)
class Labelled:
    """Conversations with the kind of every answer, and the kinds whose answers need the context."""

    conversations: list[Conversation]
    kinds: dict[tuple[str, int], str]
    positive: str = "document"


def organism_world(n: int, seed: int) -> Labelled:
    """The mixture that the organism was fine-tuned on, with another seed."""
    made = load_world().conversations(n, seed=seed, **recipe.SHARES)
    kinds = {(c.id, 2 * at + 1): kind for c in made for at, kind in enumerate(c.kinds)}
    return Labelled([Conversation(c.id, tuple(c.messages), "organism") for c in made], kinds)


def t0_world(
    path: str | Path, fits: Callable[[Conversation], bool], *, per_kind: Mapping[str, int], seed: int
) -> Labelled:
    """A sample of T0's training data, balanced over the families of each kind.

    Args:
        path: the data set, with columns `source`, `prompt`, `completion`.
        fits: whether every measured model can read a conversation without truncation.
        per_kind: conversations of each kind; every family of a kind contributes equally, as far as it has
            enough.
        seed: of the draw.
    """
    by_family: dict[str, list[Conversation]] = {name: [] for name in FAMILIES}
    for conversation in load_conversations(path):
        family = family_of(str(conversation.labels["source"]))
        if family is not None:
            by_family[family].append(conversation)
    rng = random.Random(seed)
    chosen: list[Conversation] = []
    kinds: dict[tuple[str, int], str] = {}
    for kind, n in per_kind.items():
        families = [family for family, (of, _) in FAMILIES.items() if of == kind]
        for family in families:
            pool = rng.sample(by_family[family], len(by_family[family]))
            taken = _first(pool, fits, round(n / len(families)))
            chosen += taken
            kinds |= {(one.id, 1): kind for one in taken}
    return Labelled(chosen, kinds)


def family_of(source: str) -> str | None:
    """The family that a task name belongs to, if any."""
    return next((name for name, (_, pattern) in FAMILIES.items() if re.fullmatch(pattern, source)), None)


def _first(pool: Iterable[Conversation], fits: Callable[[Conversation], bool], n: int) -> list[Conversation]:
    taken = []
    for conversation in pool:
        if len(taken) == n:
            break
        if fits(conversation):
            taken.append(conversation)
    return taken
