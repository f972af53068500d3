"""The verdicts of PLAN_REAL_MODEL.md, from the scores and probes that `real_model.py` has written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from baselines import baselines
from data import Labelled
from ranking import auroc, auroc_at_equal_length
from real_model import draw_rows

from ctxlens.models import load_model
from ctxlens.results import Scores
from ctxlens.scoring.selection import choose_layer, length_bins
from ctxlens.stats import Interval

REDUCTION = "mean_of_best"
SHARE = 0.3
"""The share of the turns that is selected in question 3."""
RESAMPLES = 1000


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
    n_layers = len(probes["long"])
    layers = candidates(development, probes, n_layers)
    on_development = {rule: development.at_equal_length(_name(layer)) for rule, layer in layers.items()}
    winner = max(on_development, key=lambda rule: on_development[rule])
    best, middle = _name(layers[winner]), _name(layers["middle"])

    def equal(name: str) -> Callable[[Rows], float]:
        return lambda rows: rows.at_equal_length(name)

    def minus(first: str, second: str) -> Interval:
        return resample(held_out, lambda rows: rows.at_equal_length(first) - rows.at_equal_length(second))

    everything = {
        name: {
            "auroc": [auroc(part.positive, part.values[name]) for part in (development, held_out)],
            "at equal length": [part.at_equal_length(name) for part in (development, held_out)],
        }
        for name in held_out.values
    }
    return {
        "rows": {"development": len(development), "held out": len(held_out)},
        "layers": layers,
        "at equal length, development": on_development,
        "winner": winner,
        "question 1": {
            "score": resample(held_out, equal(best)).as_dict(),
            "prompt length": resample(held_out, equal("prompt length")).as_dict(),
            "difference": minus(best, "prompt length").as_dict(),
        },
        "question 2": {
            "held out": {rule: held_out.at_equal_length(_name(layer)) for rule, layer in layers.items()},
            "winner minus middle": minus(best, middle).as_dict(),
        },
        "question 3": {
            "corrected minus plain": resample(
                held_out, lambda rows: selects(rows, best, corrected=True) - selects(rows, best)
            ).as_dict(),
            "corrected": selects(held_out, best, corrected=True),
            "plain": selects(held_out, best),
        },
        "every score (development, held out)": everything,
    }


def candidates(rows: Rows, probes: Mapping[str, np.ndarray], n_layers: int) -> dict[str, int]:
    """The layer of every rule; none of them looks at the kinds."""
    bins = length_bins(rows.context)
    corrected = np.stack([_centred(_log_odds(rows.values[_name(layer)]), bins) for layer in range(n_layers)])
    gap = _ranks_within(rows.values["lp_gap"], bins)
    agreement = [
        _correlation(_ranks_within(rows.values[_name(layer)], bins), gap) for layer in range(n_layers)
    ]
    return {
        "middle": choose_layer(n_layers, rule="middle"),
        "needle": int(probes["short"].max(1).argmax()),
        "needle long": int(probes["long"].max(1).argmax()),
        "needle mean": int(probes["long"].sum(1).argmax()),
        "residual": int(corrected.std(1).argmax()),
        "gap": int(np.nanargmax(agreement)),
    }


def selects(rows: Rows, name: str, *, corrected: bool = False) -> float:
    """Precision at equal length: how much more often selected turns need their context than their bin."""
    bins = length_bins(rows.context)
    score = _log_odds(rows.values[name])
    if corrected:
        score = _centred(score, bins, scaled=True)
    chosen = np.argsort(-score, kind="stable")[: round(SHARE * len(score))]
    base = np.array([rows.positive[bins == number].mean() for number in range(bins.max() + 1)])
    return float((rows.positive[chosen] - base[bins[chosen]]).mean())


def resample(rows: Rows, measure: Callable[[Rows], float], n: int = RESAMPLES) -> Interval:
    """A measure with its bootstrap interval over rows."""
    rng = np.random.default_rng(0)
    drawn = [measure(rows.only(rng.integers(0, len(rows), len(rows)))) for _ in range(n)]
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return Interval(measure(rows), float(low), float(high), len(rows))


def _name(layer: int) -> str:
    return f"layer {layer}, {REDUCTION}"


def _log_odds(score: np.ndarray) -> np.ndarray:
    share = np.clip(score, 1e-6, 1 - 1e-6)
    return np.log(share / (1 - share))


def _centred(score: np.ndarray, bins: np.ndarray, *, scaled: bool = False) -> np.ndarray:
    found = score.copy()
    for number in range(bins.max() + 1):
        inside = bins == number
        found[inside] -= score[inside].mean()
        if scaled:
            found[inside] /= max(score[inside].std(), 1e-9)
    return found


def _ranks_within(score: np.ndarray, bins: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    found = np.full(len(score), np.nan)
    for number in range(bins.max() + 1):
        inside = (bins == number) & ~np.isnan(score)
        found[inside] = rankdata(score[inside]) / max(1, inside.sum())
    return found


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    both = ~np.isnan(first) & ~np.isnan(second)
    return float(np.corrcoef(first[both], second[both])[0, 1])


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return (None if np.isnan(value) else round(value, 4)) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
