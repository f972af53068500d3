"""The verdicts of PLAN_REAL_MODEL.md, from the scores and probes that `real_model.py` has written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from baselines import baselines
from data import Labelled
from organism_rules import score_organism
from ranking import EqualLength, auroc, auroc_at_equal_length, quantile_interval
from real_model import draw_rows

from ctxlens.models import load_model
from ctxlens.results import Scores
from ctxlens.scoring.layers import most_agreeing, most_attentive, most_varied
from ctxlens.scoring.lengths import length_bins, log_odds
from ctxlens.scoring.selection import choose_layer
from ctxlens.stats import Interval

REDUCTION = "mean_of_best"
SHARE = 0.3
"""The share of the turns that is selected in question 3."""
RESAMPLES = 1000
PLANNED_BEST = "layer 23, mean_heads without sinks"
"""The best of all scores at equal length of the prompt."""
BASELINES = ("prompt length", "response length", "uniform", "lp_gap", "overlap, words")
ORGANISM_MARGIN = 0.02
"""How far below `needle` the winner may be on the organism's world."""


@dataclass(frozen=True)
class Rows:
    """Some rows: every score's values, the truth, and the lengths.

    Attributes:
        values: scores by name, one value per row.
        positive: which rows need their context.
        prompt: prompt lengths in characters.
        context: context lengths in tokens.
    """

    values: Mapping[str, np.ndarray]
    positive: np.ndarray
    prompt: np.ndarray
    context: np.ndarray

    def only(self, where: np.ndarray) -> Rows:
        """The rows at some places, or for which a condition holds."""
        values = {name: one[where] for name, one in self.values.items()}
        return Rows(values, self.positive[where], self.prompt[where], self.context[where])

    def at_equal_length(self, name: str) -> float:
        """AUROC over pairs of about equal prompt length."""
        return auroc_at_equal_length(self.positive, self.values[name], self.prompt)[0]

    def __len__(self) -> int:
        return len(self.positive)


def main() -> None:
    """Judge the three questions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("t0", type=Path)
    parser.add_argument("model")
    parser.add_argument("--run", type=Path, default=Path("runs/score_quality_real"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results-smollm2.json")
    given = parser.parse_args()
    scores = Scores.load(given.run / "gap.parquet")
    world = draw_rows(given.t0, load_model(given.model, backend="native", dtype="float32"))
    held_out = set(json.loads((given.run / "held_out.json").read_text(encoding="utf-8")))
    rows, names = read_rows(scores, world)
    held = np.array([name in held_out for name in names])
    probes = {
        name: np.array(json.loads((given.run / f"probe-{name}.json").read_text("utf-8"))["shares"])
        for name in ("short", "long")
    }
    found = judge(rows.only(~held), rows.only(held), probes)
    organism, own_world, own_probes = score_organism()
    found |= judge_organism(read_rows(organism, own_world)[0], own_probes, found)
    given.out.write_text(json.dumps(_rounded(found), indent=1) + "\n", encoding="utf-8")


def read_rows(scores: Scores, world: Labelled) -> tuple[Rows, list[str]]:
    """All rows with all scores, and their conversations."""
    turns = scores.frame.drop_duplicates(["conversation", "turn"]).reset_index(drop=True)
    names = [str(name) for name in turns["conversation"]]
    by_id = {one.id: one for one in world.conversations}
    simple = [baselines(by_id[name], int(turn)) for name, turn in zip(names, turns["turn"], strict=True)]
    values = {name: np.array([one[name] for one in simple]) for name in simple[0]}
    values["lp_gap"] = turns["lp_gap"].to_numpy(float)
    values["uniform"] = turns["uniform"].to_numpy(float)
    bare = scores.without_sinks().to_numpy(float)
    for layer in sorted(scores.frame["layer"].unique().tolist()):
        for reduction in Scores.REDUCTIONS:
            values[f"layer {layer}, {reduction}"] = scores.layer(layer, reduction).to_numpy(float)
        values[f"layer {layer}, mean_heads without sinks"] = bare[(scores.frame["layer"] == layer).to_numpy()]
    positive = np.array([world.kinds[name, int(turn)] == world.positive
                         for name, turn in zip(names, turns["turn"], strict=True)])  # fmt: skip
    return Rows(values, positive, values["prompt length"], turns["context_tokens"].to_numpy()), names


def judge(development: Rows, held_out: Rows, probes: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The answers to the three questions."""
    layers = candidates(development, probes)
    on_development = {rule: development.at_equal_length(_name(layer)) for rule, layer in layers.items()}
    winner = max(on_development, key=lambda rule: on_development[rule])
    best, middle = _name(layers[winner]), _name(layers["middle"])
    drawn = EqualLength(held_out.positive, [held_out.prompt], held_out.values, n=RESAMPLES)
    # Development, then held out (with its interval at equal length).
    everything = {
        name: {
            "auroc": [auroc(part.positive, part.values[name]) for part in (development, held_out)],
            "at equal length": [development.at_equal_length(name), *_three(drawn.interval(name))],
        }
        for name in held_out.values
    }
    corrected = resample(held_out, lambda rows: selects(rows, best, corrected=True) - selects(rows, best))
    return {
        "rows": {"development": len(development), "held out": len(held_out)},
        "layers": layers,
        "at equal length, development": on_development,
        "winner": winner,
        "question 1": {
            "score": drawn.interval(best).as_dict(),
            "prompt length": drawn.interval("prompt length").as_dict(),
            "difference": drawn.difference(best, "prompt length").as_dict(),
            "supported": drawn.difference(best, "prompt length").low > 0,
        },
        "question 2": {
            "held out": {rule: drawn.interval(_name(layer)).as_dict() for rule, layer in layers.items()},
            "winner minus middle": drawn.difference(best, middle).as_dict(),
            "better than middle": drawn.difference(best, middle).low > 0,
        },
        "question 3": {
            "corrected minus plain": corrected.as_dict(),
            "corrected": selects(held_out, best, corrected=True),
            "plain": selects(held_out, best),
            "supported": corrected.low > 0,
        },
        "every score": everything,
        "at equal length of prompt and response": at_both_lengths(held_out, [best, *BASELINES]),
    }


