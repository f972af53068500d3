"""Vanilla and indicator fine-tuning: the same rows, the same recipe; the vanilla model chooses the turns."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctxlens.chat.data import Conversation
from ctxlens.chat.roles import DEFAULT_INDICATOR, render
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.sentences import split_sentences
from ctxlens.heads import needle_layer
from ctxlens.models import Model, load_model
from ctxlens.results import Scores, Selection
from ctxlens.scoring import score_conversations
from ctxlens.scoring.selection import score_rows, select_turns, selection_quality
from ctxlens.sft import train
from ctxlens.stats import auroc
from experiments.natural_model.corpus import reading_text
from experiments.natural_model.presets import Preset
from experiments.natural_model.sources import Sources

DEPENDENT = ("document", "input")
"""Kinds of conversations whose answers need what the user wrote in addition to the question."""

TOP_SHARE = 0.3
"""Share of turns that get the indicator: those with the highest scores. Fixed before any training;
the paper's thresholds choose .04 to .34 (its Table 10)."""

REPLAY_TOKENS = 250


def choose_conversations(sources: Sources, tokenizer: Any, preset: Preset, seed: int) -> list[Conversation]:
    """The fine-tuning mix: the preset's number of conversations of each kind, none longer than it allows."""
    rng = random.Random(f"{seed}-sft")
    chosen: list[Conversation] = []
    for kind, wanted in preset.sft_rows.items():
        pool = [one for one in sources.conversations if one.labels["kind"] == kind]
        fitting = (one for one in rng.sample(pool, len(pool)) if _tokens(tokenizer, one) <= preset.sft_tokens)
        chosen += [one for one, _ in zip(fitting, range(wanted), strict=False)]
    return rng.sample(chosen, len(chosen))


def _tokens(tokenizer: Any, conversation: Conversation) -> int:
    return render(tokenizer, list(conversation.messages)).n_tokens


def replay_texts(sources: Sources, tokenizer: Any, n: int, seed: int) -> list[str]:
    """Raw texts of pretraining that are not too long: tasks, passages with questions, pieces of essays."""
    rng = random.Random(f"{seed}-replay")
    pieces = [s for essay in sources.texts["essays"] for s in _pieces(essay, 8)]
    kinds = [
        sources.texts["tasks"], sources.texts["reading"], pieces,
        [reading_text(p, rng.sample(qs, min(2, len(qs))), rng) for p, qs in sources.passages if qs],
    ]  # fmt: skip
    found: list[str] = []
    while len(found) < n:
        text = rng.choice(rng.choice(kinds))
        if len(tokenizer(text, verbose=False)["input_ids"]) <= REPLAY_TOKENS:
            found.append(text)
    return found


def _pieces(text: str, n_sentences: int) -> list[str]:
    sentences = split_sentences(text)
    return [" ".join(sentences[at : at + n_sentences]) for at in range(0, len(sentences), n_sentences)]


