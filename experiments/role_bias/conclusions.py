"""Differences of shares with paired intervals, and the verdicts by the rules that README.md fixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctxlens.stats import Interval, bootstrap_mean, compare_pairs
from experiments.common import markdown

VIEWS = (
    "raw",
    "renormalised, first token as BOS",
    "renormalised",
    "without sinks",
    "renormalised without sinks",
)
SINKLESS = "renormalised without sinks"
_RESAMPLES = 10_000
Row = Mapping[str, Any]


def conclude(rows: Sequence[Row]) -> dict[str, Any]:
    """Means, paired differences over layers and by layer, parts that are left without sinks, and verdicts."""
    names = list(rows[0]["share"])
    pairs = [("plain", name) for name in names[2:]] + [("plain, first token", name) for name in names[2:]]
    pairs.append(("plain", "plain, first token"))
    found: dict[str, Any] = {
        "texts": len(rows),
        "means": {
            name: {view: bootstrap_mean(shares(rows, name, view)).as_dict() for view in VIEWS}
            for name in names
        },
        "differences": {f"{other} minus {one}": compare(rows, one, other) for one, other in pairs},
        "by layer": {
            f"{other} minus {one}": {view: by_layer(rows, one, other, view) for view in VIEWS}
            for one, other in pairs
        },
    }
    found["verdicts"] = verdicts(rows)
    return found


def shares(rows: Sequence[Row], condition: str, view: str) -> np.ndarray:
    """The user's share of every text, mean over layers."""
    return np.array([np.nanmean(row["share"][condition][view]) for row in rows])


def compare(rows: Sequence[Row], one: str, other: str) -> dict[str, Any]:
    """The difference of two conditions in every view: interval over texts, sign-flip p and reading."""
    compared = {
        view: compare_pairs(shares(rows, one, view), shares(rows, other, view), n_resamples=_RESAMPLES)
        for view in VIEWS
    }
    return {
        view: {**each.difference.as_dict(), "p": each.p_value, "reading": each.reading}
        for view, each in compared.items()
    }


def by_layer(rows: Sequence[Row], one: str, other: str, view: str) -> list[list[float]]:
    """For each layer, the difference and its interval over texts."""
    values = np.array([row["share"][other][view] for row in rows], dtype=float)
    values = values - np.array([row["share"][one][view] for row in rows], dtype=float)
    intervals = [bootstrap_mean(layer) for layer in values.T]
    return [[round(value, 4) for value in (each.estimate, each.low, each.high)] for each in intervals]


def verdicts(rows: Sequence[Row]) -> dict[str, Any]:
    """What is left of the fall without sinks, or with the same first token in both conditions."""
    as_bos = "renormalised, first token as BOS"

    def fall(view: str, plain: str = "plain") -> np.ndarray:
        return shares(rows, "template", view) - shares(rows, plain, view)

    return {
        "sinks, first token as BOS": decide(fall(SINKLESS), fall(as_bos)),
        "sinks, first token as labelled": decide(fall(SINKLESS), fall("renormalised")),
        "same first token": decide(fall(as_bos, "plain, first token"), fall(as_bos)),
        "something is left": compare(rows, "plain", "template")[SINKLESS]["reading"],
    }


def decide(left: np.ndarray, fall: np.ndarray) -> dict[str, Any]:
    """The part of a fall that is left, and the verdict on "less than half of it is left".

    Args:
        left: differences of the texts in the view in which something is left.
        fall: differences of the same texts in the renormalised view.
    """
    zero = np.zeros_like(fall)
    part = ratio(left, fall)
    if compare_pairs(zero, fall).reading != "lower":
        verdict = "no fall to explain"
    elif part.low > -0.5 and part.high < 0.5:
        verdict = "supported"
    else:
        verdict = "refuted" if part.low > 0.5 else "undecided"
    return {"left": part.as_dict(), "verdict": verdict}


def ratio(above: np.ndarray, below: np.ndarray) -> Interval:
    """The ratio of two means over the same texts, with a 95 % percentile bootstrap interval over texts."""
    drawn = np.random.default_rng(0).integers(0, len(above), (_RESAMPLES, len(above)))
    low, high = np.percentile(above[drawn].mean(1) / below[drawn].mean(1), (2.5, 97.5))
    return Interval(float(above.mean() / below.mean()), float(low), float(high), len(above))


def tables(conclusions: Mapping[str, Any]) -> str:
    """The means, differences and verdicts of every group in Markdown."""
    parts = []
    for group, found in conclusions.items():
        rows = [(name, *(_cell(of[view]) for view in VIEWS)) for name, of in found["means"].items()]
        rows += [(name, *(_cell(of[view]) for view in VIEWS)) for name, of in found["differences"].items()]
        parts += [f"**{group}, {found['texts']} texts**", markdown(("user share", *VIEWS), rows)]
        parts.append("\n".join(f"- {name}: {_verdict(each)}" for name, each in found["verdicts"].items()))
    return "\n\n".join(parts)


def _cell(found: Mapping[str, Any]) -> str:
    text = f"{found['estimate']:z.3f} [{found['low']:z.3f}, {found['high']:z.3f}]"
    return text if "reading" not in found else f"{text} ({found['reading']}, p {found['p']:.2g})"


def _verdict(found: Any) -> str:
    return found if isinstance(found, str) else f"{_cell(found['left'])} left: {found['verdict']}"


__all__ = ["conclude", "tables"]
