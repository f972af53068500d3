"""The plan of an audit: which lengths, how many texts and which stages fit the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ctxlens.auditing.speed import Speed
from ctxlens.chat.condition import Condition, parse_conditions
from ctxlens.errors import InputError

FEW_FACTS, MANY_FACTS = 4, 8
"""Facts, and so questions, in a text: four in short texts, eight from `ROOMY` tokens on."""
ROOMY = 500
SPREAD = 0.58
"""Standard deviation over questions of recall with the template minus without, about what small chat models
show; over texts it is this divided by the root of the number of facts in a text."""
CONDITIONS = parse_conditions("plain+prefix,template+prefix")
"""What is compared: the same weights and texts without and with the chat template."""
LADDER = (250, 500, 750, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 12000, 16000, 24000, 32000, 64000, 128000)
"""Context lengths to choose from, in tokens."""
LEAST_TEXTS, MOST_TEXTS = 20, 80
"""Texts of each length. Half of them judge the cause, which needs ten. Twenty texts of eight facts tell a
difference to about 0.09, so that no loss can be told from a loss of 0.10."""
FEW_TEXTS = 12
"""Texts of each length where even the audit without the cause does not fit with more."""
ROLE_TEXTS, ROLE_LENGTH = 12, 2000
"""Texts whose attention by role is read, and their greatest length in tokens."""
ALPHAS = (0.5, 0.2, 0.07)
"""Steering strengths to choose from, on one half of the texts."""
DRAWS = 2
"""Random sets of heads."""
SHORT_ENOUGH = 1000
"""A plan that leaves stages out is preferred only if the complete one stays below this length."""
_SPARE = 0.9
"""The part of the budget that is planned; loading and the report take the rest."""
_READ_ROLES = 1.25
"""Time of reading attention by role with sinks, in readings."""


@dataclass(frozen=True)
class Plan:
    """What an audit does.

    Attributes:
        lengths: context lengths in tokens, ascending; the verdicts are about the longest.
        n_texts: texts of each length.
        facts: facts in every text, by length.
        detail_length: the length at which controls and cause are measured, one of `lengths`.
        controls: further conditions at that length.
        role_length: length of the texts whose attention by role is read.
        role_texts: number of these texts.
        alphas: steering strengths to choose from; empty: the cause is not asked for.
        draws: random sets of heads.
        seconds: expected seconds by stage.
        left_out: what the budget leaves out, one sentence each.
    """

    lengths: tuple[int, ...]
    n_texts: int
    facts: tuple[int, ...]
    detail_length: int
    controls: tuple[Condition, ...]
    role_length: int
    role_texts: int
    alphas: tuple[float, ...]
    draws: int
    seconds: Mapping[str, float]
    left_out: tuple[str, ...] = ()

    @property
    def total_seconds(self) -> float:
        """Expected seconds of all stages."""
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {**asdict(self), "controls": [condition.name for condition in self.controls]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that `as_dict` has described."""
        lengths = tuple(values["lengths"])
        earlier = {"facts": (FEW_FACTS,) * len(lengths), "detail_length": lengths[-1]}
        values = {**earlier, **values}
        tuples = {name: tuple(values[name]) for name in ("lengths", "facts", "alphas", "left_out")}
        return cls(**{**values, **tuples, "controls": tuple(map(Condition.parse, values["controls"]))})