@dataclass(frozen=True)
class FineTuning:
    """The fine-tunings of one base model.

    Attributes:
        base: Folder of the base model.
        folder: Where the fine-tuned models go.
        preset: Sizes.
        seed: Of the order of rows, and of the mix.
        conversations: The mix.
        replayed: Raw texts to replay.
    """

    base: Path
    folder: Path
    preset: Preset
    seed: int
    conversations: Sequence[Conversation]
    replayed: Sequence[str]

    def train(self, name: str, **options: Any) -> Path:
        """One fine-tuning; a finished one is reused."""
        rows = len(self.conversations) + len(self.replayed)
        steps = max(1, self.preset.sft_epochs * rows // self.preset.sft_batch)
        arguments = {
            "per_device_train_batch_size": max(1, self.preset.sft_batch // 2),
            "gradient_accumulation_steps": 2,
            "learning_rate": self.preset.sft_lr, "lr_scheduler_type": "cosine", "warmup_steps": steps // 10,
            "weight_decay": 0.0, "adam_beta2": 0.99, "max_grad_norm": 1.0,
            "num_train_epochs": self.preset.sft_epochs, "logging_steps": 5, "seed": self.seed,
            "max_length": self.preset.n_ctx,
        }  # fmt: skip
        if not torch.cuda.is_available():
            arguments |= {"use_cpu": True}
        return train(
            self.conversations, out=self.folder / name, model=str(self.base),
            replay_texts=self.replayed, args=arguments, unusable="skip", **options,
        )  # fmt: skip

    def vanilla(self) -> Path:
        """Plain fine-tuning: also the seed model that scores the data."""
        return self.train("vanilla")

    def indicator(self, chosen: Any, name: str = "indicator") -> Path:
        """The same with the indicator on the chosen turns."""
        return self.train(name, selection=chosen, indicator=DEFAULT_INDICATOR)

    def oracle_turns(self) -> set[tuple[str, int]]:
        """The turns that truly depend on what the user wrote in addition to the question."""
        return {(one.id, 1) for one in self.conversations if one.labels["kind"] in DEPENDENT}

    def select(self, vanilla: Path, essays: Sequence[str]) -> tuple[Selection, dict[str, Any]]:
        """Score the mix with the vanilla model, choose turns, and compare the choice with the known kinds."""
        model = load_model(str(vanilla), backend="native")
        layer = find_layer(model, essays, self.seed)
        kinds = {(one.id, 1): str(one.labels["kind"]) for one in self.conversations}
        scores = score_conversations(model, self.conversations, layers="all", kinds=kinds)
        selection = select_turns(scores, top_share=TOP_SHARE, layer=layer)
        return selection, {
            "layer": layer, "top_share": TOP_SHARE, "threshold": selection.meta["threshold"],
            "selected": selection.meta["selected"], "turns": selection.meta["turns"],
            **self._quality(selection), "auroc_by_layer": self._ranking(scores, model.n_layers),
            "other_rules": self._other_rules(scores, layer),
            "selected_by_kind": _shares_by_kind(selection),
        }  # fmt: skip

    def _quality(self, selection: Selection) -> dict[str, float]:
        found = selection_quality(selection, self.oracle_turns())
        return {"precision": found.precision, "recall": found.recall}

    def _ranking(self, scores: Scores, n_layers: int) -> dict[str, float]:
        """How well each layer's score tells dependent turns from the others; and prompt length."""
        truth = self.oracle_turns()
        ranking = {}
        for layer in range(n_layers):
            rows = score_rows(scores, layer, "mean_of_best")
            is_true = [turn in truth for turn in zip(rows["conversation"], rows["turn"], strict=True)]
            ranking[str(layer)] = _auroc(rows["score"].to_numpy(), is_true)
        ranking["prompt length"] = _auroc(rows["context_tokens"].to_numpy(), is_true)
        return ranking

    def _other_rules(self, scores: Scores, layer: int) -> dict[str, dict[str, float]]:
        """What other rules would have chosen."""
        found = {}
        for rule in ("mixture", "valley", 0.6):
            selection = select_turns(scores, beta=rule, layer=layer)
            share = selection.meta["selected"] / selection.meta["turns"]
            found[str(rule)] = {"share": share, **self._quality(selection)}
        return found


def find_layer(model: Model, essays: Sequence[str], seed: int) -> int:
    """The layer whose best head looks most at the needle while the model repeats it."""
    config = NeedleConfig(
        lengths=(160,), depths=(0.0, 50.0, 100.0), needles=("sf",), cases_per_cell=4, max_new_tokens=8,
        conditions=("plain+prefix",), seed=seed,
    )  # fmt: skip
    sentences = [sentence for essay in essays for sentence in split_sentences(essay)]
    return needle_layer(model, build_cells(model, config, load_haystack(sentences, seed=seed)), config).best


def _auroc(values: Any, is_true: Sequence[bool]) -> float:
    positive = [value for value, true in zip(values, is_true, strict=True) if true]
    return auroc(positive, [value for value, true in zip(values, is_true, strict=True) if not true])


def _shares_by_kind(selection: Selection) -> dict[str, float]:
    shares = selection.frame.groupby("kind")["selected"].mean()
    return {str(kind): float(share) for kind, share in shares.items()}


def read_log(folder: Path) -> dict[str, Any]:
    """The loss curve of a finished fine-tuning."""
    found = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    return {key: found[key] for key in ("steps", "wall_seconds", "log") if key in found}


__all__ = [
    "DEPENDENT", "TOP_SHARE", "FineTuning", "choose_conversations", "find_layer", "read_log", "replay_texts",
]  # fmt: skip
