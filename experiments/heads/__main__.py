"""Which heads carry the needle, and which carry the loss?

Question: what happens to the needle's log-probability under the template when each head of the organism is
          switched off, blinded to the user, or steered; do copying heads, attention and gradients tell which?
Run:      python -m experiments.heads
Expected: a few heads carry the needle, and these copy; some carry the loss: without them the needle becomes
          more likely. Gradients order heads as steering does. The reading is in docs/findings.md.
Cost:     10 minutes on 2 cores, and 3 minutes per seed for models that have not been trained yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.heads import Answers, estimate_steering
from ctxlens.heads.study import ABLATIONS, HeadStudy
from ctxlens.organism import recipe
from ctxlens.results import HeadCurves, HeadMap
from ctxlens.results.heads import correlate_maps
from ctxlens.runs import Run
from experiments.common import markdown, over_seeds, run_experiment, seed_study, show

ALPHA = 0.1
KINDS = ("retrieval", "gradient", "steer", "ablate", "cumulative")
MAPS = ("user-share", "copying", "gradient", "steer", *ABLATIONS)


def measure(args: argparse.Namespace, seed: int) -> Run:
    """All head experiments on the vanilla model of one fine-tuning seed."""
    study = seed_study(args, seed)
    config = NeedleConfig(
        lengths=(100, 120) if args.smoke else (80, 160, 240, 320),
        depths=(50.0,) if args.smoke else (20.0, 80.0),
        needles=("known",),
        conditions=("template+prefix",),
        cases_per_cell=1 if args.smoke else 5,
        max_new_tokens=recipe.ANSWER_TOKENS,
        seed=seed + 2000,
    )
    vanilla = study.fine_tune("vanilla")
    cells = build_cells(vanilla, config, load_haystack("organism", seed=config.seed))
    run = Run.open(args.out / f"seed-{seed}", study="heads", config=config.as_dict())
    heads = HeadStudy(vanilla, Answers(cells, config), run, ALPHA, seed=seed)

    def tell(stage: str) -> Callable[[int, int], None]:
        print(f"seed {seed}, {stage}", flush=True)
        return lambda done, total: None

    heads.run_kinds(KINDS, tell)
    return run


def maps_of(run: Run) -> dict[str, HeadMap]:
    """The maps of one seed by name."""
    return {name: HeadMap.load(run.path(f"map-{name}.safetensors")) for name in MAPS}


def study(args: argparse.Namespace) -> dict[str, Any]:
    """Run all seeds; extreme heads, agreement of maps, and what the first k heads do."""
    runs = [measure(args, seed) for seed in args.seeds]
    by_seed = [maps_of(run) for run in runs]
    heads = {
        name: [
            {
                "largest": describe(maps[name], ascending=False),
                "smallest": describe(maps[name], ascending=True),
                "heads whose interval leaves out 0": int(maps[name].decided().sum()),
            }
            for maps in by_seed
        ]
        for name in MAPS
    }
    agreement = {
        f"{one} and {other}": over_seeds(
            [correlate_maps(_as_steering(maps[one]), maps[other], rank=True) for maps in by_seed]
        )
        for one, other in (
            ("gradient", "steer"),
            ("gradient", "blind"),
            ("copying", "blind"),
            ("user-share", "blind"),
            ("copying", "steer"),
            ("user-share", "steer"),
            ("zero", "mean"),
        )
    }
    curves = {
        action: [HeadCurves.load(run.path(f"curves-{action}.parquet")) for run in runs]
        for action in ("steer", "blind")
    }
    cumulative: dict[str, Any] = {}
    for action, found in curves.items():
        for ranking in found[0].meta["rankings"]:
            for k in found[0].sizes[:-1]:
                cumulative[f"{action} | {ranking} | {k}"] = {
                    "effect": over_seeds([dict(one.points(ranking))[k] for one in found]),
                    "minus random": over_seeds([one.against_random(ranking, k) for one in found]),
                }
    print(tables(heads, agreement, cumulative))
    return {"alpha": ALPHA, "heads": heads, "rank correlation": agreement, "first k heads": cumulative}


def _as_steering(one: HeadMap) -> HeadMap:
    """A map of gradients as the steering effect that it predicts; other maps unchanged."""
    return estimate_steering(one, ALPHA) if one.kind == "gradient" else one


def describe(found: HeadMap, *, ascending: bool) -> list[Any]:
    """A map's first three heads: layer.head, value, interval."""
    low, high = found.interval()
    return [
        [
            f"{layer}.{head}",
            float(found.values[layer, head]),
            float(low[layer, head]),
            float(high[layer, head]),
        ]
        for layer, head in found.ranking(ascending=ascending)[:3]
    ]


def tables(heads: dict[str, Any], agreement: dict[str, Any], cumulative: dict[str, Any]) -> str:
    """The figures in Markdown."""

    def ends(name: str, end: str) -> str:
        return " · ".join(
            ", ".join(f"{head} {value:+.2f}" for head, value, *_ in seed[end][:2]) for seed in heads[name]
        )

    extremes = [[name, ends(name, "largest"), ends(name, "smallest")] for name in heads]
    curves = [
        [*name.split(" | "), show(one["effect"]), show(one["minus random"])]
        for name, one in cumulative.items()
    ]
    return "\n\n".join(
        (
            markdown(("map", "two largest by seed", "two smallest by seed"), extremes),
            markdown(("maps", "rank correlation over heads"), [[k, show(v)] for k, v in agreement.items()]),
            markdown(("action", "ranked by", "k", "change, nats per token", "minus k random heads"), curves),
        )
    )


if __name__ == "__main__":
    assert __doc__
    run_experiment(__doc__, Path(__file__).parent, study)
