"""The texts and their split: nothing that is asked later is trained on.

Held out whole: a third of the SQuAD articles, a quarter of the DROP passages, a third of the essays, and a
share of T0's closed-book rows. A text from any source that shares 13 words in a row with a held-out passage
is not trained on either.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctxlens.chat.data import Conversation, load_conversations
from experiments.score_quality.data import family_of

SHINGLE_WORDS = 13
READING = r"(quoref|ropes|duorc|cosmos_qa_context|adversarial_qa|dream|wiqa|qasc_qa|quartz|samsum|sciq).*"
TOO_LONG = r"(wiki_hop|multi_news).*"
T0, ALPACA, LIMA = "instruct/t0_train_50k.jsonl.xz", "instruct/alpaca_5000.json", "instruct/lima.json"
SQUAD, DROP, ESSAYS = "squad_dev_v1.1_even_articles.json", "drop/drop_v0_dev.jsonl.gz", "paul_graham"
IFEVAL = "ifeval/input_data.jsonl"


def share(key: str, salt: str) -> float:
    """A number from 0 to 1 for a key; it is the same in every run."""
    digest = hashlib.blake2b(f"{salt}|{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@dataclass(frozen=True)
class Question:
    """A question about a passage, with its accepted answers."""

    key: str
    passage: str
    question: str
    answers: tuple[str, ...]


@dataclass
class Sources:
    """All texts by their use.

    Attributes:
        texts: Texts to pretrain on, by kind: `reading`, `tasks`, `instructions`, `essays`.
        passages: Passages with questions, to pretrain on in reading-comprehension shape.
        conversations: Conversations to fine-tune on, with their kind in `labels["kind"]`.
        closed_book: Held-out conversations of kind `closed`.
        squad: Held-out SQuAD articles, original layout.
        drop: Held-out rows of DROP.
        essays: Held-out essays, by file name.
        dropped: Number of training texts that were dropped because they share words with held-out texts.
    """

    texts: dict[str, list[str]] = field(default_factory=dict)
    passages: list[tuple[str, list[Question]]] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    closed_book: list[Conversation] = field(default_factory=list)
    squad: dict[str, Any] = field(default_factory=dict)
    drop: list[dict[str, Any]] = field(default_factory=list)
    essays: dict[str, str] = field(default_factory=dict)
    dropped: int = 0


def load_sources(data: Path) -> Sources:
    """Read and split everything."""
    made = Sources()
    made.texts |= {"essays": [], "reading": [], "tasks": [], "instructions": []}
    _take_squad(made, data)
    _take_drop(made, data)
    _take_essays(made, data)
    _take_instructions(made, data)
    _take_t0(made, data)
    _drop_overlapping(made, data)
    return made


def _take_squad(made: Sources, data: Path) -> None:
    """Held-out articles are kept in their layout; the paragraphs of the others are pretrained on."""
    articles = json.loads((data / SQUAD).read_text(encoding="utf-8"))
    held = [one for one in articles["data"] if is_held_article(one["title"])]
    made.squad = {"version": articles.get("version", "1.1"), "data": held}
    for article in articles["data"]:
        if not is_held_article(article["title"]):
            made.passages += [_squad_passage(paragraph) for paragraph in article["paragraphs"]]


def _take_drop(made: Sources, data: Path) -> None:
    """Rows about held-out passages are kept; the other passages are pretrained on."""
    with gzip.open(data / DROP, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    made.drop = [row for row in rows if is_held_passage(split_drop(row)[0])]
    made.passages += _drop_passages(row for row in rows if not is_held_passage(split_drop(row)[0]))


def _take_essays(made: Sources, data: Path) -> None:
    """A third of the essays is held out; the others are pretrained on."""
    for file in essay_files(data):
        text = file.read_text(encoding="utf-8", errors="replace")
        if share(file.name, "essays") < 1 / 3:
            made.essays[file.name] = text
        else:
            made.texts["essays"].append(text)


def is_held_article(title: str) -> bool:
    """Whether a SQuAD article is held out, by its title."""
    return share(title, "squad") < 1 / 3


def is_held_passage(passage: str) -> bool:
    """Whether a DROP passage is held out, by its text."""
    return share(passage, "drop") < 1 / 4


def essay_files(data: Path) -> list[Path]:
    """The essays, without their licence."""
    return [file for file in sorted((data / ESSAYS).glob("*.txt")) if not file.name.startswith("LICENSE")]


def split_drop(row: Mapping[str, Any]) -> tuple[str, str]:
    """Passage and question of a DROP row, which holds them as one prompt."""
    text = row["context"].removeprefix("Passage: ").removesuffix("\nAnswer:")
    passage, question = text.rsplit("\nQuestion: ", 1)
    return passage.strip(), question.strip()


def _squad_passage(paragraph: Mapping[str, Any]) -> tuple[str, list[Question]]:
    return paragraph["context"], squad_questions(paragraph)


def squad_questions(paragraph: Mapping[str, Any]) -> list[Question]:
    """The questions of one SQuAD paragraph."""
    return [
        Question(
            one["id"], paragraph["context"], one["question"].strip(),
            tuple(dict.fromkeys(answer["text"] for answer in one["answers"])),
        )
        for one in paragraph["qas"]
    ]  # fmt: skip


def drop_question(row: Mapping[str, Any], key: str) -> Question:
    """One row of DROP as a question."""
    passage, question = split_drop(row)
    return Question(key, passage, question, tuple(dict.fromkeys(row["ref_text"].split("|"))))


def _drop_passages(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Question]]]:
    found: dict[str, list[Question]] = {}
    for number, row in enumerate(rows):
        one = drop_question(row, str(number))
        found.setdefault(one.passage, []).append(one)
    return list(found.items())


def _take_instructions(made: Sources, data: Path) -> None:
    """Half of Alpaca and LIMA is pretrained on as text, the other half is for fine-tuning."""
    for name, path in (("alpaca", ALPACA), ("lima", LIMA)):
        rows = json.loads((data / path).read_text(encoding="utf-8"))
        for number, (row, one) in enumerate(zip(rows, load_conversations(data / path), strict=False)):
            if share(f"{name}-{number}", "instructions") < 0.5:
                made.texts["instructions"].append("\n".join(m["content"] for m in one.messages))
            elif len(one.messages) == 2:
                kind = "input" if row.get("input") else "instruction"
                made.conversations.append(_named(one, f"{name}-{number}", kind))


def _take_t0(made: Sources, data: Path) -> None:
    """Rows of the labelled families are for fine-tuning (a fifth of the closed-book ones is held out)."""
    for one in load_conversations(data / T0):
        source = str(one.labels["source"])
        family = family_of(source)
        if family is None:
            if not re.fullmatch(TOO_LONG, source):
                kind = "reading" if re.fullmatch(READING, source) else "tasks"
                made.texts[kind].append("\n".join(m["content"].strip() for m in one.messages))
            continue
        kind = family.split(":")[0]
        is_held = kind == "closed" and share(one.messages[0]["content"], "closed") < 0.2
        target = made.closed_book if is_held else made.conversations
        target.append(_named(one, f"t0-{one.id}", kind))


def _named(one: Conversation, name: str, kind: str) -> Conversation:
    return Conversation(name, one.messages, one.source, {"kind": kind})


def shingles(text: str) -> Iterator[int]:
    """Hashes of all runs of 13 words, without punctuation and case."""
    words = re.findall(r"\w+", text.lower())
    for start in range(len(words) - SHINGLE_WORDS + 1):
        yield hash(tuple(words[start : start + SHINGLE_WORDS]))


def held_out_texts(made: Sources, data: Path) -> list[str]:
    """All texts that the evaluation asks about."""
    passages = [p["context"] for article in made.squad["data"] for p in article["paragraphs"]]
    passages += list(dict.fromkeys(split_drop(row)[0] for row in made.drop))
    lines = (data / IFEVAL).read_text(encoding="utf-8").splitlines()
    return [*passages, *made.essays.values(), *(json.loads(line)["prompt"] for line in lines if line.strip())]


def _drop_overlapping(made: Sources, data: Path) -> None:
    held = {one for text in held_out_texts(made, data) for one in shingles(text)}

    def keep(items: Sequence[Any], text_of: Any) -> list[Any]:
        kept = [item for item in items if held.isdisjoint(shingles(text_of(item)))]
        made.dropped += len(items) - len(kept)
        return kept

    made.texts = {kind: keep(texts, str) for kind, texts in made.texts.items()}
    made.passages = keep(made.passages, lambda item: item[0])
    made.conversations = keep(made.conversations, lambda c: "\n".join(m["content"] for m in c.messages))
