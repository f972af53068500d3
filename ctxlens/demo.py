"""The whole argument on the embedded model, stage by stage: loss, role bias, cause, source, cure.

Every stage writes its results into the run folder and is left out when they are there already, so a
demo that was stopped goes on where it was. Figures and verdicts are made from the files alone.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ctxlens.chat.condition import parse_conditions
from ctxlens.chat.data import Conversation
from ctxlens.chat.roles import DEFAULT_INDICATOR
from ctxlens.evals.closed_book import run_closed_book
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.prompts import Cell, render_cell
from ctxlens.evals.needle.run import Setting, run_settings
from ctxlens.heads import find_retrieval_heads, needle_layer, steering_sweep
from ctxlens.models import Model, load_model
from ctxlens.organism import recipe
from ctxlens.organism.world import Fact, load_world
from ctxlens.report import write_report
from ctxlens.results import Ability, NeedleGrid, RoleAllocation, Scores, Selection, TokenView, Verdicts
from ctxlens.results.claims import (
    claim_cause,
    claim_cure,
    claim_loss,
    claim_role_bias,
    claim_source,
    conflicting,
)
from ctxlens.runs import Run
from ctxlens.scoring import score_conversations
from ctxlens.scoring.selection import DEFAULT_RULE, check_threshold, choose_layer, select_turns
from ctxlens.sft import train

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total)."""

NOTE = (
    "This model was built to show the effect: its fine-tuning data answer from memory more often than from "
    "the document. What is measured here says that the argument holds together and that the tools work, "
    "nothing about any other model."
)


@dataclass(frozen=True)
class Budget:
    """How much each stage does.

    Attributes:
        lengths: context lengths of the needle grids, in tokens.
        depths: needle depths, in percent.
        cases: contexts a length, depth and needle.
        sweep_lengths, sweep_depths, sweep_cases: the same for the steering sweep.
        alphas: steering strengths besides 1.
        draws: random head sets.
        conversations: conversations of the fine-tuning data.
        steps: optimizer steps of each fine-tuning.
        questions: closed-book questions.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    cases: int
    sweep_lengths: tuple[int, ...]
    sweep_depths: tuple[float, ...]
    sweep_cases: int
    alphas: tuple[float, ...]
    draws: int
    conversations: int
    steps: int
    questions: int


FULL = Budget(
    lengths=(64, 160, 260, 360, 480),
    depths=(0.0, 25.0, 50.0, 75.0, 100.0),
    cases=2,
    sweep_lengths=(100, 180, 260, 340),
    sweep_depths=(20.0, 80.0),
    sweep_cases=8,
    alphas=(0.7, 0.5, 0.3, 0.2, 0.1, 0.03),
    draws=3,
    conversations=recipe.CONVERSATIONS,
    steps=recipe.STEPS,
    questions=100,
)
SMOKE = Budget((64, 160), (0.0, 100.0), 1, (96,), (0.0, 100.0), 1, (0.3, 0.03), 1, 96, 4, 12)

STAGES: Mapping[str, str] = {
    "vanilla": "fine-tuning without indicator",
    "loss": "needles, base and vanilla",
    "bias": "attention by role",
    "cause": "steering sweep",
    "source": "scoring the data",
    "indicator": "fine-tuning with indicator",
    "cure": "needles with indicator",
    "ability": "closed-book questions",
    "report": "verdicts and report",
}
"""The stages in order, each with what it does."""


def run_demo(
    out: str | Path = "ctxlens-demo",
    *,
    smoke: bool = False,
    seed: int = 0,
    threshold: float | str = DEFAULT_RULE,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Run the whole argument on the embedded model and write the report.

    Args:
        out: run folder; a demo that was stopped there goes on.
        smoke: every stage with a few steps only, to check an installation; its verdicts mean nothing.
        seed: seed of data, fine-tuning and random heads.
        threshold: β of the selection: `mixture`, `valley`, `otsu` take it from the scores; the paper's 0.6.
        device: `auto`, `cpu` or `cuda`.
        overwrite: start anew in a folder that holds another run.
        progress: called as progress(stage, done, total).

    Returns:
        The path of the report.

    Raises:
        InputError: a threshold outside 0 to 1; a device that is not there; a folder that cannot be written.
        RunExistsError: the folder holds another run.
    """
    config = {
        "smoke": smoke,
        "seed": seed,
        "threshold": threshold,
        "budget": asdict(SMOKE if smoke else FULL),
    }
    check_threshold(threshold)
    run = Run.open(out, study="demo", config=json.loads(json.dumps(config)), overwrite=overwrite)
    return Demo(run, SMOKE if smoke else FULL, seed, threshold, device, progress).run_stages()


