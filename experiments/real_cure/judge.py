"""The verdicts of the experiment, from the measured answers alone, by the rules in README.md.

Run:  python -m experiments.real_cure.judge runs/real_cure
      python -m experiments.real_cure.judge experiments/real_cure/answers --to results-gemma3.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ctxlens.files import write_atomic
from ctxlens.results.claims import combine, judge
from ctxlens.stats import Interval, bootstrap_mean
from experiments.common import markdown, rounded
from experiments.real_cure.answers import read_answers, read_quality

MARGIN, COST_MARGIN = 0.10, 0.10
MEASURES = ("needles", "squad", "drop", "closed book", "ifeval")
Found = dict[str, Any]


def main() -> None:
    """Judge what is finished, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, help="file of the verdicts, by default judged.json in the folder")
    given = parser.parse_args()
    found = judge_all(given.folder)
    write_atomic(given.to or given.folder / "judged.json", json.dumps(rounded(found), indent=1) + "\n")
    tables = make_table(found["levels"]), make_claims(found["hypotheses"]), make_described(found["described"])
    print(*tables, sep="\n\n")


def judge_all(folder: Path) -> Found:
    """Levels of all models, and the verdicts on the hypotheses whose models are measured."""
    frame = read_answers(folder)
    seeds = sorted({seed for seed in frame["seed"] if seed >= 0})
    return {
        "seeds": seeds,
        "levels": levels(frame),
        "hypotheses": {name: one for name, one in judge_hypotheses(frame).items() if one},
        "described": {name: one for name, one in describe(frame).items() if one},
        "selection": read_quality(folder),
    }


def values(frame: pd.DataFrame, model: str, asked: str, measure: str) -> pd.DataFrame:
    """Value by question (mean over seeds), with the text that it belongs to."""
    rows = frame[(frame["model"] == model) & (frame["asked"] == asked) & (frame["measure"] == measure)]
    return rows.groupby(["item", "text"], as_index=False)["value"].mean().set_index("item")


def difference(
    frame: pd.DataFrame, first: tuple[str, str], second: tuple[str, str], measure: str
) -> Interval | None:
    """Second minus first, paired by question, with an interval over texts; None if one is not measured.

    Two trained models are compared over the seeds that both have.
    """
    seeds = [set(frame.loc[frame["model"] == model, "seed"]) for model, _ in (first, second)]
    if all(min(one, default=-1) >= 0 for one in seeds):
        frame = frame[frame["seed"].isin(seeds[0] & seeds[1])]
    before, after = values(frame, *first, measure), values(frame, *second, measure)
    if before.empty or after.empty:
        return None
    change = (after["value"] - before["value"]).dropna()
    return bootstrap_mean(change, clusters=before.loc[change.index, "text"].tolist())


def levels(frame: pd.DataFrame) -> Found:
    """The mean of every measure by model and by how it was asked, with an interval over texts."""
    found: Found = {}
    for (model, asked, measure), _ in frame.groupby(["model", "asked", "measure"]):
        rows = values(frame, str(model), str(asked), str(measure))
        one = bootstrap_mean(rows["value"], clusters=rows["text"].tolist())
        found.setdefault(f"{model}, {asked}", {})[str(measure)] = one.as_dict()
    return found


BASE, VANILLA = ("base", "template"), ("vanilla", "template")
MARKED, UNMARKED = ("indicator", "template+indicator"), ("indicator", "template")
RANDOM, UPSAMPLED = ("random", "template+indicator"), ("upsample", "template")
STRICT_MARKED = ("indicator-top25", "template+indicator")
STRICT_RANDOM = ("random-top25", "template+indicator")
GAINS: Mapping[str, tuple[tuple[str, str], tuple[str, str], int]] = {
    "1 vanilla loses context": (BASE, VANILLA, -1),
    "2 the indicator gives context": (VANILLA, MARKED, 1),
    "3 selection matters": (RANDOM, MARKED, 1),
    "3b a stricter selection matters": (STRICT_RANDOM, STRICT_MARKED, 1),
    "4 repetition gives context": (VANILLA, UPSAMPLED, 1),
}
"""Two models as they are asked, and the direction of the claimed difference (second minus first)."""
COSTS: Mapping[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "5a the indicator's training costs": (VANILLA, UNMARKED),
    "5b repetition costs": (VANILLA, UPSAMPLED),
}


