"""Does steering attention back to the user's tokens bring the context back, and what does it cost?

Question: what does steering the vanilla organism gain under the template, in every mode, against as many
          random heads, and what does it cost in questions that need no context (the paper's Table 1)?
Run:      python -m experiments.steering
Expected: a gain with an optimum in α, more for all heads than for random ones, and a cost. α is chosen on one
          half of the texts and judged on the other. The reading is in docs/findings.md.
Cost:     12 minutes on 2 cores, and 3 minutes per seed for models that have not been trained yet.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.heads import side_effects, steering_sweep
from ctxlens.models import Model
from ctxlens.organism import load_world, recipe
from ctxlens.results import Ability, NeedleGrid
from ctxlens.runs import Run
from ctxlens.stats import Interval, bootstrap_mean
from experiments.common import markdown, over_seeds, run_experiment, seed_study, show

ALPHAS = (0.95, 0.7, 0.5, 0.3, 0.2, 0.1, 0.03, 0.01)
MODES = ("paper", "prompt-only", "compounding")
SETS = ("all", "retrieval", "random")
PAPERS_ALPHA = 0.95


def sweep(args: argparse.Namespace, seed: int) -> tuple[dict[str, NeedleGrid], Ability]:
    """The sweeps of one fine-tuning seed by mode, and the cost in mode `paper`."""
    study = seed_study(args, seed)
    config = NeedleConfig(
        lengths=(100, 120) if args.smoke else (80, 160, 240, 320),
        depths=(50.0,) if args.smoke else (20.0, 80.0),
        needles=("known", "unknown"),
        conditions=("template+prefix",),
        cases_per_cell=1 if args.smoke else 6,
        max_new_tokens=recipe.ANSWER_TOKENS,
        seed=seed + 1000,
    )
    vanilla = study.fine_tune("vanilla")
    cells = build_cells(vanilla, config, load_haystack("organism", seed=config.seed))
    run = Run.open(args.out / f"seed-{seed}", study="steering", config=config.as_dict())
    alphas = (0.3,) if args.smoke else ALPHAS
    grids = {}
    for mode in MODES:
        grids[mode] = steering_sweep(
            vanilla, cells, config, alphas=alphas, head_sets=SETS if mode == "paper" else ("all",),
            n_draws=3, mode=mode, seed=seed, out=run, name=f"steering-{mode}.parquet", label="vanilla",
        )  # fmt: skip
        print(f"seed {seed}, {mode}: {len(grids[mode])} answers", flush=True)
    file = "steering-ability.parquet"
    if not run.has(file):
        run.save(file, cost(vanilla, grids["paper"], run, seed, 8 if args.smoke else 60))
    return grids, Ability.load(run.path(file))


def cost(vanilla: Model, grid: NeedleGrid, run: Run, seed: int, n: int) -> Ability:
    """Closed-book answers of the unsteered model and with all heads steered, by α."""
    everything = replace(grid, frame=grid.frame[grid.frame["heads"].isin(["none", "all"])])
    facts = load_world().closed_book(n, seed=seed)
    return side_effects(vanilla, everything, facts, max_new_tokens=recipe.ANSWER_TOKENS, out=run)


def gain(grid: NeedleGrid, heads: str, alpha: float, needle: str = "known", column: str = "recall") -> Any:
    """Recall steered minus unsteered by cell; for random heads, the mean over draws."""
    before = grid.recall(column, alpha=1.0, needle=needle)
    return grid.recall(column, alpha=alpha, heads=heads, needle=needle) - before


def split(grid: NeedleGrid, values: Any) -> tuple[Any, Any]:
    """Values of the texts that choose α, and of the texts that judge it."""
    odd = grid.contexts(values.index) % 2 == 1
    return values[~odd], values[odd]


def judge(grid: NeedleGrid, heads: str) -> tuple[float, Interval]:
    """The best α on one half of the texts, and its gain on the other."""
    alphas = sorted(set(grid.frame["alpha"]) - {1.0})
    best = max(alphas, key=lambda alpha: split(grid, gain(grid, heads, alpha))[0].mean())
    return best, grid.mean(split(grid, gain(grid, heads, best))[1])


def cost_of(ability: Ability, alpha: float, column: str) -> Interval:
    """A cost of steering all heads: steered minus unsteered, by question."""
    frame = ability.frame
    before = frame[frame["alpha"] == 1.0].set_index("question")[column]
    after = frame[frame["alpha"] == alpha].set_index("question")[column]
    return bootstrap_mean((after - before).to_numpy())


Found = list[tuple[dict[str, NeedleGrid], Ability]]
"""One entry per fine-tuning seed: the grids by mode, and the closed-book answers."""


def study(args: argparse.Namespace) -> dict[str, Any]:
    """Steer the vanilla models of all seeds: curves, chosen α with control and cost, the paper's α."""
    found = [sweep(args, seed) for seed in args.seeds]
    by_mode = {mode: [grids[mode] for grids, _ in found] for mode in MODES}
    papers = by_mode["paper"]
    curves = {
        f"{mode}, {heads}": curve(by_mode[mode], heads)
        for mode in MODES
        for heads in (SETS if mode == "paper" else ("all",))
    }
    chosen = {f"{mode}, all": judge_seeds(by_mode[mode], "all") for mode in MODES}
    chosen["paper, retrieval"] = judge_seeds(papers, "retrieval")
    for heads in ("all", "retrieval"):
        name = f"paper, {heads} minus random of one head a layer"
        chosen[name] = over_random(papers, heads, chosen[f"paper, {heads}"]["alpha"])
    costs = costs_at(found, chosen["paper, all"]["alpha"])
    unsteered = over_seeds([one.mean(one.recall(alpha=1.0, needle="known")) for one in papers])
    print(tables(curves, chosen, costs, unsteered))
    return {
        "unsteered recall": unsteered,
        "gain by alpha": curves,
        "at the chosen alpha": chosen,
        "cost at the chosen alpha, all heads": costs,
        f"gain at the paper's alpha {PAPERS_ALPHA:g}": gains_at_papers_alpha(by_mode),
    }