class Demo:
    """One demo in its run folder: a method a stage."""

    def __init__(
        self,
        run: Run,
        budget: Budget,
        seed: int,
        threshold: float | str,
        device: str,
        progress: Progress | None,
    ) -> None:
        self.run, self.budget, self.seed = run, budget, seed
        self.threshold, self.device, self.progress = threshold, device, progress
        self._models: dict[str, Model] = {}
        self._finish: dict[str, tuple[int, int]] = {}

    def run_stages(self) -> Path:
        """Run the stages that are not done, in order; returns the path of the report."""
        timings = self.run.read_json("timings.json") if self.run.has("timings.json") else {}
        for stage in STAGES:
            self._tell(stage)(0, 1)
            if stage not in timings or stage == "report":
                wall, cpu = time.perf_counter(), time.process_time()
                getattr(self, f"stage_{stage}")(self._tell(stage))
                timings[stage] = {
                    "what": STAGES[stage],
                    "wall_seconds": round(time.perf_counter() - wall, 1),
                    "cpu_seconds": round(time.process_time() - cpu, 1),
                }
                self.run.write_json("timings.json", timings)
            self._tell(stage)(*self._finish.get(stage, (1, 1)))
        return self.run.path("report.html")

    def _tell(self, stage: str) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            self._finish[stage] = (total, total)
            if self.progress:
                self.progress(stage, done, total)

        return tell

    # What the stages share.

    def model(self, name: str) -> Model:
        """The base model, or one fine-tuned by this demo; loaded once."""
        if name not in self._models:
            place = "organism" if name == "base" else self.run.path(name)
            self._models[name] = load_model(place, backend="native", device=self.device, indicator=None)
        return self._models[name]

    @cached_property
    def conversations(self) -> list[Conversation]:
        """The fine-tuning data, with the true kind of every assistant turn as label."""
        made = load_world().conversations(self.budget.conversations, seed=self.seed, **recipe.SHARES)
        return [
            Conversation(id=c.id, messages=tuple(c.messages), source="organism", labels={"kinds": c.kinds})
            for c in made
        ]

    @cached_property
    def kinds(self) -> dict[tuple[str, int], str]:
        """The true kind of every assistant turn (the answer's source: document, memory or closed book)."""
        return {
            (c.id, 2 * number + 1): kind
            for c in self.conversations
            for number, kind in enumerate(c.labels["kinds"])
        }

    def grid_config(self) -> NeedleConfig:
        """The needle grid: known towns, where memory and context disagree, and unknown ones."""
        b = self.budget
        return NeedleConfig(
            lengths=b.lengths,
            depths=b.depths,
            needles=("known", "unknown"),
            conditions=parse_conditions("plain+prefix,template+prefix"),
            cases_per_cell=b.cases,
            max_new_tokens=recipe.ANSWER_TOKENS,
            seed=self.seed,
        )

    def sweep_config(self) -> NeedleConfig:
        """The cells of the steering sweep, other texts than the grid's."""
        b = self.budget
        return NeedleConfig(
            lengths=b.sweep_lengths,
            depths=b.sweep_depths,
            needles=("known", "unknown"),
            conditions=parse_conditions("template+prefix"),
            cases_per_cell=b.sweep_cases,
            max_new_tokens=recipe.ANSWER_TOKENS,
            seed=self.seed + 1000,
        )

    def cells(self, config: NeedleConfig) -> list[Cell]:
        """The texts of a grid, built with the base model's tokenizer."""
        return build_cells(self.model("base"), config, load_haystack("organism", seed=config.seed))

    def ask_needles(
        self, model: str, settings: Sequence[Setting], tell: Callable[[int, int], None]
    ) -> NeedleGrid:
        """The needle grid of one model."""
        config = self.grid_config()
        return run_settings(
            self.model(model),
            self.cells(config),
            config,
            settings,
            out=self.run,
            name=f"stages/needle-{model}.parquet",
            progress=tell,
        )

    def fine_tune(self, name: str, tell: Callable[[int, int], None], **options: Any) -> None:
        """One fine-tuning of the base model through TRL, by the organism's recipe."""
        world, b = load_world(), self.budget
        use_cpu = self.model("base").device.type == "cpu"
        n_raw = round(b.conversations * recipe.REPLAY_SHARE / (1 - recipe.REPLAY_SHARE))
        train(
            self.conversations,
            out=self.run.path(name),
            model="organism",
            replay_texts=world.raw_documents(n_raw, seed=self.seed, **recipe.REPLAY),
            args={**recipe.SFT_ARGUMENTS, "max_steps": b.steps, "seed": self.seed, "use_cpu": use_cpu},
            progress=tell,
            **options,
        )
        gc.collect()

    # The stages.

    def stage_vanilla(self, tell: Callable[[int, int], None]) -> None:
        """Fine-tune without indicator: the seed model."""
        self.fine_tune("vanilla", tell)

    def stage_loss(self, tell: Callable[[int, int], None]) -> None:
        """Needles with and without template, before and after fine-tuning."""
        for number, name in enumerate(("base", "vanilla")):
            self.ask_needles(name, [Setting(name)], lambda d, t, n=number: tell(d + n * t, 2 * t))

    def stage_bias(self, tell: Callable[[int, int], None]) -> None:
        """Attention by role where the answer begins, with and without template."""
        config = self.grid_config()
        cells = [cell for cell in self.cells(config) if cell.needle.name == "known"]
        total, done = 4 * len(cells), 0
        for name in ("base", "vanilla"):
            for condition in config.conditions:
                parts = []
                for cell in cells:
                    chat = render_cell(self.model(name), cell, config, condition)
                    part = self.model(name).read_roles(chat)
                    parts.append(replace(part, query_labels=(f"cell {cell.number}",)))
                    tell(done := done + 1, total)
                kind = replace(condition, prefix=False).name
                allocation = RoleAllocation.concat(parts)
                meta = {**allocation.meta, "model": name, "condition": kind}
                self.run.save(
                    f"allocation-{name}-{kind}.safetensors",
                    replace(allocation, meta=meta),
                )
        self.run.save("tokens.safetensors", self.token_view(cells[0]))

    def token_view(self, cell: Cell) -> TokenView:
        """The vanilla model's attention while it says the true answer of one cell, under the template."""
        model = self.model("vanilla")
        fact = cell.needle
        question = {"role": "user", "content": f"{cell.context.text}\n{fact.question}"}
        chat = model.render([question, {"role": "assistant", "content": fact.sentence}])
        said = chat.response_positions()
        value = chat.spans[said, 0] >= chat.spans[said[0], 0] + len(fact.prefix)
        positions = tuple(int(position) - 1 for position in said[value])
        return TokenView(
            model.read_patterns(chat, queries=positions),
            tuple(chat.token_strings()),
            chat.role,
            tuple(range(model.n_layers)),
            positions,
            {"model": "vanilla", "condition": "template", "answer": fact.sentence},
        )

    def stage_cause(self, tell: Callable[[int, int], None]) -> None:
        """Steer all heads, the retrieval heads and random heads to the user's tokens."""
        config = self.sweep_config()
        plain = RoleAllocation.load(self.run.path("allocation-vanilla-plain.safetensors"))
        steering_sweep(
            self.model("vanilla"),
            self.cells(config),
            config,
            alphas=self.budget.alphas,
            retrieval=find_retrieval_heads(plain),
            n_draws=self.budget.draws,
            seed=self.seed,
            label="vanilla",
            out=self.run,
            progress=tell,
        )

    def stage_source(self, tell: Callable[[int, int], None]) -> None:
        """Score the fine-tuning data with the vanilla model, and select."""
        model, config = self.model("vanilla"), self.sweep_config()
        cells = [cell for cell in self.cells(config) if cell.needle.name == "unknown"]
        probe = needle_layer(model, cells, config)
        self.run.write_json("layer.json", probe.table.to_dict(orient="records"))
        layer = choose_layer(model.n_layers, rule="needle", needle_layer=probe.best)
        scores = score_conversations(model, self.conversations, kinds=self.kinds, out=self.run, progress=tell)
        self.run.save("selection.parquet", select_turns(scores, beta=self.threshold, layer=layer))

    def stage_indicator(self, tell: Callable[[int, int], None]) -> None:
        """Fine-tune with the indicator on the selected turns."""
        selection = Selection.load(self.run.path("selection.parquet"))
        self.fine_tune("indicator", tell, selection=selection, indicator=DEFAULT_INDICATOR)

    def stage_cure(self, tell: Callable[[int, int], None]) -> None:
        """Needles for the cured model, asked with and without the indicator."""
        settings = [Setting("indicator", indicator=True), Setting("indicator")]
        self.ask_needles("indicator", settings, tell)

    def stage_ability(self, tell: Callable[[int, int], None]) -> None:
        """Closed-book questions: what the cure and steering cost."""
        facts = load_world().closed_book(self.budget.questions, seed=self.seed)
        asked = [
            ("base", False, 1.0),
            ("vanilla", False, 1.0),
            ("indicator", False, 1.0),
            ("indicator", True, 1.0),
        ]
        asked += [("vanilla", False, alpha) for alpha in self.budget.alphas]
        tables = []
        for number, (name, indicator, alpha) in enumerate(asked):
            tables.append(self.ask_closed_book(name, facts, indicator, alpha))
            tell(number + 1, len(asked))
        self.run.save("ability.parquet", Ability.concat(tables))

    def ask_closed_book(self, name: str, facts: Sequence[Fact], indicator: bool, alpha: float) -> Ability:
        """Closed-book answers of one model, perhaps with indicator or steered (all heads)."""
        model = self.model(name)
        with model.steer(alpha):
            table = run_closed_book(
                model,
                facts,
                indicator=indicator,
                template=name != "base",
                label=name,
                max_new_tokens=recipe.ANSWER_TOKENS,
            )
        return Ability(table.frame.assign(alpha=alpha), table.meta)

    def stage_report(self, tell: Callable[[int, int], None]) -> None:
        """Judge the claims and write the page, from the files alone."""
        write_verdicts(self.run)
        write_report([self.run.folder], self.run.path("report.html"), title="ctxlens: the whole argument")