@dataclass(frozen=True)
class Frame:
    """What a plan has to fit into.

    Attributes:
        speed: the measured speed.
        budget: seconds for everything that is planned.
        longest: the longest context that window and memory hold.
        overhead: tokens that a prompt has beside its context.
        models: how many models are measured for loss and bias.
        controls: the controls that this model's template and tokenizer allow.
        n_facts: how many facts there are to choose from.
    """

    speed: Speed
    budget: float
    longest: int
    overhead: int = 0
    models: int = 1
    controls: tuple[Condition, ...] = ()
    n_facts: int = MANY_FACTS

    def facts(self, length: int) -> int:
        """Facts in a text of this many tokens."""
        return MANY_FACTS if length >= ROOMY and self.n_facts >= MANY_FACTS else FEW_FACTS

    def text(self, length: int) -> float:
        """Seconds for a text of this many tokens with all its questions."""
        return self.speed.text(length + self.overhead, self.facts(length))

    def seconds(self, plan: Plan) -> dict[str, float]:
        """Expected seconds of a plan, by stage."""
        by_length = [self.text(length) for length in plan.lengths]
        at = self.text(plan.detail_length)
        half = plan.n_texts / 2
        steered = self.speed.steered * half * at
        roles = _READ_ROLES * self.speed.reading(plan.role_length + self.overhead)
        return {
            "loss": self.models * len(CONDITIONS) * plan.n_texts * sum(by_length),
            "controls": len(plan.controls) * plan.n_texts * at,
            "bias": self.models * len(CONDITIONS) * plan.role_texts * roles,
            "cause": steered * (2 * len(plan.alphas) + 3 + plan.draws) if plan.alphas else 0.0,
        }

    def plan(self, lengths: Sequence[int], n_texts: int, *, alphas: Sequence[float], draws: int,
             controls: bool = True, detail: int = 0, left_out: Sequence[str] = ()) -> Plan:  # fmt: skip
        """A plan with its expected times; controls and cause at length `detail`, by default the longest."""
        plan = Plan(
            lengths=tuple(lengths),
            n_texts=n_texts,
            facts=tuple(map(self.facts, lengths)),
            detail_length=detail or lengths[-1],
            controls=self.controls if controls else (),
            role_length=min(ROLE_LENGTH, lengths[-1]),
            role_texts=min(ROLE_TEXTS, n_texts),
            alphas=tuple(alphas),
            draws=draws,
            seconds={},
            left_out=tuple(left_out),
        )
        return replace(plan, seconds=self.seconds(plan))

    def fits(self, plan: Plan) -> bool:
        """Whether a plan stays within the budget."""
        return plan.total_seconds <= _SPARE * self.budget


_NO_CAUSE = "steering (the cause) is left out: it needs more time than the budget leaves"
_NO_CONTROLS = "the controls are left out: they need more time than the budget leaves"


def make_plan(frame: Frame, lengths: Sequence[int] | None = None) -> Plan:
    """Choose lengths and numbers of texts that keep the budget.

    The longest length for which the loss fits with texts enough to decide it comes first. Controls and cause
    are measured at the same length if that fits, and else at the longest one that fits, of 500 tokens or
    more. What time is left goes into a shorter length beside it and into more texts. Stages are left out only
    where the complete plan would not reach 1,000 tokens.

    Args:
        frame: speed, budget and window.
        lengths: lengths in tokens that the user wants; by default they are chosen. Controls and cause are
            measured at the longest that fits.

    Raises:
        InputError: not even the smallest plan fits the budget, or a length does not fit the window.
    """
    if lengths and max(lengths) > frame.longest:
        raise InputError(
            f"contexts of {max(lengths)} tokens do not fit: the window holds contexts of at most "
            f"{frame.longest}; give shorter --lengths."
        )
    plans = [plan for variant in _VARIANTS if (plan := _longest(frame, variant, lengths)) is not None]
    if not plans:
        smallest = frame.plan(sorted(lengths or LADDER[:1]), FEW_TEXTS, **_VARIANTS[-1][1])
        raise InputError(
            f"a budget of {frame.budget / 60:.0f} minutes is too small: the smallest audit of this model "
            f"takes about {smallest.total_seconds / 60 / _SPARE + 1:.0f} minutes here; give a larger --budget"
            + (" or shorter --lengths." if lengths else ".")
        )
    wanted = min(SHORT_ENOUGH, frame.longest)
    chosen = next((plan for plan in plans if plan.lengths[-1] >= wanted), max(plans, key=lambda p: p.lengths))
    return _fill(frame, chosen, fixed=lengths is not None)


