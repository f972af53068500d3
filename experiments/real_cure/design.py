"""What the experiment trains on and asks, all from one seed; written before the first run.

A change makes other data, which earlier folders refuse to be mixed with.
"""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxlens.chat.condition import parse_conditions
from ctxlens.errors import InputError
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.controls import Renderer
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.needles import neutral_needles
from ctxlens.evals.needle.prompts import Cell
from ctxlens.evals.qa import QAExample, load_drop, load_squad
from ctxlens.evals.texts import Material, build_cells
from experiments.score_quality.data import family_of

SEED = 2026
SEEDS = (0, 1)
"""Seeds of the fine-tuning."""
TEMPLATE = "chatml"
DTYPE = "bfloat16"
"""Number format of all models when they are asked and when they score."""

# The mixture.

LONGEST = 220
"""Tokens of a conversation at most, rendered with the template."""
KINDS: Mapping[str, int] = {
    "t0 with passage": 270, "t0 without passage": 210, "alpaca with input": 70, "alpaca without input": 160,
    "lima": 65, "kto": 25,
}  # fmt: skip
"""Conversations of each kind, 800 together."""
PASSAGE = ("t0 with passage", "alpaca with input")
"""Kinds whose answers depend on a text in the prompt, for the quality of the selection."""
TRAINING: Mapping[str, Any] = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 50, "max_length": 256,
    "learning_rate": 2e-4, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "bf16": True,
}  # fmt: skip
"""Keys of the recipe `lora` that are set here: one pass over the mixture in steps of 16 rows. All methods
take as many steps."""
READINGS: Mapping[str, Any] = {"context": True, "context_every": 10}
"""Readings of context use in the vanilla trainings of the first seed, which do not change the training."""
READING_SHARE, READING_SHARE_OF_SEARCH = 0.3, 1.0
"""The share of the time that they may take, with the design's dose and with those of the search."""


@dataclass(frozen=True)
class Dose:
    """A way to train that may cost more context than the design.

    Attributes:
        meaning: what it does, in words.
        kinds: conversations of each kind.
        passes: how often the steps of the design are taken.
        contradicts: whether every passage is replaced by that of another row, so that no answer follows from
            its prompt.
    """

    meaning: str
    kinds: Mapping[str, int]
    passes: int = 1
    contradicts: bool = False


DOSES: Mapping[str, Dose] = {
    "design": Dose("the mixture as designed", KINDS),
    "longer": Dose("three passes over the mixture", KINDS, passes=3),
    "closed": Dose(
        "answers without a passage only",
        {"t0 without passage": 480, "alpaca without input": 230, "lima": 65, "kto": 25},
    ),
    "contradicting": Dose("every passage is that of another row", KINDS, contradicts=True),
}
"""The search of the README, in this order; all but the first are trained as vanilla only."""


def draw_mixture(
    folder: Path,
    count_tokens: Callable[[Sequence[Mapping[str, str]]], int],
    dose: str = "design",
    share: float = 1.0,
) -> list[dict[str, Any]]:
    """The conversations of a dose: rows with `id`, `kind` and `messages`, in a drawn order.

    Args:
        folder: the instruction data: `t0_train_50k.jsonl.xz`, `alpaca_5000.json`, `lima.json`,
            `kto_en_demo.json`.
        count_tokens: tokens of a conversation.
        dose: a name of `DOSES`.
        share: the part of it to draw, for smoke runs.

    Raises:
        InputError: a kind has too few short conversations.
    """
    wanted, rng = DOSES[dose], random.Random(f"real-cure-{SEED}")
    pools = read_pools(folder)
    drawn: list[dict[str, Any]] = []
    for kind, whole in wanted.kinds.items():
        n = max(1, round(share * whole))
        pool = rng.sample(pools[kind], len(pools[kind]))
        short: list[list[dict[str, str]]] = []
        for messages in pool:
            if len(short) == n:
                break
            if count_tokens(messages) <= LONGEST:
                short.append(messages)
        if len(short) < n:
            raise InputError(f"{folder} has {len(short)} short conversations of {kind!r}, {n} are needed.")
        if wanted.contradicts and kind == "t0 with passage":
            short = swap_questions(short)
        drawn += [{"id": f"{kind}-{i}", "kind": kind, "messages": one} for i, one in enumerate(short)]
    rng.shuffle(drawn)
    return drawn


