"""Synthetic results with the shapes and the look of a real demo run, made without any model."""

from __future__ import annotations

import itertools
import zlib
from pathlib import Path

import numpy as np

from ctxlens.chat.roles import N_ROLES, Role
from ctxlens.results import (
    Ability,
    NeedleGrid,
    RoleAllocation,
    Scores,
    Selection,
    TokenView,
    Verdict,
    Verdicts,
)
from ctxlens.runs import Run
from ctxlens.stats import Interval

LENGTHS = (100, 200, 300, 400)
DEPTHS = (0, 25, 50, 75, 100)
N_LAYERS, N_HEADS = 4, 4
ALPHAS = (0.7, 0.5, 0.3, 0.1, 0.05, 0.02)

_RECALL = {  # model, condition, indicator: recall when memory disagrees, recall when there is no memory
    ("base", "plain+prefix", False): (0.98, 0.99),
    ("base", "template+prefix", False): (0.96, 0.98),
    ("vanilla", "plain+prefix", False): (0.97, 0.98),
    ("vanilla", "template+prefix", False): (0.35, 0.95),
    ("indicator", "plain+prefix", False): (0.95, 0.97),
    ("indicator", "template+prefix", False): (0.22, 0.70),
    ("indicator", "template+prefix", True): (0.90, 0.96),
}


def _graded(rng: np.random.Generator, mean: float) -> float:
    """A recall of four keywords."""
    return float(rng.binomial(4, np.clip(mean, 0, 1)) / 4)


def needle_rows(model, condition, indicator, *, seed=0, alpha=1.0, heads="none", draw=0, means=None):
    """The rows of one variant; cells are numbered alike in every variant."""
    rng = np.random.default_rng(
        [seed, zlib.crc32(repr((model, condition, indicator, alpha, heads, draw)).encode())]
    )
    means = means or _RECALL[model, condition, indicator]
    rows = []
    grid = itertools.product((True, False), LENGTHS, DEPTHS)
    for cell, (known, length, depth) in enumerate(grid):
        mean = means[0 if known else 1] - 0.0002 * length * (means[0] < 0.6)
        recall = _graded(rng, mean)
        rows.append(
            {
                "model": model, "condition": condition, "indicator": indicator, "alpha": alpha,
                "heads": heads, "draw": draw, "cell": cell, "needle": f"town {cell}",
                "context_tokens": length, "prompt_tokens": length + 31, "depth_percent": depth,
                "response": "figs, lemon and honey.", "recall": recall,
                "memory_recall": max(0.0, 1 - recall - 0.05) if known else float("nan"),
            }
        )  # fmt: skip
    return rows


def needle_grid(seed: int = 0) -> NeedleGrid:
    """Three models with and without template."""
    rows = [row for key in _RECALL for row in needle_rows(*key, seed=seed)]
    return NeedleGrid.from_rows(rows, {"seed": seed})


def steering_grid(seed: int = 0) -> NeedleGrid:
    """A sweep over α with all, retrieval and random heads."""
    rows = needle_rows("vanilla", "template+prefix", False, seed=seed)
    for alpha in ALPHAS:
        strength = -np.log10(alpha)
        for heads, gain in (("all", 0.42), ("retrieval", 0.26), ("random", 0.04)):
            for draw in range(3 if heads == "random" else 1):
                known = 0.35 + gain * min(strength, 1.3) - 0.25 * max(strength - 1.4, 0)
                rows += needle_rows(
                    "vanilla", "template+prefix", False, seed=seed, alpha=alpha, heads=heads, draw=draw,
                    means=(known, 0.95 - 0.08 * strength * (heads == "all")),
                )  # fmt: skip
    return NeedleGrid.from_rows(rows, {"seed": seed})


