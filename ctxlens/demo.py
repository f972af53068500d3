"""The whole argument on the embedded model, stage by stage: loss, role bias, cause, source, cure.

Every stage writes its results into the run folder; finished stages are not run again, so an interrupted demo
resumes where it stopped. Figures and verdicts are made from the files alone.

A stage is a `Stage` in a table, and `run_stages` runs a table. Loss, role bias and cause are measured as in
an audit (`auditing.asking`), with texts of the embedded model's world.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ctxlens.auditing.asking import Asker, name_view
from ctxlens.chat.condition import Condition, parse_conditions
from ctxlens.chat.data import Conversation
from ctxlens.chat.roles import DEFAULT_INDICATOR
from ctxlens.evals.closed_book import run_closed_book
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.prompts import Cell
from ctxlens.evals.needle.run import Setting
from ctxlens.heads import (
    describe_sweep,
    draw_random_heads,
    find_retrieval_heads,
    needle_layer,
    sweep_settings,
)
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
from ctxlens.runs import Progress, Run, Stage, StageProgress, run_stages
from ctxlens.scoring import score_conversations
from ctxlens.scoring.selection import DEFAULT_RULE, check_threshold, choose_layer, select_turns
from ctxlens.sft import train

NOTE = (
    "This model was built to show the effect: its fine-tuning data answer from memory more often than from "
    "the document. These results show that the argument is consistent and that the tools work; they tell you "
    "nothing about other models."
)

CONDITIONS = parse_conditions("plain+prefix,template+prefix")
TUNED = ("base", "vanilla")
"""The models before and after the fine-tuning without indicator."""


@dataclass(frozen=True)
class Budget:
    """How much each stage of the demo does.

    Attributes:
        lengths: context lengths of the needle grids, in tokens.
        depths: needle depths, in percent.
        cases: contexts for each length, depth and needle.
        sweep_lengths, sweep_depths, sweep_cases: the same for the steering sweep.
        alphas: steering strengths besides 1.
        draws: number of random sets of heads.
        conversations: number of conversations in the fine-tuning data.
        steps: optimizer steps of each fine-tuning.
        questions: number of closed-book questions.
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

# What the stages of the demo share, and the stages.


@dataclass
class Bench:
    """What the stages of one demo share.

    Attributes:
        run: the run folder.
        budget: how much each stage does.
        seed: seed of the data, the fine-tuning and the random heads.
        threshold: β of the selection.
        device: where the models run.
    """

    run: Run
    budget: Budget
    seed: int
    threshold: float | str
    device: str

    def __post_init__(self) -> None:
        self._models: dict[str, Model] = {}

    def model(self, name: str) -> Model:
        """The base model, or one that this demo has fine-tuned; each is loaded once."""
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
            conditions=CONDITIONS,
            cases_per_cell=b.cases,
            max_new_tokens=recipe.ANSWER_TOKENS,
            seed=self.seed,
        )

    def sweep_config(self) -> NeedleConfig:
        """The cells of the steering sweep, with texts that differ from the grid's."""
        b = self.budget
        return NeedleConfig(
            lengths=b.sweep_lengths,
            depths=b.sweep_depths,
            needles=("known", "unknown"),
            conditions=CONDITIONS[1:],
            cases_per_cell=b.sweep_cases,
            max_new_tokens=recipe.ANSWER_TOKENS,
            seed=self.seed + 1000,
        )

    def cells(self, config: NeedleConfig) -> list[Cell]:
        """The texts of a grid, built with the base model's tokenizer."""
        return build_cells(self.model("base"), config, load_haystack("organism", seed=config.seed))

    def asker(self, name: str) -> Asker:
        """One of the models, as it is measured."""
        return Asker(model=self.model(name), label=name, run=self.run)

    def fine_tune(self, name: str, tell: Progress, **options: Any) -> None:
        """Fine-tune the base model through TRL, with the organism's recipe."""
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


