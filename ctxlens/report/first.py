"""The first screen: what was asked, of which models, and the figures that matter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctxlens.report.collect import RunContents, short_name
from ctxlens.report.plots.allocation import choose_view, mean_over_queries
from ctxlens.report.plots.heads import ABLATIONS, NAMES, POSITIVE
from ctxlens.report.plots.needle import COLUMNS, needle_panels
from ctxlens.results import Drift, HeadMap, Verdict
from ctxlens.results.checkpoints import QUANTITIES, Checkpoints
from ctxlens.results.evaluation import Evaluation
from ctxlens.stats import Interval, bootstrap_mean

_MOST_KEYS = 3
_CHECKSUM = 8
_FIRST = ("loss", "bias", "role bias", "cause", "cure")
"""Claims whose figures come first."""

_QUESTIONS = {
    "demo": "Does fine-tuning on instructions make a model use less of the text that a user gives it, "
    "why, and can it be cured?",
    "audit": "Does the model use less of a user's text once its chat template is around the conversation, "
    "and is its attention the cause?",
    "checkpoints": "How do recall, loss and bias change from checkpoint to checkpoint?",
    "needle": "Does the model find a fact in a long text, and does the way of asking change that?",
    "allocate": "To whose tokens does the model attend where its answer begins?",
    "steer": "Does the answer change when attention is steered to the user's text?",
    "heads": "Which heads carry the user's text to the answer?",
    "drift": "How does the attention of two models, or of two ways of asking, differ?",
    "score": "How much does each answer in the data depend on the user's text?",
    "select": "Which answers in the data depend on the user's text?",
    "eval": "How well do the models answer, and does the way of asking change that?",
    "evaluation": "How well do the models answer, and does the way of asking change that?",
    "mt-bench": "How good are the answers to questions of several turns?",
    "train": "How did the training go?",
}
"""What each study asks."""


@dataclass(frozen=True)
class ModelName:
    """A model as the page names it: the last part of its name, and the beginning of its weights' checksum."""

    name: str
    checksum: str = ""


@dataclass(frozen=True)
class Key:
    """One figure that matters.

    Attributes:
        name: what it is about, in a word or two.
        interval: the figure with its interval.
        quantity: what was measured, with its unit.
        signed: whether the figure is a difference.
    """

    name: str
    interval: Interval
    quantity: str
    signed: bool = False

    @property
    def strip(self) -> dict[str, float] | None:
        """Where zero, the interval and the estimate lie on a strip, in percent; None for other scales."""
        one = self.interval
        low, high = (-1.0, 1.0) if self.signed else (0.0, 1.0)
        if math.isnan(one.estimate) or not low <= one.estimate <= high:
            return None
        ends = [one.estimate if math.isnan(end) else min(max(end, low), high) for end in (one.low, one.high)]
        at = [round(100 * (value - low) / (high - low), 1) for value in (0.0, *ends, one.estimate)]
        return {"zero": at[0], "from": at[1], "width": round(at[2] - at[1], 1), "at": at[3]}


@dataclass(frozen=True)
class Overview:
    """The first screen of one run."""

    run: str
    models: Sequence[ModelName]
    verdicts: Sequence[Verdict]
    keys: Sequence[Key]

    def verdict_on(self, claim: str) -> Verdict | None:
        """The verdict on a claim; None if the run has none."""
        return next((one for one in self.verdicts if one.claim == claim), None)


def overview(run: RunContents) -> Overview:
    """What the first screen says about a run."""
    return Overview(
        run.name, tuple(models_of(run)), list(run.verdicts().values()), list(_keys(run))[:_MOST_KEYS]
    )


def questions(runs: Sequence[RunContents]) -> list[str]:
    """What the runs ask, each question once."""
    return list(dict.fromkeys(_QUESTIONS[run.study] for run in runs if run.study in _QUESTIONS))


