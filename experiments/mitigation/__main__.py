"""Which way of training on selected turns restores the use of the context, and what does each cost?

Question: recall with the template and closed-book ability of the organism, fine-tuned in every way that a
          recipe offers (indicator on turns selected by several thresholds, on random turns, on the true ones;
          dropout; a second indicator for the other turns; upsampling without an indicator; replay),
          asked with and without the indicator, compared with plain fine-tuning of the same seed on the same
          cells.
Run:      python -m experiments.mitigation
Expected: true labels restore most, a good selection nearly as much, random turns nothing; without the
          indicator all are worse than vanilla, dropout least so. Written before the first run.
Cost:     about 25 minutes per seed on one core; the models are trained on half of the organism's data, in the
          same number of steps with half as many rows. `--seeds 0 2` and `--seeds 1 3` may run in parallel;
          `--variants` chooses variants by name, separated by `;`. An interrupted run resumes, and the last
          call, with all seeds, combines the figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctxlens.chat.condition import Condition, parse_conditions
from ctxlens.chat.roles import DEFAULT_INDICATOR
from ctxlens.evals.closed_book import run_closed_book
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.run import Setting, run_settings
from ctxlens.models import load_model
from ctxlens.organism import load_world, recipe
from ctxlens.results import Ability, NeedleGrid, Scores
from ctxlens.runs import Run
from ctxlens.scoring import score_conversations
from ctxlens.scoring.selection import select_turns, selection_quality
from ctxlens.stats import bootstrap_mean, compare_pairs
from experiments.common import markdown, over_seeds, run_experiment, seed_study
from experiments.organism.measure import CASES, LENGTHS, QUESTIONS, SeedStudy

BATCH_ROWS = 12
DEPTHS = (0.0, 50.0, 100.0)
NEGATIVE = "[MEM]"
NEEDLES = ("known", "unknown")
PLAIN, TEMPLATE = parse_conditions("plain+prefix,template+prefix")
VANILLA = "vanilla | without"


@dataclass(frozen=True)
class Variant:
    """One way to fine-tune.

    Attributes:
        select: arguments of `select_turns`, `"truth"` for the true labels, or None for no selection.
        keys: keys of the recipe.
    """

    select: Mapping[str, Any] | str | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> tuple[str, ...]:
        """How the trained model is asked: without an indicator, with it, or with the negative one."""
        marked = ("with",) if self.keys.get("indicator") else ()
        return ("without", *marked, *(("negative",) if self.keys.get("negative_indicator") else ()))


def _marked(select: Mapping[str, Any] | str, **keys: Any) -> Variant:
    return Variant(select, {"indicator": DEFAULT_INDICATOR, **keys})


TOP = {"top_share": 0.1}
"""The share of ShareGPT that the paper's threshold 0.6 selects; for variants that do not test the rule."""

VARIANTS: dict[str, Variant] = {
    "vanilla": Variant(),
    "true labels": _marked("truth"),
    "top 10 %": _marked(TOP),
    "random turns": _marked(TOP, selection_control="random"),
    "dropout 0.3": _marked(TOP, indicator_dropout=0.3),
    "negative indicator": _marked(TOP, negative_indicator=NEGATIVE),
    "upsampled, no indicator": Variant(TOP, {"upsample_selected": 3}),
    "upsampled random turns": Variant(TOP, {"upsample_selected": 3, "selection_control": "random"}),
    "upsampled with indicator": _marked(TOP, upsample_selected=3),
    "mixture": _marked({"beta": "mixture"}),
    "valley": _marked({"beta": "valley"}),
    "no replay": Variant(None, {"replay_share": 0.0}),
    "replay 0.5": Variant(None, {"replay_share": 0.5}),
    "threshold 0.5": _marked({"beta": 0.5}),
    "threshold 0.6": _marked({"beta": 0.6}),
    "threshold 0.7": _marked({"beta": 0.7}),
    "threshold 0.8": _marked({"beta": 0.8}),
}


@dataclass(frozen=True)
class Outcome:
    """The results of one seed.

    Attributes:
        grid: the answers of all variants; `model` names the variant and how it was asked.
        ability: their closed-book answers, with the same names.
        selections: size and quality of each variant's selection.
    """

    grid: NeedleGrid
    ability: Ability
    selections: Mapping[str, Mapping[str, float]]


def answer(study: SeedStudy, run: Run, name: str, asked: str, smoke: bool) -> None:
    """Ask a trained variant needles and closed-book questions, in one way."""
    model = load_model(
        study.folder / f"{file_name(name)}-{study.seed}",
        backend="native",
        indicator=NEGATIVE if asked == "negative" else None,
    )
    config = NeedleConfig(
        lengths=(64,) if smoke else LENGTHS, depths=(0.0, 100.0) if smoke else DEPTHS, needles=NEEDLES,
        conditions=(TEMPLATE, PLAIN) if asked == "without" else (TEMPLATE,),
        cases_per_cell=CASES, max_new_tokens=recipe.ANSWER_TOKENS, seed=study.seed,
    )  # fmt: skip
    cells = build_cells(model, config, load_haystack("organism", seed=study.seed))
    marked, label = asked != "without", f"{name} | {asked}"
    needle, ability = files(name, asked)
    run_settings(model, cells, config, [Setting(label, indicator=marked)], out=run, name=needle)
    facts = load_world().closed_book(10 if smoke else QUESTIONS, seed=study.seed)
    table = run_closed_book(model, facts, indicator=marked, label=label, max_new_tokens=recipe.ANSWER_TOKENS)
    run.save(ability, table)


