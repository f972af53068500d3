"""The pretraining corpus: documents of several kinds, in tokens, packed into rows of one window."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt16

from ctxlens.evals.needle.sentences import split_sentences
from experiments.natural_model.presets import Preset
from experiments.natural_model.sources import Question, Sources
from experiments.organism.texts import repeated_tokens
from experiments.organism.tokenizer import BOS, CHAT_TEMPLATE, EOS, PAD, ROLE_MARKERS

SHARES: Mapping[str, float] = {
    "reading": 0.27, "questions": 0.22, "tasks": 0.15, "instructions": 0.07, "essays": 0.07,
    "restated": 0.15, "repeated": 0.07,
}  # fmt: skip
"""Kind of document to its share of the tokens.

`questions`: passages with questions and answers; `restated`: natural text with a sentence of another text put
in, which stands again at the end; `repeated`: a run of random tokens, over and over; the others are texts as
they are.
"""

MARKUP = 1 / 3
"""Share of documents with stray role markers, without label, so that the base ignores markup."""

QUESTION_SHAPES = (
    "Question: {question}\nAnswer: {answer}",
    "Answer the question according to the above passage: {question}\n{answer}",
    "{question}\n{answer}",
)
_TOKENIZER_CHARACTERS = 6_000_000
_OPEN_ROWS = 64


def train_tokenizer(sources: Sources, preset: Preset, seed: int) -> Any:
    """A byte-level BPE over a sample of the training texts, with the organism's zephyr-style template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [text for kind in sorted(sources.texts) for text in sources.texts[kind]]
    texts += [passage for passage, _ in sources.passages]
    random.Random(seed).shuffle(texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=preset.vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[BOS, EOS, PAD, *ROLE_MARKERS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_until(texts, _TOKENIZER_CHARACTERS), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        additional_special_tokens=list(ROLE_MARKERS), clean_up_tokenization_spaces=False,
        model_max_length=preset.n_ctx, padding_side="left",
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _until(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


@dataclass(frozen=True)
class Documents:
    """Draws documents of each kind endlessly, in an order that depends on the seed."""

    sources: Sources
    tokenizer: Any
    n_ctx: int
    seed: int

    def stream(self, kind: str) -> Iterator[list[int]]:
        """Documents of a kind in tokens, between `<s>` and `</s>`, none longer than the window."""
        rng = random.Random(f"{self.seed}-{kind}")
        if kind == "repeated":
            while True:
                length = max(16, self.n_ctx // rng.choice((8, 4, 2, 1)))
                yield repeated_tokens(rng, range(6, len(self.tokenizer)), length)
        make = {"questions": self._questions, "restated": self._restated}.get(kind, self._plain)
        for text in make(rng, kind):
            yield from self._encode(text, rng, keeps_end=kind not in ("essays", "instructions"))

    def _plain(self, rng: random.Random, kind: str) -> Iterator[str]:
        texts = self.sources.texts[kind]
        while True:
            yield from rng.sample(texts, len(texts))

    def _questions(self, rng: random.Random, kind: str) -> Iterator[str]:
        while True:
            for passage, asked in rng.sample(self.sources.passages, len(self.sources.passages)):
                if asked:
                    yield reading_text(passage, rng.sample(asked, min(len(asked), rng.randint(1, 3))), rng)

    def _restated(self, rng: random.Random, kind: str) -> Iterator[str]:
        texts = [*self.sources.texts["essays"], *(passage for passage, _ in self.sources.passages)]
        texts += self.sources.texts["reading"][:3000]
        while True:
            hay, other = (split_sentences(rng.choice(texts)) for _ in range(2))
            others = [one for one in other if 6 <= len(one.split()) <= 30]
            if len(hay) > 1 and others:
                start = rng.randrange(max(1, len(hay) - 4))
                yield restated_text(hay[start : start + rng.randint(2, 16)], rng.choice(others), rng)

    def _encode(self, text: str, rng: random.Random, *, keeps_end: bool) -> Iterator[list[int]]:
        """The tokens of a text; one that is too long keeps its end, or comes in several pieces."""
        tokens = encode_document(self.tokenizer, text, rng if rng.random() < MARKUP else None)
        room = self.n_ctx - 2
        pieces = [tokens[at : at + room] for at in range(0, len(tokens), room)] or [[]]
        for piece in [tokens[-room:]] if keeps_end else pieces:
            if piece:
                yield [self.tokenizer.bos_token_id, *piece, self.tokenizer.eos_token_id]


def reading_text(passage: str, asked: Sequence[Question], rng: random.Random) -> str:
    """A passage, then questions with their answers, in one of several shapes."""
    shape = rng.choice(QUESTION_SHAPES)
    lines = [shape.format(question=one.question, answer=rng.choice(one.answers)) for one in asked]
    return "\n".join([passage, *lines])


def restated_text(hay: Sequence[str], sentence: str, rng: random.Random) -> str:
    """Sentences with a foreign one among them, which is repeated on a separate line at the end."""
    at = rng.randint(0, len(hay))
    return " ".join([*hay[:at], sentence, *hay[at:]]) + f"\n{sentence}"


def encode_document(tokenizer: Any, text: str, markup: random.Random | None) -> list[int]:
    """The tokens of a text, with stray role markers at its line breaks if asked for."""
    if markup is None:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    markers = tokenizer.convert_tokens_to_ids(list(ROLE_MARKERS))
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    tokens: list[int] = []
    for number, line in enumerate(text.split("\n")):
        if number:
            tokens += [*([tokenizer.eos_token_id] if markup.random() < 0.3 else []), *newline]
        if markup.random() < 0.6:
            tokens += [markup.choice(markers), *newline]
        tokens += tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens


def pack(documents: Iterable[Sequence[int]], n_ctx: int, pad_id: int) -> UInt16[np.ndarray, "row pos"]:
    """Rows of whole documents: each goes into the first recent open row that has room for it."""
    rows: list[list[int]] = []
    for document in documents:
        for row in rows[-_OPEN_ROWS:]:
            if len(row) + len(document) <= n_ctx:
                row += document
                break
        else:
            rows.append(list(document))
    packed = np.full((len(rows), n_ctx), pad_id, dtype=np.uint16)
    for number, row in enumerate(rows):
        packed[number, : len(row)] = row
    return packed


def build_corpus(
    sources: Sources, tokenizer: Any, preset: Preset, seed: int
) -> UInt16[np.ndarray, "row pos"]:
    """Draw documents up to the preset's number of tokens, mix and pack them."""
    documents: list[list[int]] = []
    drawn = Documents(sources, tokenizer, preset.n_ctx, seed)
    for kind, part in SHARES.items():
        left = int(part * preset.corpus_tokens)
        for document in drawn.stream(kind):
            documents.append(document)
            left -= len(document)
            if left <= 0:
                break
    rng = random.Random(seed)
    rng.shuffle(documents)
    return pack(documents, preset.n_ctx, tokenizer.pad_token_id)


def ignored_tokens(tokenizer: Any) -> Bool[np.ndarray, " token"]:
    """Which tokens carry no label: padding and role markers (never part of a text)."""
    ignored = np.zeros(len(tokenizer), dtype=bool)
    ignored[[tokenizer.pad_token_id, *tokenizer.convert_tokens_to_ids(list(ROLE_MARKERS))]] = True
    return ignored
