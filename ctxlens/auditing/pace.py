"""How an audit keeps its budget when the machine turns out slower than it was when its speed was measured.

What is measured comes in groups of texts. Before each group the time that is left is compared with the work
that is left, at the speed seen so far. If it does not suffice, fewer texts are measured, down to the number
that can still decide. The loss comes first: it gets all its texts if they fit, whatever remains for controls
and cause. Whether these two are left out is decided when their turn comes, because a machine that was busy
may be idle again. The rule looks at the clock alone and never at a result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ctxlens.auditing.plan import FEW_TEXTS, LEAST_TEXTS, Plan
from ctxlens.runs import Run

PACE = "pace.json"
GROUP = 4
"""Texts that are measured before the clock is looked at again."""
LEAST: dict[str, int] = {"loss": FEW_TEXTS, "controls": FEW_TEXTS, "cause": LEAST_TEXTS}
"""The fewest texts with which a stage is worth its time; the loss is measured in any case."""
LEFT_OUT: dict[str, str] = {
    "cause": "steering (the cause) is left out: the machine was slower than planned, and the time is used up",
    "controls": "the controls are left out: the machine was slower than planned, and the time is used up",
}


@dataclass
class Pace:
    """The clock of one audit; the time of earlier, interrupted starts counts.

    Attributes:
        run: the run folder, where the time that is spent is kept.
        plan: the plan.
        budget: seconds for everything.
        clock: gives seconds.
        already: seconds that this start has taken before.
    """

    run: Run
    plan: Plan
    budget: float
    clock: Callable[[], float] = time.monotonic
    already: float = 0.0
    slowness: float = field(init=False)
    left_out: list[str] = field(init=False)
    _before: float = field(init=False)
    _begun: float = field(init=False)
    _texts: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        known = self.run.read_json(PACE) if self.run.has(PACE) else {}
        self._before, self._begun = float(known.get("spent", 0.0)) + self.already, self.clock()
        self.slowness = float(known.get("slowness", 1.0))
        self.left_out = list(known.get("left_out", []))
        self._texts = dict(known.get("texts", {}))

    @property
    def spent(self) -> float:
        """Seconds that the audit has taken so far."""
        return self._before + self.clock() - self._begun

    def keep(self) -> None:
        """Write down what is spent and decided, for a start after an interruption."""
        state = {
            "spent": self.spent,
            "slowness": self.slowness,
            "left_out": self.left_out,
            "texts": self._texts,
        }
        self.run.write_json(PACE, state)

    def later(self, stage: str) -> list[str]:
        """The stages after this one that are planned and not left out."""
        names = list(self.plan.seconds)
        after = names[names.index(stage) + 1 :] if stage in names else []
        return [name for name in after if self.plan.seconds[name] and name not in self.left_out]

    def skips(self, stage: str) -> bool:
        """Whether a stage is left out, because it does not fit with the fewest texts that are worth it."""
        needed = self._least(stage) + self._always(stage)
        if stage in LEFT_OUT and stage not in self.left_out and not self._fits(needed):
            self.left_out.append(stage)
        self.keep()
        return stage in self.left_out

    def _fits(self, planned: float) -> bool:
        """Whether work that is planned to take so many seconds fits the budget at the speed seen so far."""
        return self.spent + self.slowness * planned <= self.budget + 1e-9

    def _always(self, stage: str) -> float:
        """Planned seconds of the later stages that are measured in any case."""
        return math.fsum(self.plan.seconds[one] for one in self.later(stage) if one not in LEFT_OUT)

    def _reserved(self, stage: str) -> float:
        """Planned seconds that a stage leaves for later ones.

        The loss leaves none for the stages that can be left out; others leave what those need at least that
        still fit.
        """
        reserved = self._always(stage)
        for one in self.later(stage) if stage != "loss" else ():
            if one in LEFT_OUT and self._fits(reserved + self._least(one)):
                reserved += self._least(one)
        return reserved

    def _least(self, stage: str) -> float:
        """Planned seconds of a stage with its fewest texts."""
        least = LEAST.get(stage, self.plan.n_texts)
        return self.plan.seconds.get(stage, 0.0) * min(1.0, least / self.plan.n_texts)

    def most_texts(self, part: str, n_texts: int) -> int:
        """Texts of a part that may be measured: no more than the first model has got of it."""
        return min(n_texts, self._texts.get(part, n_texts))

    def goes_on(self, stage: str, planned: float, done: int, n_texts: int, least: int) -> bool:
        """Whether another group of texts is measured.

        Args:
            stage: the stage.
            planned: planned seconds of all these texts.
            done: texts that are measured.
            n_texts: texts that are planned.
            least: texts that are measured in any case.
        """
        if done < least:
            return done < n_texts
        group = min(GROUP, n_texts - done)
        needed = planned * group / n_texts + self._reserved(stage)
        if stage == "loss" and "loss" not in self._texts:  # the other models get as many texts as the first
            needed += (self.plan.seconds["loss"] - planned) * (done + group) / n_texts
        return group > 0 and self._fits(needed)

    def measured(self, seconds: float, planned: float) -> None:
        """Take note of what a group took, and what it was planned to take."""
        if planned > 0 and seconds > 0:
            self.slowness = max(0.25, 0.5 * self.slowness + 0.5 * seconds / planned)
        self.keep()

    def finish(self, part: str, n_texts: int) -> None:
        """Take note of how many texts a part got in the end."""
        self._texts[part] = n_texts
        self.keep()

    def describe(self) -> list[str]:
        """What was cut and why, one sentence each."""
        said = [LEFT_OUT[name] for name in self.left_out]
        fewer = self._texts.get("loss", self.plan.n_texts)
        if fewer < self.plan.n_texts:
            said.insert(0, f"only {fewer} of {self.plan.n_texts} texts fitted the budget")
        return said


def group_texts(cases: Sequence[int]) -> list[list[int]]:
    """The numbers of texts in groups, in order."""
    texts = sorted(set(cases))
    return [texts[at : at + GROUP] for at in range(0, len(texts), GROUP)]


__all__ = ["GROUP", "LEAST", "LEFT_OUT", "Pace", "group_texts"]
