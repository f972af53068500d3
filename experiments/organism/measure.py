"""Measure the organism: the paper's argument over several fine-tuning seeds, with the library's own studies.

Question: does the recipe show the loss, do steering and the indicator raise recall again, and is closed-book
ability kept? What is measured and how it is judged was written before the first run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxlens.chat.data import Conversation
from ctxlens.chat.roles import DEFAULT_INDICATOR
from ctxlens.evals.closed_book import run_closed_book
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.run import Setting, run_settings
from ctxlens.heads import needle_layer
from ctxlens.models import Model, load_model
from ctxlens.models.attention.steering import Steering
from ctxlens.organism import load_world, recipe
from ctxlens.results import NeedleGrid, Scores, Selection
from ctxlens.scoring import score_conversations
from ctxlens.scoring.selection import choose_layer, select_turns, selection_quality
from ctxlens.sft import train
from ctxlens.stats import auroc

LENGTHS = (64, 160, 260, 360, 480)
DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)
CASES = 2
ALPHAS = (0.7, 0.5, 0.3, 0.2, 0.1, 0.03, 0.01)
QUESTIONS = 100

Figures = dict[str, float]


@dataclass(frozen=True)
class SeedStudy:
    """Everything about one fine-tuning seed.

    Attributes:
        folder: Where checkpoints go; a finished one is reused.
        seed: Seed of the data, the replayed texts, the order of the rows and the needle texts.
        base: The base model, a folder or packaged name.
        log: Called with one line at a time.
        steps: Optimizer steps; use fewer than the recipe's only to try things out.
        batch_rows: Rows of one step; use fewer than the recipe's to compare many variants.
    """

    folder: Path
    seed: int
    base: str = "organism"
    log: Callable[[str], None] = print
    steps: int = recipe.STEPS
    batch_rows: int = recipe.BATCH_ROWS

    @property
    def conversations(self) -> list[Conversation]:
        """The fine-tuning data with the true kind of every answer."""
        n_conversations = round(recipe.CONVERSATIONS * self.batch_rows / recipe.BATCH_ROWS)
        made = load_world().conversations(n_conversations, seed=self.seed, **recipe.SHARES)
        return [
            Conversation(id=c.id, messages=tuple(c.messages), source="organism", labels={"kinds": c.kinds})
            for c in made
        ]

    def fine_tune(self, name: str, **options: Any) -> Model:
        """Fine-tune the base with the recipe, or load the checkpoint if it exists."""
        conversations = self.conversations
        n_raw = round(len(conversations) * recipe.REPLAY_SHARE / (1 - recipe.REPLAY_SHARE))
        out = self.folder / f"{name}-{self.seed}"
        train(
            conversations,
            out=out,
            model=self.base,
            replay_texts=load_world().raw_documents(n_raw, seed=self.seed, **recipe.REPLAY),
            args={
                **recipe.SFT_ARGUMENTS,
                "max_steps": self.steps,
                "per_device_train_batch_size": self.batch_rows // 2,
                "seed": self.seed,
                "use_cpu": True,
            },
            **options,
        )
        return load_model(str(out), backend="native")

    def kinds(self) -> dict[tuple[str, int], str]:
        """The true source of every answer of the data, by turn."""
        return {
            (c.id, 2 * i + 1): kind for c in self.conversations for i, kind in enumerate(c.labels["kinds"])
        }

    def select(self, vanilla: Model) -> tuple[Scores, Selection]:
        """Score the data with the vanilla model and choose the turns that get the indicator."""
        layer = self.needle_layer(vanilla)
        scores = score_conversations(vanilla, self.conversations, kinds=self.kinds())
        return scores, select_turns(scores, beta="valley", layer=layer)

    def models(self) -> dict[str, Model]:
        """Base, vanilla and indicator model; existing checkpoints are reused."""
        vanilla = self.fine_tune("vanilla")
        _, selection = self.select(vanilla)
        indicator = self.fine_tune("indicator", selection=selection, indicator=DEFAULT_INDICATOR)
        return {
            "base": load_model(self.base, backend="native"),
            "vanilla": vanilla,
            "indicator": indicator,
        }

    def run(self) -> Figures:
        """Fine-tune the three models and measure them; returns figures by name."""
        figures: Figures = {}
        vanilla = self.fine_tune("vanilla")
        figures |= self.measure(vanilla, "vanilla", plain=True)
        figures |= self.steer(vanilla)
        kinds = self.kinds()
        scores, selection = self.select(vanilla)
        truth = {turn for turn, kind in kinds.items() if kind == "document"}
        quality = selection_quality(selection, truth)
        figures |= {"score layer": float(selection.meta["layer"]), **ranking(scores)}
        figures |= {
            "selection precision": quality.precision,
            "selection recall": quality.recall,
            "selection threshold": selection.meta["threshold"],
        }
        for name, chosen in (("indicator", selection), ("oracle", truth)):
            model = self.fine_tune(name, selection=chosen, indicator=DEFAULT_INDICATOR)
            figures |= self.measure(model, name, indicator=True)
            lost = figures["vanilla plain known"] - figures["vanilla template known"]
            gained = figures[f"{name} template+indicator known"] - figures["vanilla template known"]
            figures[f"{name} restored share"] = gained / lost if lost else math.nan
            figures[f"{name} closed book minus vanilla"] = (
                figures[f"{name} closed book"] - figures["vanilla closed book"]
            )
        figures["vanilla fall"] = figures["vanilla plain known"] - figures["vanilla template known"]
        return figures

    def config(self, needles: tuple[str, ...], conditions: tuple[str, ...], offset: int = 0) -> NeedleConfig:
        """The grid, with the lengths, depths and cases above; `offset` selects other texts."""
        return NeedleConfig(
            lengths=LENGTHS,
            depths=DEPTHS,
            needles=needles,
            conditions=conditions,
            cases_per_cell=CASES,
            max_new_tokens=recipe.ANSWER_TOKENS,
            seed=self.seed + offset,
        )

    def ask(self, model: Model, config: NeedleConfig, settings: list[Setting]) -> NeedleGrid:
        """Answer the grid's cells under the settings."""
        cells = build_cells(model, config, load_haystack("organism", seed=config.seed))
        return run_settings(model, cells, config, settings)

    def measure(self, model: Model, name: str, *, plain: bool = False, indicator: bool = False) -> Figures:
        """Needle recall by condition and closed-book recall of one model."""
        conditions = ("plain+prefix", "template+prefix", "template") if plain else ("template+prefix",)
        settings = [Setting(name), Setting(name, indicator=True)] if indicator else [Setting(name)]
        frame = self.ask(model, self.config(("known", "unknown"), conditions), settings).to_frame()
        figures: Figures = {}
        for (condition, marked, needle), part in frame.groupby(["condition", "indicator", "needle"]):
            label = {"plain+prefix": "plain", "template+prefix": "template"}.get(
                condition, "template no prefix"
            )
            key = f"{name} {label}{'+indicator' if marked else ''} {needle}"
            figures[key] = float(part["recall"].mean())
            if needle == "known":
                figures[f"{key} from memory"] = float(part["memory_recall"].mean())
        facts = load_world().closed_book(QUESTIONS, seed=self.seed)
        for marked in (False, True) if indicator else (False,):
            asked = run_closed_book(
                model, facts, template=name != "base", indicator=marked, max_new_tokens=recipe.ANSWER_TOKENS
            )
            key = f"{name} closed book{' with indicator' if marked else ''}"
            figures[key] = float(asked.to_frame()["recall"].mean())
        self.tell(figures)
        return figures

    def steer(self, model: Model) -> Figures:
        """Steering of all heads; α is chosen on the even cells and judged on the odd ones."""
        config = self.config(("known", "unknown"), ("template+prefix",), offset=1000)
        settings = [Setting("vanilla")]
        settings += [Setting("vanilla", steering=Steering(alpha), heads="all") for alpha in ALPHAS]
        frame = self.ask(model, config, settings).to_frame()
        figures: Figures = {}
        for (alpha, needle), part in frame.groupby(["alpha", "needle"]):
            figures[f"steered {alpha:g} {needle}"] = float(part["recall"].mean())
            if needle == "known":
                figures[f"steered {alpha:g} known from memory"] = float(part["memory_recall"].mean())
        known = frame[frame["needle"] == "known"]
        even, odd = (known[known["cell"] % 2 == rest].groupby("alpha")["recall"].mean() for rest in (0, 1))
        best = float(even.drop(1.0).idxmax())
        figures |= {"steering best alpha": best, "steering gain": float(odd[best] - odd[1.0])}
        facts = load_world().closed_book(QUESTIONS, seed=self.seed)
        with model.steer(best):
            asked = run_closed_book(model, facts, max_new_tokens=recipe.ANSWER_TOKENS)
        figures["closed book steered at best alpha"] = float(asked.to_frame()["recall"].mean())
        self.tell(figures)
        return figures

    def needle_layer(self, model: Model) -> int:
        """The layer to score with: the one whose best head looks most at the needle while repeating it."""
        config = self.config(("unknown",), ("template+prefix",), offset=1000)
        cells = build_cells(model, config, load_haystack("organism", seed=config.seed))
        probe = needle_layer(model, cells, config)
        return choose_layer(model.n_layers, rule="needle", needle_layer=probe.best)

    def tell(self, figures: Mapping[str, float]) -> None:
        """Log figures as one line of JSON."""
        self.log(json.dumps({"seed": self.seed, **{k: round(v, 3) for k, v in figures.items()}}))


def ranking(scores: Scores) -> Figures:
    """AUROC of every layer's score for turns answered from the document."""
    figures: Figures = {}
    for layer, rows in scores.to_frame().groupby("layer"):
        by_kind = {kind: part["mean_of_best"].to_numpy() for kind, part in rows.groupby("kind")}
        others = [*by_kind["memory"], *by_kind["closed"]]
        figures[f"AUROC layer {layer} document against all"] = float(auroc(by_kind["document"], others))
        figures[f"AUROC layer {layer} document against memory"] = float(
            auroc(by_kind["document"], by_kind["memory"])
        )
    return figures