def write_verdicts(run: Run) -> Verdicts:
    """Judge the five claims from a demo's files, and write `needle.parquet` and `verdicts.json`."""
    grid = NeedleGrid.concat(
        [
            NeedleGrid.load(run.path(f"stages/needle-{name}.parquet"))
            for name in ("base", "vanilla", "indicator")
        ]
    )
    sweep = NeedleGrid.load(run.path("steering.parquet"))
    ability = Ability.load(run.path("ability.parquet"))
    allocations = [
        RoleAllocation.load(run.path(f"allocation-{name}-{kind}.safetensors"))
        for name in ("vanilla", "base")
        for kind in ("plain", "template")
    ]
    read = [int(label.removeprefix("cell ")) for label in allocations[0].query_labels]
    steered = {alpha: ability.where(model="vanilla", alpha=alpha) for alpha in set(ability.frame["alpha"])}
    verdicts = Verdicts(
        (
            claim_loss(grid),
            claim_role_bias(*allocations, contexts=grid.contexts(read)),
            claim_cause(conflicting(sweep), ability=steered),
            claim_source(
                Scores.load(run.path("scores.parquet")), Selection.load(run.path("selection.parquet"))
            ),
            claim_cure(grid, ability.where(alpha=1.0)),
        ),
        {"note": NOTE, **run.manifest["config"]},
    )
    run.save("needle.parquet", grid)
    run.save("verdicts.json", verdicts)
    return verdicts
