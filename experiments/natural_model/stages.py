"""The stages of the experiment; each writes its files once and is skipped when they exist."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ctxlens.errors import RunExistsError
from ctxlens.files import write_atomic
from ctxlens.models import load_model
from ctxlens.results import Selection
from experiments.natural_model.asking import (
    Arm,
    arms_of,
    ask_closed_book,
    ask_needles,
    ask_questions,
    choose_questions,
)
from experiments.natural_model.comparing import MEASURES, summarise
from experiments.natural_model.corpus import SHARES, build_corpus, train_tokenizer
from experiments.natural_model.finetune import FineTuning, choose_conversations, read_log, replay_texts
from experiments.natural_model.presets import Preset
from experiments.natural_model.pretrain import Pretraining
from experiments.natural_model.sources import Sources, load_sources
from experiments.natural_model.standard import ask_ifeval, ask_reading


@dataclass(frozen=True)
class Study:
    """Data, files and settings of a run.

    Attributes:
        data: The folder of natural text.
        out: The run folder, for weights and everything else that stays out of the repository.
        preset: Sizes.
        minutes: Budget of pretraining.
        seed: Of everything.
        log: Called with one line at a time.
    """

    data: Path
    out: Path
    preset: Preset
    minutes: float
    seed: int
    log: Callable[[str], None]

    @cached_property
    def sources(self) -> Sources:
        """The texts and their split."""
        return load_sources(self.data)

    def check_settings(self) -> None:
        """Refuse a folder that holds a run with other settings."""
        settings = json.loads(json.dumps({"preset": asdict(self.preset), "seed": self.seed}))
        path = self.out / "settings.json"
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != settings:
            raise RunExistsError(f"{self.out} holds a run with other settings; choose another --out folder.")
        write_atomic(path, json.dumps(settings, indent=1))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The JSON result of that name; it is computed if it does not exist."""
        path = self.out / f"{name}.json"
        if not path.is_file():
            began = time.monotonic()
            write_atomic(path, json.dumps(make(), indent=1))
            self.log(f"{name}: {time.monotonic() - began:.0f} s")
        return json.loads(path.read_text(encoding="utf-8"))

    def prepare(self) -> dict[str, Any]:
        """Tokenizer and packed corpus."""

        def make() -> dict[str, Any]:
            tokenizer = train_tokenizer(self.sources, self.preset, self.seed)
            tokenizer.save_pretrained(self.out / "tokenizer")
            corpus = build_corpus(self.sources, tokenizer, self.preset, self.seed)
            write_atomic(self.out / "corpus.npy", lambda path: _save_array(path, corpus))
            used = corpus != tokenizer.pad_token_id
            return {
                "tokens": int(used.sum()), "rows": len(corpus), "filled": float(used.mean()),
                "vocabulary": len(tokenizer), "shares": dict(SHARES),
                "characters": {kind: sum(map(len, texts)) for kind, texts in self.sources.texts.items()},
                "passages": len(self.sources.passages), "dropped_for_overlap": self.sources.dropped,
                "held_out": {
                    "squad_articles": [one["title"] for one in self.sources.squad["data"]],
                    "drop_rows": len(self.sources.drop), "essays": sorted(self.sources.essays),
                    "closed_book": len(self.sources.closed_book),
                },
            }  # fmt: skip

        return self.once("corpus", make)

    def pretrain(self) -> dict[str, Any]:
        """The base model."""
        from transformers import AutoTokenizer

        folder = self.out / "pretrain"
        if not (folder / "pretrain.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(self.out / "tokenizer")
            corpus = np.load(self.out / "corpus.npy", mmap_mode="r")
            Pretraining(
                self.preset, tokenizer, corpus, folder, minutes=self.minutes, seed=self.seed, log=self.log
            ).run()
        return json.loads((folder / "pretrain.json").read_text(encoding="utf-8"))

    @cached_property
    def fine_tuning(self) -> FineTuning:
        """The fine-tunings of the base model, on one mix."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.out / "tokenizer")
        mix = choose_conversations(self.sources, tokenizer, self.preset, self.seed)
        n_replayed = round(len(mix) * self.preset.replay_share / (1 - self.preset.replay_share))
        replayed = replay_texts(self.sources, tokenizer, n_replayed, self.seed)
        return FineTuning(
            self.out / "pretrain" / "base", self.out / "sft", self.preset, self.seed, mix, replayed
        )

    def vanilla(self) -> None:
        """The seed model."""
        if not self._is_trained("vanilla"):
            self.fine_tuning.vanilla()

    def select(self) -> dict[str, Any]:
        """Which turns get the indicator."""

        def make() -> dict[str, Any]:
            essays = list(self.sources.essays.values())
            selection, found = self.fine_tuning.select(self.out / "sft" / "vanilla", essays)
            selection.save(self.out / "selection.parquet")
            return found

        return self.once("selection", make)

    def indicator(self) -> None:
        """The same rows with the indicator on the selected turns."""
        if not self._is_trained("indicator"):
            self.fine_tuning.indicator(Selection.load(self.out / "selection.parquet"))

    def oracle(self) -> None:
        """The same rows with the indicator on the turns that are known to depend on their text."""
        if self.preset.oracle and not self._is_trained("oracle"):
            self.fine_tuning.indicator(self.fine_tuning.oracle_turns(), "oracle")

    def _is_trained(self, name: str) -> bool:
        return (self.out / "sft" / name / "train.json").is_file()

    def models(self) -> dict[str, Path]:
        """The models that exist."""
        trained = {name: self.out / "sft" / name for name in FINE_TUNED if self._is_trained(name)}
        return {"base": self.out / "pretrain" / "base", **trained}

    def evaluate(self) -> None:
        """Ask every model everything; one file per model and set."""
        for part in MEASURES:
            for name, folder in self.models().items():
                self.once(_file(part, name), partial(self._ask, folder, arms_of(name), part))

    def _ask(self, folder: Path, arms: Sequence[Arm], part: str) -> dict[str, Any]:
        model = load_model(str(folder), backend="native")
        if part == "needle":
            return ask_needles(model, arms, self.sources.essays, self.preset, self.seed)
        if part == "closed book":
            return ask_closed_book(model, arms, self.sources.closed_book[: self.preset.prompts])
        if part == "ifeval":
            return ask_ifeval(model, arms, self.data, self.preset.ifeval, self.out)
        data_set = part.split()[0]
        questions = choose_questions(self.sources, data_set, model, self.preset, self.seed)
        if part == data_set:
            return ask_reading(model, arms, part, questions, self.out / "held_out")
        return ask_questions(model, arms, questions)

    def report(self) -> dict[str, Any]:
        """All figures and the loss curves, for the sets that all models have been asked."""
        whole = [
            part
            for part in MEASURES
            if all((self.out / f"{_file(part, name)}.json").is_file() for name in self.models())
        ]
        asked: dict[str, dict[str, Any]] = {part: {} for part in whole}
        for part in whole:
            for name in self.models():
                path = self.out / f"{_file(part, name)}.json"
                asked[part] |= json.loads(path.read_text(encoding="utf-8"))
        return {
            "corpus": self.prepare(),
            "pretraining": self.pretrain(),
            "fine-tuning": {
                name: read_log(self.out / "sft" / name) for name in FINE_TUNED if self._is_trained(name)
            },
            "selection": self.select(),
            "figures": summarise(asked),
        }


FINE_TUNED = ("vanilla", "indicator", "oracle")


def _file(part: str, model: str) -> str:
    return f"{part.replace(' ', '-')}-{model}"


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)