DESCRIBED: Mapping[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "the token itself: indicator, asked with it minus without": (UNMARKED, MARKED),
    "asked with the token, minus vanilla": (VANILLA, MARKED),
    "random turns, asked with the token, minus vanilla": (VANILLA, RANDOM),
    "a quarter selected, asked with the token, minus vanilla": (VANILLA, STRICT_MARKED),
}
"""Two models as they are asked, without a verdict."""


def describe(frame: pd.DataFrame) -> Found:
    """Further differences, and those of the hypotheses by seed; no verdicts."""
    found: Found = {}
    for name, (first, second) in DESCRIBED.items():
        figures = {measure: difference(frame, first, second, measure) for measure in MEASURES}
        found[name] = {measure: one.as_dict() for measure, one in figures.items() if one is not None}
    for name, (first, second, _) in GAINS.items():
        seeds = sorted({seed for seed in frame.loc[frame["model"] == second[0], "seed"] if seed >= 0})
        for seed in seeds if len(seeds) > 1 else ():
            one = difference(frame[frame["seed"].isin([-1, seed])], first, second, "needles")
            found[f"{name}, seed {seed}"] = {} if one is None else {"needles": one.as_dict()}
    return found


def judge_hypotheses(frame: pd.DataFrame) -> dict[str, Found]:
    """The verdicts, each with its figures; empty where a model is not measured."""
    found: dict[str, Found] = {}
    for name, (first, second, direction) in GAINS.items():
        figures = {m: difference(frame, first, second, m) for m in ("needles", "squad", "drop")}
        found[name] = _verdict(figures, ("needles",), direction, MARGIN)
    found["1b loss by the template"] = judge_template_loss(frame)
    for name, (first, second) in COSTS.items():
        figures = {m: difference(frame, first, second, m) for m in ("closed book", "ifeval")}
        found[name] = _verdict(figures, tuple(figures), -1, COST_MARGIN)
    return found


def judge_template_loss(frame: pd.DataFrame) -> Found:
    """Hypothesis 1b: the loss by the template is larger after vanilla fine-tuning than in the base."""
    parts = [values(frame, model, asked, "needles") for model in ("base", "vanilla")
             for asked in ("plain", "template")]  # fmt: skip
    if any(part.empty for part in parts):
        return {}
    loss = [parts[at + 1]["value"] - parts[at]["value"] for at in (0, 2)]
    change = (loss[1] - loss[0]).dropna()
    figure = bootstrap_mean(change, clusters=parts[0].loc[change.index, "text"].tolist())
    return {"needles": figure.as_dict(), "verdict": judge(figure, direction=-1, margin=MARGIN)}


def _verdict(
    figures: Mapping[str, Interval | None], deciding: Sequence[str], direction: int, margin: float
) -> Found:
    known = {name: one for name, one in figures.items() if one is not None}
    if not set(deciding) & set(known):
        return {}
    verdicts = [judge(known[name], direction=direction, margin=margin) for name in deciding if name in known]
    return {**{name: one.as_dict() for name, one in known.items()}, "verdict": combine(verdicts)}


def make_table(found: Found) -> str:
    """The levels as a Markdown table."""
    rows = [[name, *(_say(measures.get(one)) for one in MEASURES)] for name, measures in found.items()]
    return markdown(["model, asked", *MEASURES], rows)


def make_claims(found: Mapping[str, Found]) -> str:
    """The hypotheses with their differences and verdicts as a Markdown table."""
    rows = [
        [name, *(_say(one.get(measure), signed=True) for measure in MEASURES), one["verdict"]]
        for name, one in sorted(found.items())
    ]
    return markdown(["hypothesis", *MEASURES, "verdict"], rows)


def make_described(found: Mapping[str, Found]) -> str:
    """What has no verdict as a Markdown table."""
    rows = [[name, *(_say(one.get(m), signed=True) for m in MEASURES)] for name, one in found.items()]
    return markdown(["described", *MEASURES], rows)


def _say(one: Found | None, *, signed: bool = False) -> str:
    if one is None:
        return "–"
    form = "+.2f" if signed else ".2f"
    return f"{one['estimate']:{form}} [{one['low']:{form}}, {one['high']:{form}}]".replace("-", "−")


__all__ = ["judge_all", "make_claims", "make_described", "make_table"]

if __name__ == "__main__":
    main()