def stage_vanilla(bench: Bench, tell: Progress) -> None:
    """Fine-tune without the indicator: the seed model."""
    bench.fine_tune("vanilla", tell)


def stage_loss(bench: Bench, tell: Progress) -> None:
    """Ask the base and the vanilla model for needles, with and without template."""
    config = bench.grid_config()
    cells = bench.cells(config)
    for number, name in enumerate(TUNED):
        ask_needles(bench.asker(name), cells, config, _share(tell, number, len(TUNED)))


def ask_needles(
    asker: Asker,
    cells: Sequence[Cell],
    config: NeedleConfig,
    tell: Progress,
    *,
    indicator: Sequence[bool] = (False,),
) -> None:
    """Ask one model the cells under every condition, with and without the indicator if wanted."""
    settings = [Setting(asker.label, indicator=marked) for marked in indicator]
    asker.ask(cells, config, settings, f"stages/needle-{asker.label}.parquet", tell)


def stage_bias(bench: Bench, tell: Progress) -> None:
    """Read the attention by role where the answer begins, with and without template."""
    config = bench.grid_config()
    cells = [cell for cell in bench.cells(config) if cell.needle.name == "known"]
    for number, name in enumerate(TUNED):
        bench.asker(name).read(cells, config, _share(tell, number, len(TUNED)))
    bench.run.save("tokens.safetensors", view_tokens(bench.model("vanilla"), cells[0]))


def _share(tell: Progress, number: int, parts: int) -> Progress:
    """The progress of one of several equally large parts, as progress of the whole."""
    return lambda done, total: tell(done + number * total, parts * total)


def view_tokens(model: Model, cell: Cell) -> TokenView:
    """The vanilla model's attention while it says the true answer of one cell, with the chat template."""
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
        {"model": "vanilla", "condition": Condition().name, "answer": fact.sentence},
    )


def stage_cause(bench: Bench, tell: Progress) -> None:
    """Steer all heads, the retrieval heads and random heads to the user's tokens."""
    config, asker = bench.sweep_config(), bench.asker("vanilla")
    plain = RoleAllocation.load(bench.run.path("allocation-vanilla-plain.safetensors"))
    heads = find_retrieval_heads(plain)
    drawn = draw_random_heads(heads, asker.model.n_heads, n_draws=bench.budget.draws, seed=bench.seed)
    sets = [("all", 0, "all"), ("retrieval", 0, heads)]
    sets += [("random", draw, chosen) for draw, chosen in enumerate(drawn)]
    settings = sweep_settings(asker.model, sets, bench.budget.alphas, label="vanilla")
    meta = describe_sweep(config, sets)
    asker.ask(bench.cells(config), config, settings, "steering.parquet", tell, meta=meta)


def stage_source(bench: Bench, tell: Progress) -> None:
    """Score the fine-tuning data with the vanilla model, and select turns."""
    model, config = bench.model("vanilla"), bench.sweep_config()
    cells = [cell for cell in bench.cells(config) if cell.needle.name == "unknown"]
    probe = needle_layer(model, cells, config)
    bench.run.write_json("layer.json", probe.table.to_dict(orient="records"))
    layer = choose_layer(model.n_layers, rule="needle", needle_layer=probe.best)
    scores = score_conversations(model, bench.conversations, kinds=bench.kinds, out=bench.run, progress=tell)
    bench.run.save("selection.parquet", select_turns(scores, beta=bench.threshold, layer=layer))


def stage_indicator(bench: Bench, tell: Progress) -> None:
    """Fine-tune with the indicator on the selected turns."""
    selection = Selection.load(bench.run.path("selection.parquet"))
    bench.fine_tune("indicator", tell, selection=selection, indicator=DEFAULT_INDICATOR)


def stage_cure(bench: Bench, tell: Progress) -> None:
    """Ask the cured model for needles, with and without the indicator."""
    config = bench.grid_config()
    cells = bench.cells(config)
    ask_needles(bench.asker("indicator"), cells, config, tell, indicator=(True, False))