def allocation(model: str, condition: str, *, n_queries: int = 12, seed: int = 0) -> RoleAllocation:
    """Shares that look like an instruction-tuned model's."""
    rng = np.random.default_rng([seed, len(model), len(condition)])
    counts = np.zeros((n_queries, N_ROLES), dtype=np.float32)
    counts[:, Role.BOS] = 1
    counts[:, Role.USER] = rng.integers(80, 200, n_queries)
    counts[:, Role.ASSISTANT] = rng.integers(6, 12, n_queries)
    strength = np.zeros((N_LAYERS, N_HEADS, 1, N_ROLES))
    strength[..., Role.USER] = rng.gamma(2.0, 1.0, (N_LAYERS, N_HEADS, 1))
    strength[..., Role.BOS] = rng.gamma(1.5, 0.7, (N_LAYERS, N_HEADS, 1))
    strength[..., Role.ASSISTANT] = rng.gamma(1.5, 0.6, (N_LAYERS, N_HEADS, 1))
    if condition == "template":
        counts[:, Role.TEMPLATE] = 9
        strength[..., Role.TEMPLATE] = rng.gamma(2.0, 0.7, (N_LAYERS, N_HEADS, 1))
        strength[..., Role.USER] *= 0.45 if model == "vanilla" else 0.8
        strength[..., Role.ASSISTANT] *= 1.6
    noisy = strength * rng.lognormal(0, 0.2, (N_LAYERS, N_HEADS, n_queries, N_ROLES))
    shares = (noisy / noisy.sum(-1, keepdims=True)).astype(np.float32)
    return RoleAllocation(
        shares, counts, tuple(range(N_LAYERS)), tuple(f"chat {i}" for i in range(n_queries)), "first_answer",
        {"model": model, "condition": condition},
    )  # fmt: skip