def at_both_lengths(rows: Rows, names: Sequence[str]) -> dict[str, Any]:
    """AUROC over pairs that are alike in both lengths, of some scores and of the best one in any layer.

    Not planned: added when the response's length alone turned out to separate the kinds.
    """
    drawn = EqualLength(
        rows.positive, [rows.prompt, rows.values["response length"]], rows.values, n=RESAMPLES
    )
    layered = {name: float(drawn.values(name)[0]) for name in rows.values if name.startswith("layer ")}
    shown = [*names, PLANNED_BEST, max(layered, key=lambda name: layered[name])]
    return {
        "pairs": int(drawn.pairs[0]),
        **{name: _three(drawn.interval(name)) for name in dict.fromkeys(shown)},
    }


def judge_organism(rows: Rows, probes: Mapping[str, np.ndarray], found: Mapping[str, Any]) -> dict[str, Any]:
    """The rules on the organism's world, and whether the winner becomes the default."""
    layers = candidates(rows, probes)
    reached = {rule: rows.at_equal_length(_name(layer)) for rule, layer in layers.items()}
    holds = reached[found["winner"]] >= reached["needle"] - ORGANISM_MARGIN
    return {
        "organism": {
            "rows": len(rows),
            "layers": layers,
            "at equal length": reached,
            "winner is not below needle": holds,
        },
        "winner becomes the default": holds and found["question 2"]["better than middle"],
    }


def candidates(rows: Rows, probes: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The layer of every rule; none of them looks at the kinds."""
    n_layers = len(probes["long"])
    by_layer = np.stack([rows.values[_name(layer)] for layer in range(n_layers)])
    return {
        "middle": choose_layer(n_layers, rule="middle"),
        "needle": most_attentive(probes["short"]),
        "needle long": most_attentive(probes["long"]),
        "needle mean": most_attentive(probes["long"], together=True),
        "residual": most_varied(by_layer, rows.context),
        "gap": most_agreeing(by_layer, rows.values["lp_gap"], rows.context),
    }


def selects(rows: Rows, name: str, *, corrected: bool = False) -> float:
    """Precision at equal length: how much more often selected turns need their context than their bin."""
    bins = length_bins(rows.context)
    score = log_odds(rows.values[name])
    if corrected:
        score = correct_for_length(score, bins)
    chosen = np.argsort(-score, kind="stable")[: round(SHARE * len(score))]
    base = np.array([rows.positive[bins == number].mean() for number in range(bins.max() + 1)])
    return float((rows.positive[chosen] - base[bins[chosen]]).mean())


def correct_for_length(score: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Scores in standard deviations from the mean of their bin; 0 where a bin has one value only."""
    corrected = np.zeros(len(score))
    for number in range(bins.max() + 1):
        part = score[bins == number]
        if part.min() < part.max():
            corrected[bins == number] = (part - part.mean()) / part.std()
    return corrected


def resample(rows: Rows, measure: Callable[[Rows], float], n: int = RESAMPLES) -> Interval:
    """A measure with its bootstrap interval over rows."""
    rng = np.random.default_rng(0)
    drawn = [measure(rows.only(rng.integers(0, len(rows), len(rows)))) for _ in range(n)]
    return quantile_interval(np.array([measure(rows), *drawn]), len(rows))


def _three(interval: Interval) -> list[float]:
    return [interval.estimate, interval.low, interval.high]


def _name(layer: int) -> str:
    return f"layer {layer}, {REDUCTION}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return (None if np.isnan(value) else round(value, 4)) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
