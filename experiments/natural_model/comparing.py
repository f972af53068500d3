"""From items to figures: means by arm, paired differences, and differences of differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ctxlens.stats import bootstrap_mean, compare_pairs
from experiments.common import markdown
from experiments.natural_model.asking import Item
from experiments.natural_model.standard import IFEVAL_METRICS, READING_METRICS

GOLD = ("log-probability", "gain over another passage", "gain over no passage")

MEASURES: Mapping[str, tuple[str, ...]] = {
    "needle": ("needle recall", "needle log-probability", "what the needle adds"),
    "squad gold answer": GOLD,
    "squad": READING_METRICS,
    "drop gold answer": GOLD,
    "drop": READING_METRICS,
    "closed book": ("contains", "log-probability"),
    "ifeval": IFEVAL_METRICS,
}
"""What is measured on each set."""

PAIRS: Mapping[str, tuple[str, str]] = {
    "loss under the template, base": ("base, plain", "base, template"),
    "loss under the template, vanilla": ("vanilla, plain", "vanilla, template"),
    "fine-tuning, plain: vanilla minus base": ("base, plain", "vanilla, plain"),
    "cure: indicator given, minus vanilla, template": ("vanilla, template", "indicator, template+indicator"),
    "trained with it, asked without, minus vanilla": ("vanilla, template", "indicator, template"),
    "the token alone: with minus without": ("indicator, template", "indicator, template+indicator"),
    "true turns: indicator given, minus vanilla": ("vanilla, template", "oracle, template+indicator"),
    "true turns: with minus without": ("oracle, template", "oracle, template+indicator"),
}
"""Paired differences, second minus first."""

BY_TUNING = "loss under the template by fine-tuning: vanilla's minus base's"
"""The paper's claim: template minus plain in the vanilla model, minus the same in the base."""

Items = Mapping[str, Sequence[Item]]


def summarise(asked: Mapping[str, Items]) -> dict[str, Any]:
    """Means and paired differences of every set.

    Args:
        asked: set to arm to items; every arm of a set has the same units.
    """
    return {
        name: {
            "units": len(next(iter(arms.values()))),
            "means": {arm: {m: _mean(items, m) for m in MEASURES[name]} for arm, items in arms.items()},
            "differences": {
                label: {m: _difference(*sides, m) for m in MEASURES[name]} for label, sides in _pairs(arms)
            },
        }
        for name, arms in asked.items()
    }


def _pairs(arms: Items) -> Iterator[tuple[str, tuple[Sequence[Item], Sequence[Item]]]]:
    """All comparisons whose arms were asked, each as two lists of items."""
    for label, (first, second) in PAIRS.items():
        if first in arms and second in arms:
            yield label, (arms[first], arms[second])
    if all(name in arms for name in ("base, plain", "vanilla, plain")):
        changes = [
            _changes(arms[f"{model}, plain"], arms[f"{model}, template"]) for model in ("base", "vanilla")
        ]
        yield BY_TUNING, (changes[0], changes[1])


def _changes(first: Sequence[Item], second: Sequence[Item]) -> list[Item]:
    """Items whose values are second minus first."""
    other = {item["unit"]: item for item in second}
    kept = ("unit", "cluster")
    return [
        {
            key: value if key in kept else other[item["unit"]][key] - value
            for key, value in item.items()
            if key in kept or isinstance(value, float)
        }
        for item in first
    ]


def _mean(items: Sequence[Item], measure: str) -> list[float]:
    found = bootstrap_mean(_column(items, measure), clusters=[item["cluster"] for item in items])
    return [found.estimate, found.low, found.high]


def _difference(first: Sequence[Item], second: Sequence[Item], measure: str) -> dict[str, Any]:
    """Second minus first over the same units."""
    other = {item["unit"]: item for item in second}
    pairs = [(item, other[item["unit"]]) for item in first]
    one, two = (_column([pair[side] for pair in pairs], measure) for side in (0, 1))
    found = compare_pairs(one, two, clusters=[item["cluster"] for item in first])
    change = found.difference
    return {
        "difference": [change.estimate, change.low, change.high], "p": found.p_value, "clusters": change.n,
        "reading": found.reading,
    }  # fmt: skip


def _column(items: Sequence[Item], measure: str) -> np.ndarray:
    return np.array([item[measure] for item in items], dtype=float)


def show(values: Sequence[float], digits: int = 3, *, sign: bool = False) -> str:
    """An estimate with its interval as text."""
    mark = "+" if sign else ""
    return f"{values[0]:{mark}.{digits}f} [{values[1]:{mark}.{digits}f}, {values[2]:{mark}.{digits}f}]"


def tables(summary: Mapping[str, Any]) -> str:
    """All figures in Markdown."""
    parts = []
    for name, found in summary.items():
        measures = MEASURES[name]
        means = [[arm, *(show(row[m]) for m in measures)] for arm, row in found["means"].items()]
        changes = [
            [label, *(f"{show(row[m]['difference'], sign=True)} {_mark(row[m])}".rstrip() for m in measures)]
            for label, row in found["differences"].items()
        ]
        parts.append(f"### {name}, {found['units']} units\n")
        parts.append(markdown(("arm", *measures), means) + "\n")
        parts.append(markdown(("paired difference", *measures), changes) + "\n")
    return "\n".join(parts)


def _mark(found: Mapping[str, Any]) -> str:
    return {"higher": "▲", "lower": "▼"}.get(found["reading"], "")