def curve(grids: list[NeedleGrid], heads: str) -> dict[str, dict[str, Any]]:
    """Gain over seeds by α and kind of needle."""
    alphas = sorted(set(grids[0].frame["alpha"]) - {1.0}, reverse=True)
    return {
        f"{alpha:g}": {
            needle: over_seeds([one.mean(gain(one, heads, alpha, needle)) for one in grids])
            for needle in ("known", "unknown")
        }
        for alpha in alphas
    }


def judge_seeds(grids: list[NeedleGrid], heads: str) -> dict[str, Any]:
    """The gain at every seed's chosen α, with these α."""
    judged = [judge(one, heads) for one in grids]
    return over_seeds([gained for _, gained in judged]) | {"alpha": [alpha for alpha, _ in judged]}


def over_random(grids: list[NeedleGrid], heads: str, alphas: list[float]) -> dict[str, Any]:
    """The gain of a set of heads minus that of random heads, on the texts that judge, at every seed's α."""
    differences = []
    for grid, alpha in zip(grids, alphas, strict=True):
        difference = gain(grid, heads, alpha) - gain(grid, "random", alpha)
        differences.append(grid.mean(split(grid, difference)[1]))
    return over_seeds(differences)


def costs_at(found: Found, alphas: list[float]) -> dict[str, Any]:
    """What steering all heads costs in closed-book questions, at every seed's α."""
    pairs = [(ability, alpha) for (_, ability), alpha in zip(found, alphas, strict=True)]
    return {
        column: over_seeds([cost_of(ability, alpha, column) for ability, alpha in pairs])
        for column in ("recall", "nats_per_token")
    }


def gains_at_papers_alpha(by_mode: dict[str, list[NeedleGrid]]) -> dict[str, Any]:
    """The gain by mode at the paper's α; nothing where the sweep leaves that α out."""
    if PAPERS_ALPHA not in set(by_mode["paper"][0].frame["alpha"]):
        return {}
    return {
        mode: over_seeds([one.mean(gain(one, "all", PAPERS_ALPHA)) for one in grids])
        for mode, grids in by_mode.items()
    }


def tables(
    curves: dict[str, Any], chosen: dict[str, Any], costs: dict[str, Any], unsteered: dict[str, Any]
) -> str:
    """The figures in Markdown."""
    alphas = list(next(iter(curves.values())))
    gains = [
        [name, needle, *(show(by_alpha[alpha][needle]) for alpha in alphas)]
        for needle in ("known", "unknown")
        for name, by_alpha in curves.items()
    ]
    judged = [
        [name, ", ".join(f"{a:g}" for a in one.get("alpha", ())), show(one)] for name, one in chosen.items()
    ]
    judged += [[f"cost, closed book, {name}", "", show(one)] for name, one in costs.items()]
    return "\n\n".join(
        (
            f"Unsteered recall under the template: {show(unsteered)}",
            markdown(("mode, heads", "needle", *(f"α {alpha}" for alpha in alphas)), gains),
            markdown(("judged on the other texts", "α by seed", "gain, mean (seeds)"), judged),
        )
    )


if __name__ == "__main__":
    assert __doc__
    run_experiment(__doc__, Path(__file__).parent, study)