def stage_ability(bench: Bench, tell: Progress) -> None:
    """Ask closed-book questions: what the cure and steering cost."""
    facts = load_world().closed_book(bench.budget.questions, seed=bench.seed)
    asked = [
        ("base", False, 1.0),
        ("vanilla", False, 1.0),
        ("indicator", False, 1.0),
        ("indicator", True, 1.0),
    ]
    asked += [("vanilla", False, alpha) for alpha in bench.budget.alphas]
    tables = []
    for number, (name, indicator, alpha) in enumerate(asked):
        tables.append(ask_closed_book(bench.model(name), name, facts, indicator, alpha))
        tell(number + 1, len(asked))
    bench.run.save("ability.parquet", Ability.concat(tables))


def ask_closed_book(
    model: Model, label: str, facts: Sequence[Fact], indicator: bool, alpha: float
) -> Ability:
    """Closed-book answers of one model, with the indicator or with all heads steered if wanted."""
    with model.steer(alpha):
        table = run_closed_book(
            model, facts, indicator=indicator, template=label != "base", label=label,
            max_new_tokens=recipe.ANSWER_TOKENS,
        )  # fmt: skip
    return Ability(table.frame.assign(alpha=alpha), table.meta)


def stage_report(bench: Bench, tell: Progress) -> None:
    """Judge the claims and write the page, from the files alone."""
    write_verdicts(bench.run)
    write_report([bench.run.folder], bench.run.path("report.html"), title="ctxlens: the whole argument")


DEMO_STAGES: tuple[Stage[Bench], ...] = (
    Stage("vanilla", "fine-tuning without indicator", stage_vanilla),
    Stage("loss", "needles, base and vanilla", stage_loss),
    Stage("bias", "attention by role", stage_bias),
    Stage("cause", "steering sweep", stage_cause),
    Stage("source", "scoring the data", stage_source),
    Stage("indicator", "fine-tuning with indicator", stage_indicator),
    Stage("cure", "needles with indicator", stage_cure),
    Stage("ability", "closed-book questions", stage_ability),
    Stage("report", "verdicts and report", stage_report, always=True),
)
"""The stages of the demo, in order."""

STAGES: Mapping[str, str] = {stage.name: stage.title for stage in DEMO_STAGES}
"""Their names, each with what the stage does."""


def run_demo(
    out: str | Path = "ctxlens-demo",
    *,
    smoke: bool = False,
    seed: int = 0,
    threshold: float | str = DEFAULT_RULE,
    device: str = "auto",
    overwrite: bool = False,
    progress: StageProgress | None = None,
) -> Path:
    """Run the whole argument on the embedded model and write the report.

    Args:
        out: run folder; an interrupted demo resumes there.
        smoke: run only a few steps of every stage, to check an installation; the verdicts mean nothing then.
        seed: seed of the data, the fine-tuning and the random heads.
        threshold: β of the selection: a number (the paper: 0.6), or `mixture`, `valley` or `otsu` to estimate
            it from the scores.
        device: `auto`, `cpu` or `cuda`.
        overwrite: start again if the folder holds another run, which is renamed.
        progress: called as progress(stage, done, total).

    Returns:
        The path of the report.

    Raises:
        InputError: the threshold is outside 0 to 1, the device does not exist, or the folder cannot be
            written.
        RunExistsError: the folder holds another run.
    """
    check_threshold(threshold)
    budget = SMOKE if smoke else FULL
    config = {"smoke": smoke, "seed": seed, "threshold": threshold, "budget": asdict(budget)}
    run = Run.open(out, study="demo", config=config, overwrite=overwrite)
    run_stages(run, DEMO_STAGES, Bench(run, budget, seed, threshold, device), progress)
    return run.path("report.html")


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
        for kind in map(name_view, CONDITIONS)
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