def models_of(run: RunContents) -> list[ModelName]:
    """The models that the settings of a run name."""
    config = run.config
    if run.is_demo:
        return [ModelName("the embedded model")]
    found = [_model(config.get(key)) for key in ("model", "against", "before", "after", "base")]
    several, checksums = config.get("models"), config.get("sha256")
    if isinstance(several, list):
        sums = (
            checksums
            if isinstance(checksums, list) and len(checksums) == len(several)
            else [""] * len(several)
        )
        found = [
            _model(one if isinstance(one, Mapping) else {"name": one, "sha256": checksum})
            for one, checksum in zip(several, sums, strict=True)
        ]
    return list(dict.fromkeys(one for one in found if one is not None))


def _model(value: Any) -> ModelName | None:
    if isinstance(value, str) and value:
        return ModelName(short_name(value))
    if isinstance(value, Mapping) and value.get("name"):
        return ModelName(short_name(value["name"]), str(value.get("sha256") or "")[:_CHECKSUM])
    return None


# long: one loop for every kind of result
def _keys(run: RunContents) -> Iterator[Key]:
    """The figures of a run, the one that matters most first."""
    if verdicts := run.verdicts():
        for claim in sorted(verdicts, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)):
            if not math.isnan(verdicts[claim].figure.estimate):
                yield Key(claim, verdicts[claim].figure, verdicts[claim].quantity, signed=True)
        return
    for found in run.all(Checkpoints).values():
        for quantity in QUANTITIES:
            last = found.values(quantity)[-1]
            yield Key(quantity, last, f"at {found.models[-1]}", signed=quantity in ("loss", "bias"))
    for evaluation in run.all(Evaluation).values():
        yield from _of_evaluation(evaluation)
    for judge, ratings in run.ratings().items():
        for model in ratings.models:
            yield Key(model, ratings.mean(model=model), f"mean rating by {judge}, 1 to 10")
    for grid in [*run.grids(steered=False).values(), *run.grids(steered=True).values()]:
        for panel in needle_panels(grid, grid.scores[0]) if grid.scores else ():
            mean = grid.mean(grid.recall(grid.scores[0], **panel.rows))
            yield Key(panel.condition, mean, f"{COLUMNS[grid.scores[0]]}, {panel.key['model']}")
    for found in run.all(Drift).values():
        yield _of_drift(found)
    for found in run.all(HeadMap).values():
        yield _of_heads(found)
    for model, parts in run.allocations().items():
        for condition, one in parts.items():
            share = float(mean_over_queries(one.share("user")).mean())
            yield Key(
                condition, Interval(share, math.nan, math.nan, 0), f"user's share of attention, {model}"
            )
    for _, _, selection in run.scored():
        if selection is not None:
            share = float(selection.frame["selected"].mean())
            yield Key("selected", Interval(share, math.nan, math.nan, len(selection)), "share of the turns")


def _of_drift(drift: Drift) -> Key:
    """The change of the user's share, a mean over layers and heads, without sinks if they were measured."""
    first, second = drift.sides
    view = choose_view([drift])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a conversation may have no share in any head
        changes = np.nanmean(drift.difference("user", view).effects, axis=(1, 2))
    change = bootstrap_mean(changes, clusters=drift.contexts)
    return Key("user", change, f"user's share of attention, {second} minus {first}, {view}", signed=True)


def _of_heads(found: HeadMap) -> Key:
    """The head that stands out most in a map."""
    layer, head = found.ranking(ascending=found.kind in ABLATIONS)[0]
    low, high = (float(bound[layer, head]) for bound in found.interval())
    estimate = float(found.values[layer, head])
    n_heads, n_texts = found.values.size, len(set(found.contexts.tolist()))
    quantity = f"{NAMES.get(found.kind, found.kind)}: the first of {n_heads} heads, picked on the same texts"
    signed = found.kind not in POSITIVE
    return Key(f"head {layer}.{head}", Interval(estimate, low, high, n_texts), quantity, signed=signed)


def _of_evaluation(evaluation: Evaluation) -> Iterator[Key]:
    for task, metric, variant in evaluation.rows():
        if metric == (evaluation.metrics(task) or [""])[0]:
            yield Key(
                variant[1],
                evaluation.mean(task, metric, variant),
                f"{metric} on {task}, {short_name(variant[0])}",
            )


__all__ = ["Key", "ModelName", "Overview", "models_of", "overview", "questions"]
