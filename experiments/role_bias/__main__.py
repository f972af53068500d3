"""Does attention move from the user's tokens to the model's own under the template?

Question: which role has how much attention at the position that produces the answer, by layer, with and
          without template, before and after fine-tuning, with and without indicator (its Figures 3 to 5)?
Run:      python -m experiments.role_bias
Expected: with the template the user's renormalised share falls and the assistant's rises, more so after
          fine-tuning; the indicator brings the user's share back. The reading is in docs/findings.md.
Cost:     2 minutes on 2 cores, and 3 minutes per seed for models that have not been trained yet.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.prompts import render_cell
from ctxlens.heads import Answers
from ctxlens.heads.drift import Side, read_drift
from ctxlens.organism import recipe
from ctxlens.results import Drift
from ctxlens.runs import Run
from ctxlens.stats import Interval, bootstrap_mean
from experiments.common import markdown, over_seeds, run_experiment, seed_study, show

COMPARISONS = {
    "base: template minus plain": (("base", "plain"), ("base", "template")),
    "vanilla: template minus plain": (("vanilla", "plain"), ("vanilla", "template")),
    "plain: vanilla minus base": (("base", "plain"), ("vanilla", "plain")),
    "template: vanilla minus base": (("base", "template"), ("vanilla", "template")),
    "indicator model: asked with minus without": (
        ("indicator", "template"),
        ("indicator", "template+indicator"),
    ),
    "template: indicator model asked with, minus vanilla": (
        ("vanilla", "template"),
        ("indicator", "template+indicator"),
    ),
}
READINGS = (
    ("user", "renormalised", "mean"),
    ("user", "renormalised without sinks", "mean"),
    ("user", "renormalised", "retrieval"),
    ("assistant", "renormalised", "mean"),
    ("template", "raw", "mean"),
)
"""Role, view, heads."""


def over_layers(drift: Drift, role: str, view: str, heads: str, *, excess: bool = False) -> Interval:
    """The difference of a role's share, mean over layers (and heads), with an interval over contexts."""
    effects = (drift.excess if excess else drift.difference)(role, view).effects
    if heads == "retrieval":
        effects = effects[:, range(len(drift.layers)), drift.retrieval][..., None]
    return bootstrap_mean(effects.mean((1, 2)), clusters=drift.contexts)


def read(args: argparse.Namespace, seed: int) -> dict[str, Drift]:
    """All comparisons of one fine-tuning seed, kept in the run folder."""
    study = seed_study(args, seed)
    config = NeedleConfig(
        lengths=(100,) if args.smoke else (64, 120, 180, 240, 300, 360, 420, 480),
        depths=(50.0,) if args.smoke else (10.0, 50.0, 90.0),
        needles=("known",),
        conditions=("template+prefix",),
        cases_per_cell=2,
        max_new_tokens=recipe.ANSWER_TOKENS,
        seed=seed,
    )
    run = Run.open(args.out / f"seed-{seed}", study="drift", config=config.as_dict())
    models = study.models()
    cells = build_cells(models["base"], config, load_haystack("organism", seed=seed))
    contexts = Answers(cells, config).contexts
    conversations = [render_cell(models["base"], cell, config, "template+prefix").messages for cell in cells]
    found = {}
    for name, (first, second) in COMPARISONS.items():
        file = f"drift-{'-'.join((*first, *second))}.safetensors"
        if not run.has(file):
            one, other = (Side(models[model], condition, model) for model, condition in (first, second))
            options = {"add_generation_prompt": False, "continue_final_message": True}
            run.save(file, read_drift(one, other, conversations, contexts=contexts, render_options=options))
        found[name] = Drift.load(run.path(file))
        print(f"seed {seed}, {name}", flush=True)
    return found


def study(args: argparse.Namespace) -> dict[str, Any]:
    """Read all comparisons of all seeds; differences by role and view, and by layer."""
    drifts = [read(args, seed) for seed in args.seeds]
    differences: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    for name in COMPARISONS:
        for role, view, heads in READINGS:
            differences[f"{name} | {role}, {view}, {heads}"] = over_seeds(
                [over_layers(one[name], role, view, heads) for one in drifts]
            )
        differences[f"{name} | user, renormalised, mean, beyond token counts"] = over_seeds(
            [over_layers(one[name], "user", "renormalised", "mean", excess=True) for one in drifts]
        )
        by_layer = [one[name].by_layer("user", "renormalised") for one in drifts]
        layers[name] = [
            over_seeds([seed[layer][2] for seed in by_layer]) for layer in range(len(by_layer[0]))
        ]
    print(tables(differences, layers))
    return {"differences": differences, "user, renormalised, by layer": layers}


def tables(differences: dict[str, Any], layers: dict[str, Any]) -> str:
    """The differences in Markdown, over all layers and layer by layer."""
    kinds = list(dict.fromkeys(key.split(" | ")[1] for key in differences))
    rows = [[name, *(show(differences[f"{name} | {kind}"], 3) for kind in kinds)] for name in COMPARISONS]
    n_layers = len(next(iter(layers.values())))
    by_layer = [[name, *(show(one, 3) for one in layers[name])] for name in COMPARISONS]
    return "\n\n".join(
        (
            markdown(("comparison", *kinds), rows),
            markdown(
                ("user share, renormalised, mean of heads", *(f"layer {n}" for n in range(n_layers))),
                by_layer,
            ),
        )
    )


if __name__ == "__main__":
    assert __doc__
    run_experiment(__doc__, Path(__file__).parent, study)