_VARIANTS: tuple[tuple[int, dict[str, Any]], ...] = (
    (LEAST_TEXTS, {"alphas": ALPHAS, "draws": DRAWS}),
    (LEAST_TEXTS, {"alphas": ALPHAS[1:], "draws": 1}),
    (LEAST_TEXTS, {"alphas": (), "draws": 0, "left_out": (_NO_CAUSE,)}),
    (LEAST_TEXTS, {"alphas": (), "draws": 0, "controls": False, "left_out": (_NO_CAUSE, _NO_CONTROLS)}),
    (FEW_TEXTS, {"alphas": (), "draws": 0, "left_out": (_NO_CAUSE,)}),
    (FEW_TEXTS, {"alphas": (), "draws": 0, "controls": False, "left_out": (_NO_CAUSE, _NO_CONTROLS)}),
)
"""Numbers of texts and stages, from the complete audit to the smallest."""


def _longest(frame: Frame, variant: tuple[int, dict[str, Any]], lengths: Sequence[int] | None) -> Plan | None:
    """The plan of a variant with the longest length that fits, or None."""
    n_texts, options = variant
    if lengths:
        chosen = sorted(lengths)
        plans = [frame.plan(chosen, n_texts, detail=detail, **options) for detail in chosen]
        return next((plan for plan in reversed(plans) if frame.fits(plan)), None)
    steps = [length for length in LADDER if length < frame.longest] + [frame.longest]
    for at in range(len(steps) - 1, -1, -1):
        for detail in reversed([step for step in steps[:at] if step >= ROOMY] + [steps[at]]):
            both = sorted({detail, steps[at]})
            if frame.fits(plan := frame.plan(both, n_texts, detail=detail, **options)):
                return plan
    return None


def _fill(frame: Frame, plan: Plan, *, fixed: bool) -> Plan:
    """Use the time that is left: a quarter of the length beside the longest, then more texts."""

    def again(lengths: Sequence[int], n_texts: int) -> Plan:
        return frame.plan(
            lengths, n_texts, alphas=plan.alphas, draws=plan.draws, controls=bool(plan.controls),
            detail=plan.detail_length, left_out=plan.left_out,
        )  # fmt: skip

    best = plan
    if not fixed and len(plan.lengths) == 1 and plan.lengths[-1] >= 4 * LADDER[0]:
        wider = again([plan.lengths[-1] // 4, *plan.lengths], plan.n_texts)
        best = wider if frame.fits(wider) else best
    while best.n_texts + 2 <= MOST_TEXTS and frame.fits(more := again(best.lengths, best.n_texts + 2)):
        best = more
    return best


def tells(n_texts: int, facts: int) -> float:
    """About how far a difference of recall can be told, in each direction (half of its 95 % interval)."""
    return 1.96 * SPREAD / math.sqrt(facts * n_texts)


def describe_plan(plan: Plan) -> list[str]:
    """The plan in lines, for the terminal."""
    many = " and ".join(f"{length:,}" for length in plan.lengths)
    controls = ", ".join(condition.name for condition in plan.controls) or "none"
    minutes = {stage: f"{seconds / 60:.1f}" for stage, seconds in plan.seconds.items() if seconds}
    elsewhere = plan.detail_length != plan.lengths[-1] and bool(plan.controls or plan.alphas)
    lines = [
        f"{plan.n_texts} texts of {many} tokens, {plan.facts[-1]} facts in the longest: tells a change of "
        f"recall to about ±{tells(plan.n_texts, plan.facts[-1]):.2f}",
        f"controls: {controls}",
        f"attention by role on {plan.role_texts} texts of {plan.role_length:,} tokens",
        "steering: " + (", ".join(f"{alpha:g}" for alpha in plan.alphas) or "left out"),
        *([f"controls and steering at {plan.detail_length:,} tokens, for which the budget is enough"]
          if elsewhere else []),
        "expected minutes: " + ", ".join(f"{stage} {value}" for stage, value in minutes.items())
        + f"; together {plan.total_seconds / 60:.1f}",
    ]  # fmt: skip
    return [*lines, *plan.left_out]


__all__ = ["CONDITIONS", "FEW_TEXTS", "LEAST_TEXTS", "Frame", "Plan", "describe_plan", "make_plan", "tells"]