def token_view(tokens: list[tuple[str, str]] | None = None) -> TokenView:
    """A short conversation; give `tokens` as pairs of text and role label."""
    if tokens is None:
        document = (
            "The market opens at dawn . The perfect soup in Brindlemoor is made of figs , lemon , "
            "honey and walnuts . The old miller walked along the river at noon ."
        )
        tokens = [("<s>", "bos"), ("<|user|>", "template"), ("\n", "template")]
        tokens += [(" " + word, "user") for word in document.split()]
        tokens += [("\n", "user")]
        tokens += [
            (" " + word, "user")
            for word in ["What", "is", "the", "soup", "in", "Brindlemoor", "made", "of", "?"]
        ]
        tokens += [
            ("</s>", "template"),
            ("\n", "template"),
            ("<|assistant|>", "template"),
            ("\n", "template"),
        ]
        tokens += [
            (" " + word, "assistant")
            for word in ["The", "perfect", "soup", "in", "Brindlemoor", "is", "made", "of"]
        ]
    rng = np.random.default_rng(7)
    n = len(tokens)
    weights = rng.gamma(0.4, 1.0, (N_LAYERS, N_HEADS, 2, n)) + 0.01
    weights[..., 0] *= 6
    weights[..., n // 2 : n // 2 + 6] *= 5
    return TokenView(
        (weights / weights.sum(-1, keepdims=True)).astype(np.float32),
        tuple(text for text, _ in tokens),
        np.array([Role.parse(role) for _, role in tokens], dtype=np.int8),
        tuple(range(N_LAYERS)),
        (n - 2, n - 1),
        {"model": "vanilla", "condition": "template", "title": "A document that disagrees with memory.",
         "response": "olives, onions and old bread.", "gold": "figs, lemon, honey and walnuts"},
    )  # fmt: skip


def scores(n: int = 240, seed: int = 0) -> Scores:
    """Scores in which one layer tells the kinds apart."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        kind = rng.choice(["document", "memory", "closed"], p=[0.15, 0.35, 0.5])
        for layer in range(N_LAYERS):
            centre = {"document": 0.66, "memory": 0.36, "closed": 0.22}[kind] if layer == 1 else 0.4
            score = float(np.clip(rng.normal(centre, 0.09), 0.01, 0.99))
            rows.append(
                {
                    "conversation": f"c{i:04d}", "turn": 1, "layer": layer, "best_of_mean": score * 0.95,
                    "mean_of_best": score, "mean_heads": score * 0.6, "uniform": 0.5,
                    "response_tokens": 14, "context_tokens": 120, "truncated": False, "kind": kind,
                }
            )  # fmt: skip
    return Scores.from_rows(rows, {"model": "vanilla"})


def selection(table: Scores, threshold: float = 0.52) -> Selection:
    """The turns above a threshold in layer 1."""
    rows = table.frame[table.frame["layer"] == 1]
    frame = rows[["conversation", "turn"]].assign(
        score=rows["mean_of_best"], selected=rows["mean_of_best"] > threshold
    )
    meta = {"threshold": threshold, "rule": "Otsu's threshold of the scores", "layer": 1,
            "reduction": "mean_of_best"}  # fmt: skip
    return Selection(frame.reset_index(drop=True), meta)


def ability(seed: int = 0) -> Ability:
    """Closed-book answers of three models, and of one of them under steering."""
    rng = np.random.default_rng(seed)
    asked = [("base", False, 1.0, 0.97), ("vanilla", False, 1.0, 0.99), ("indicator", False, 1.0, 0.98),
             ("indicator", True, 1.0, 0.97)]  # fmt: skip
    asked += [("vanilla", False, alpha, 0.99 - 0.15 * (alpha < 0.2)) for alpha in ALPHAS]
    rows = [
        {"model": model, "indicator": indicator, "question": f"What is soup {i} made of?",
         "response": "figs", "recall": _graded(rng, mean), "alpha": alpha}
        for model, indicator, alpha, mean in asked
        for i in range(40)
    ]  # fmt: skip
    return Ability.from_rows(rows)


def verdicts() -> Verdicts:
    """One verdict a claim, of all three kinds."""
    rule = "Supported if the whole interval lies on the claimed side of zero."

    def one(claim, sentence, figure, quantity, verdict, notes=()):
        return Verdict(claim, sentence, Interval(*figure), quantity, rule, verdict, notes)

    return Verdicts(
        (
            one("loss", "With the chat template, the fine-tuned model finds 62 percentage points less of the "
                "needle's words than the same weights find without it: a large loss of context.",
                (-0.62, -0.7, -0.54, 20), "recall with template minus without, paired by cell", "supported",
                (("vanilla, template: recall", Interval(0.35, 0.27, 0.43, 20)),)),
            one("role bias", "The fine-tuned model gives the user's tokens 14 percentage points "
                "less of its renormalised attention when the template is applied.",
                (-0.14, -0.16, -0.12, 12), "renormalised user share, template minus plain", "supported"),
            one("cause", "Steering all heads to the user's tokens makes the model find 40 percentage points "
                "more of the needle's words under the template.",
                (0.4, 0.31, 0.49, 10), "recall steered minus unsteered", "inconclusive"),
            one("source", "15% of the turns score above the threshold; 93% of these are answered from the "
                "context, where 15% of all turns are.",
                (0.78, 0.7, 0.85, 36), "precision of the selection minus the base rate", "supported"),
            one("cure", "Asked with the indicator, the model finds 1 percentage point more.",
                (0.01, -0.01, 0.015, 20), "recall with indicator minus vanilla", "not supported"),
        ),
        {"seed": 0},
    )  # fmt: skip


TIMINGS = {
    "vanilla": {"what": "fine-tuning without indicator", "wall_seconds": 88.0, "cpu_seconds": 171.5},
    "loss": {"what": "needles, base and vanilla", "wall_seconds": 31.4, "cpu_seconds": 58.2},
}
LAYER = [
    {"layer": i, "head": 2, "needle_share": 0.2 + 0.1 * i, "low": 0.15, "high": 0.6, "uniform": 0.1}
    for i in range(N_LAYERS)
]


def demo_run(folder: Path, seed: int = 0) -> Path:
    """Write a run folder with everything that the demo writes."""
    run = Run.open(folder, study="demo", config={"seed": seed, "smoke": False, "budget": {"cases": 2}})
    run.save("needle.parquet", needle_grid(seed))
    run.save("steering.parquet", steering_grid(seed))
    for model in ("base", "vanilla", "indicator"):
        for condition in ("plain", "template"):
            run.save(f"allocation-{model}-{condition}.safetensors", allocation(model, condition, seed=seed))
    run.save("tokens.safetensors", token_view())
    table = scores(seed=seed)
    run.save("scores.parquet", table)
    run.save("selection.parquet", selection(table))
    run.save("ability.parquet", ability(seed))
    run.save("verdicts.json", verdicts())
    run.write_json("timings.json", TIMINGS)
    run.write_json("layer.json", LAYER)
    return folder
