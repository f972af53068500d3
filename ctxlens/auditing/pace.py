"""How an audit keeps its budget when the machine turns out slower than it was when its speed was measured.

What is measured comes in groups of texts. Before each group the time that is left is divided over the work
that is left, at the speed seen so far. If it does not suffice, fewer texts are measured, down to the number
that can still decide; if even that does not fit, the cause is left out, then the controls. The rule looks at
the clock alone and never at a result.
"""

from __future__ import annotations

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
        """Whether a stage is left out, because it no longer fits with the fewest texts that are worth it."""
        for name in ("cause", "controls"):
            remaining = [stage, *self.later(stage)]
            needed = sum(self._least(one) for one in remaining if one not in self.left_out)
            if name in remaining and self.spent + self.slowness * needed > self.budget:
                self.left_out.append(name)
        self.keep()
        return stage in self.left_out

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
        left = planned * (1 - done / n_texts)
        rest = self.slowness * (left + sum(self.plan.seconds[name] for name in self.later(stage)))
        share = 1.0 if rest <= 0 else min(1.0, max(0.0, self.budget - self.spent) / rest)
        return done + min(GROUP, n_texts - done) <= done + (n_texts - done) * share + 1e-9

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
