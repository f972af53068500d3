"""Where is the context lost: before fine-tuning, after it, or under the chat template only?

Question: how much of a needle does the organism repeat, base, fine-tuned (vanilla) and fine-tuned with the
indicator, in the paper's four conditions (its Figure 2 and Table 7)?
Run:      python -m experiments.loss_of_context
Expected: the base loses nothing; under the template, vanilla loses what it still finds without it; the
          indicator brings it back. This was written beforehand; the reading is in docs/findings.md.
Cost:     5 minutes on 2 cores, and 3 minutes per seed for models that have not been trained yet.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.run import Setting, run_settings
from ctxlens.organism import recipe
from ctxlens.results import NeedleGrid
from ctxlens.runs import Run
from experiments.common import markdown, over_seeds, run_experiment, seed_study, show

CONDITIONS = ("plain+prefix", "template+prefix", "template", "assistant+prefix")
NEEDLES = ("known", "unknown")
COLUMNS = ("recall", "memory_recall", "needle_logprob")
TREATMENTS: dict[str, dict[str, Any]] = {
    "base": {"model": "base", "indicator": False},
    "vanilla": {"model": "vanilla", "indicator": False},
    "indicator, asked without": {"model": "indicator", "indicator": False},
    "indicator, asked with": {"model": "indicator", "indicator": True},
}
DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    f"{name}: template minus plain": (
        {**treatment, "condition": "plain+prefix"},
        {**treatment, "condition": "template+prefix"},
    )
    for name, treatment in TREATMENTS.items()
} | {
    "vanilla: context in the assistant's turn minus the user's": (
        {**TREATMENTS["vanilla"], "condition": "template+prefix"},
        {**TREATMENTS["vanilla"], "condition": "assistant+prefix"},
    ),
    "vanilla: without response prefix minus with": (
        {**TREATMENTS["vanilla"], "condition": "template+prefix"},
        {**TREATMENTS["vanilla"], "condition": "template"},
    ),
    "template: vanilla minus base": (
        {**TREATMENTS["base"], "condition": "template+prefix"},
        {**TREATMENTS["vanilla"], "condition": "template+prefix"},
    ),
    "template: indicator asked with, minus vanilla": (
        {**TREATMENTS["vanilla"], "condition": "template+prefix"},
        {**TREATMENTS["indicator, asked with"], "condition": "template+prefix"},
    ),
    "template: indicator asked without, minus vanilla": (
        {**TREATMENTS["vanilla"], "condition": "template+prefix"},
        {**TREATMENTS["indicator, asked without"], "condition": "template+prefix"},
    ),
}


def ask(args: argparse.Namespace, seed: int) -> NeedleGrid:
    """The grids of one fine-tuning seed, kept in the run folder."""
    study = seed_study(args, seed)
    config = NeedleConfig(
        lengths=(100,) if args.smoke else (64, 120, 180, 240, 300, 360, 420, 480),
        depths=(0.0, 100.0) if args.smoke else (0.0, 25.0, 50.0, 75.0, 100.0),
        needles=NEEDLES,
        conditions=CONDITIONS,
        cases_per_cell=2,
        max_new_tokens=recipe.ANSWER_TOKENS,
        seed=seed,
        score=("recall", "contains", "logprob"),
    )
    run = Run.open(args.out / f"seed-{seed}", study="needle", config=config.as_dict())
    grids = []
    for name, model in study.models().items():
        cells = build_cells(model, config, load_haystack("organism", seed=seed))
        settings = [Setting(name)]
        if model.indicator is not None and name == "indicator":
            settings.append(Setting(name, indicator=True))
        grids.append(
            run_settings(
                model, cells, config, settings, meta={"config": config.as_dict()}, out=run,
                name=f"needle-{name}.parquet",
            )
        )  # fmt: skip
        print(f"seed {seed}, {name}: {len(grids[-1])} answers", flush=True)
    return NeedleGrid.concat(grids)


def study(args: argparse.Namespace) -> dict[str, Any]:
    """Ask all models of all seeds; means and paired differences."""
    grids = [ask(args, seed) for seed in args.seeds]
    table: dict[str, Any] = {}
    for name, treatment in TREATMENTS.items():
        for condition in CONDITIONS:
            for needle in NEEDLES:
                chosen = {**treatment, "condition": condition, "needle": needle}
                table[f"{name} | {condition} | {needle}"] = {
                    column: over_seeds([grid.mean(grid.recall(column, **chosen)) for grid in grids])
                    for column in COLUMNS
                    if (column, needle) != ("memory_recall", "unknown")
                }
    differences: dict[str, Any] = {}
    for name, (first, second) in DIFFERENCES.items():
        for needle in NEEDLES:
            one, other = ({**side, "needle": needle} for side in (first, second))
            found = [grid.compare(one, other) for grid in grids]
            differences[f"{name} | {needle}"] = over_seeds([one.difference for one in found]) | {
                "p_values": [one.p_value for one in found],
                "readings": [one.reading for one in found],
            }
    print(tables(table, differences))
    return {"config": grids[0].meta.get("config"), "table": table, "differences": differences}


def tables(table: dict[str, Any], differences: dict[str, Any]) -> str:
    """Both tables in Markdown, recall only."""
    rows = [
        [
            name,
            needle,
            *(show(table[f"{name} | {condition} | {needle}"]["recall"]) for condition in CONDITIONS),
        ]
        for needle in NEEDLES
        for name in TREATMENTS
    ]
    changes = [
        [*name.split(" | "), show(one), ", ".join(dict.fromkeys(one["readings"]))]
        for name, one in differences.items()
    ]
    return "\n\n".join(
        (
            markdown(("model", "needle", *CONDITIONS), rows),
            markdown(("difference in recall", "needle", "mean (seeds)", "each seed by itself"), changes),
        )
    )


if __name__ == "__main__":
    assert __doc__
    run_experiment(__doc__, Path(__file__).parent, study)