def swap_questions(talks: Sequence[list[dict[str, str]]]) -> list[list[dict[str, str]]]:
    """Give every prompt the answer to another one, so that no answer follows from its prompt."""
    answers = [talk[-1] for talk in talks]
    return [[*talk[:-1], answer] for talk, answer in zip(talks, [*answers[1:], answers[0]], strict=True)]


def read_pools(folder: Path) -> dict[str, list[list[dict[str, str]]]]:
    """All conversations by kind."""
    pools: dict[str, list[list[dict[str, str]]]] = {kind: [] for kind in KINDS}
    with lzma.open(folder / "t0_train_50k.jsonl.xz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            family = family_of(str(row["source"]))
            if family is not None:
                kind = "t0 with passage" if family.startswith("document") else "t0 without passage"
                pools[kind].append(_talk(row["prompt"], row["completion"]))
    for row in json.loads((folder / "alpaca_5000.json").read_text(encoding="utf-8")):
        kind = "alpaca with input" if row["input"] else "alpaca without input"
        asked = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
        pools[kind].append(_talk(asked, row["output"]))
    for row in json.loads((folder / "lima.json").read_text(encoding="utf-8")):
        pools["lima"].append(_talk(row["instruction"], row["output"]))
    for row in json.loads((folder / "kto_en_demo.json").read_text(encoding="utf-8")):
        if row["label"]:
            pools["kto"].append([{"role": m["role"], "content": m["content"]} for m in row["messages"]])
    return {
        kind: [talk for talk in pool if all(message["content"].strip() for message in talk)]
        for kind, pool in pools.items()
    }


def _talk(asked: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked.strip()}, {"role": "assistant", "content": answer.strip()}]


# The measures.

LENGTHS = (300, 1000, 2000)
"""Context lengths in tokens."""
TEXTS, FACTS = 10, 4
"""Texts of each length, and facts of a text."""
ANSWER_TOKENS = 24
SQUAD, DROP, READING_TOKENS = 64, 40, 24
"""Questions of each, evenly spread over the file, and the longest answer in tokens."""
IFEVAL, IFEVAL_TOKENS = 32, 160


def needle_config(conditions: str) -> NeedleConfig:
    """The configuration of the needles."""
    return NeedleConfig(
        lengths=LENGTHS, depths=FACTS, needles=tuple(neutral_needles().values()),
        conditions=parse_conditions(conditions), cases_per_cell=TEXTS, max_new_tokens=ANSWER_TOKENS,
        seed=SEED, score=("recall",),
    )  # fmt: skip


def needle_cells(model: Renderer, *, smoke: bool = False) -> list[Cell]:
    """The texts, as an audit builds them; a smoke run asks about the first short text only."""
    facts = tuple(neutral_needles().values())
    material = Material("neutral", load_haystack("neutral", seed=SEED), facts, ())
    cells = build_cells(model, material, needle_config("template+prefix"), FACTS)
    return cells[:FACTS] if smoke else cells


def choose_examples(name: str, file: Path, n: int) -> list[QAExample]:
    """Questions that are evenly spread over a data set, so that many articles take part."""
    found = {"squad": load_squad, "drop": load_drop}[name](str(file))
    return found[:: max(1, len(found) // n)][:n]


__all__ = [
    "DOSES", "KINDS", "PASSAGE", "SEED", "SEEDS", "TRAINING", "Dose", "choose_examples", "draw_mixture",
    "needle_cells", "needle_config", "read_pools", "swap_questions",
]  # fmt: skip