def score_data(study: SeedStudy, run: Run) -> tuple[Scores, int]:
    """The vanilla model's scores of the data, and the layer whose scores are used."""
    if not run.has("layer.json"):
        vanilla = study.fine_tune("vanilla")
        score_conversations(vanilla, study.conversations, kinds=study.kinds(), out=run)
        run.write_json("layer.json", study.needle_layer(vanilla))
    return Scores.load(run.path("scores.parquet")), run.read_json("layer.json")


def run_seed(args: argparse.Namespace, seed: int) -> Outcome:
    """Fine-tune and ask every variant of one seed; finished results are reused."""
    study = seed_study(args, seed, batch_rows=2 if args.smoke else BATCH_ROWS)
    run = Run.open(
        args.out / f"seed-{seed}",
        study="mitigation",
        config={"seed": seed, "batch_rows": BATCH_ROWS, "smoke": args.smoke},
    )
    truth = {turn for turn, kind in study.kinds().items() if kind == "document"}
    scores, layer = score_data(study, run)
    chosen = {name: choose(variant, scores, layer, truth) for name, variant in VARIANTS.items()}
    asked = [(name, asked) for name in chosen_variants(args) for asked in VARIANTS[name].asked]
    for name, how in asked:
        if not all(run.has(file) for file in files(name, how)):
            study.fine_tune(file_name(name), selection=chosen[name][0], **VARIANTS[name].keys)
            answer(study, run, name, how, args.smoke)
            print(f"seed {seed}: {name}, asked {how}", flush=True)
    return Outcome(
        NeedleGrid.concat([NeedleGrid.load(run.path(files(*one)[0])) for one in asked]),
        Ability.concat([Ability.load(run.path(files(*one)[1])) for one in asked]),
        {name: described for name, (_, described) in chosen.items()},
    )


def files(name: str, asked: str) -> tuple[str, str]:
    """The files of a variant's needle grid and closed-book table."""
    stem = f"{file_name(name)}-{asked}.parquet"
    return f"needle-{stem}", f"ability-{stem}"


def choose(
    variant: Variant, scores: Scores, layer: int, truth: set[tuple[str, int]]
) -> tuple[Any, dict[str, float]]:
    """The selection of a variant, and how good it is."""
    if variant.select is None:
        return None, {}
    if isinstance(variant.select, str):
        return truth, {"selected": len(truth), "precision": 1.0, "recall": 1.0}
    selection = select_turns(scores, layer=layer, **variant.select)
    quality = selection_quality(selection, truth)
    return selection, {
        "selected": quality.selected, "share": quality.selected / quality.turns,
        "threshold": selection.meta["threshold"], "precision": quality.precision, "recall": quality.recall,
    }  # fmt: skip


def chosen_variants(args: argparse.Namespace) -> list[str]:
    """The names of the variants to run."""
    return args.variants.split(";") if args.variants else list(VARIANTS)


def file_name(name: str) -> str:
    """A variant's name as part of a file name."""
    return name.replace(" %", "").replace(",", "").replace(" ", "-")


def study(args: argparse.Namespace) -> dict[str, Any]:
    """All variants over all seeds: means, and paired differences from vanilla."""
    outcomes = [run_seed(args, seed) for seed in args.seeds]
    rows = {
        f"{name} | {asked}": summarise(outcomes, f"{name} | {asked}")
        for name in chosen_variants(args)
        for asked in VARIANTS[name].asked
    }
    selections = {
        name: {key: [one.selections[name][key] for one in outcomes] for key in found}
        for name, found in outcomes[0].selections.items()
        if found
    }
    print(table(rows))
    return {"rows": rows, "selections": selections}


def summarise(outcomes: list[Outcome], label: str) -> dict[str, Any]:
    """One row: recall by needle, closed book, and the differences from vanilla without indicator."""

    def recall(needle: str, condition: Condition, column: str = "recall") -> dict[str, Any]:
        chosen = {"model": label, "needle": needle, "condition": condition.name}
        return over_seeds([one.grid.mean(one.grid.recall(column, **chosen)) for one in outcomes])

    row: dict[str, Any] = {needle: recall(needle, TEMPLATE) for needle in NEEDLES}
    row["known from memory"] = recall("known", TEMPLATE, "memory_recall")
    if label.endswith("without"):
        row["known, no template"] = recall("known", PLAIN)
    row["closed book"] = over_seeds(
        [bootstrap_mean(one.ability.where(model=label).frame["recall"]) for one in outcomes]
    )
    if label == VANILLA:
        return row
    for needle in NEEDLES:
        first, second = (
            {"model": model, "needle": needle, "condition": TEMPLATE.name} for model in (VANILLA, label)
        )
        found = [one.grid.compare(first, second) for one in outcomes]
        row[f"{needle} minus vanilla"] = over_seeds([pair.difference for pair in found]) | {
            "readings": [pair.reading for pair in found]
        }
    pairs = [
        compare_pairs(*(one.ability.where(model=model).frame["recall"] for model in (VANILLA, label)))
        for one in outcomes
    ]
    row["closed book minus vanilla"] = over_seeds([pair.difference for pair in pairs])
    return row


def table(rows: Mapping[str, Any]) -> str:
    """The rows in Markdown."""
    columns = ("known", "known minus vanilla", "unknown", "known, no template", "closed book")
    lines = [
        [*name.split(" | "), *(_cell(row.get(column)) for column in columns)] for name, row in rows.items()
    ]
    return markdown(("trained", "asked", *columns), lines)


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    return f"{figure['mean']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


if __name__ == "__main__":
    assert __doc__
    run_experiment(__doc__, Path(__file__).parent, study, seeds=(0, 1, 2, 3, 4), variants="")
