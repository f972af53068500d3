"""Checkpoints that were asked the same: loss, bias and recall of each, and what changed between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ctxlens.chat.roles import Role
from ctxlens.results.arrays import RoleAllocation
from ctxlens.results.audit import BIAS_MARGIN, LOSS_MARGIN, PLAIN, TEMPLATE
from ctxlens.results.claims import MIN_UNITS
from ctxlens.results.steps import steps_of
from ctxlens.results.tables import NeedleGrid, _Table
from ctxlens.results.verdicts import Verdict
from ctxlens.stats import Interval, bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd

QUANTITIES: Mapping[str, float] = {
    "recall without template": LOSS_MARGIN,
    "recall with template": LOSS_MARGIN,
    "loss": LOSS_MARGIN,
    "bias": BIAS_MARGIN,
}
"""What is compared; a change that is surely smaller than the margin (0 to 1) is none."""
OTHER_TEXTS = "other texts"
_NONE = Interval(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class Checkpoint:
    """One audited checkpoint.

    Attributes:
        name: its name.
        grid: its unsteered answers without and with the template.
        shares: its attention by role without and with the template, with sinks measured.
        verdicts: the answers of its audit.
    """

    name: str
    grid: NeedleGrid
    shares: tuple[RoleAllocation, RoleAllocation]
    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True, repr=False)
class Checkpoints(_Table):
    """Checkpoints side by side, one row per checkpoint and quantity, in the order of training.

    Columns: `model`; `step` and `unit` (NaN and empty where the names state no steps that can be compared);
    `quantity` (`recall without template`, `recall with template`, `loss`: with minus without template,
    `bias`: the same for the user's share of attention without sinks); `estimate`, `low`, `high`, `n` (over
    texts); `answer` (of the audit's question of this name, else empty); `change`, `change_low`,
    `change_high`, `change_n` (against the checkpoint before, paired by question or text; NaN for the first);
    `reading` (`higher`, `lower`, `no change`, `undecided`, or `other texts` where nothing can be paired).
    """

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "model", "step", "unit", "quantity", "estimate", "low", "high", "n", "answer",
        "change", "change_low", "change_high", "change_n", "reading",
    )  # fmt: skip

    @property
    def models(self) -> list[str]:
        """The checkpoints in the order of training."""
        return list(dict.fromkeys(self.frame["model"]))

    @property
    def steps(self) -> tuple[list[float], str] | None:
        """The steps of `models` and their unit; None if there are none that can be compared."""
        rows = self.frame.drop_duplicates("model")
        if rows["step"].isna().any():
            return None
        return rows["step"].astype(float).tolist(), str(rows["unit"].iloc[0])

    def values(self, quantity: str) -> list[Interval]:
        """A quantity at every checkpoint."""
        return [self._interval(row, "") for row in self._rows(quantity)]

    def changes(self, quantity: str) -> list[tuple[Interval, str]]:
        """The change of a quantity from each checkpoint to the next, and how it reads."""
        return [(self._interval(row, "change"), str(row["reading"])) for row in self._rows(quantity)[1:]]

    def answers(self, quantity: str) -> list[str]:
        """The audit's answer for a quantity at every checkpoint."""
        return [str(row["answer"]) for row in self._rows(quantity)]

    def overview(self) -> pd.DataFrame:
        """Estimates by checkpoint, one column per quantity."""
        table = self.frame.pivot(index="model", columns="quantity", values="estimate")
        return table.loc[self.models, list(QUANTITIES)].round(3).rename_axis(columns=None).reset_index()

    def _rows(self, quantity: str) -> list[dict[Any, Any]]:
        return self.frame[self.frame["quantity"] == quantity].to_dict(orient="records")

    @staticmethod
    def _interval(row: Mapping[Any, Any], prefix: str) -> Interval:
        names = (
            prefix or "estimate",
            *(f"{prefix}_{one}" if prefix else one for one in ("low", "high", "n")),
        )
        estimate, low, high, n = (float(row[name]) for name in names)
        return Interval(estimate, low, high, int(n))


def compare_checkpoints(
    found: Sequence[Checkpoint], meta: Mapping[str, Any] | None = None, *, with_first: bool = False
) -> Checkpoints:
    """Put checkpoints side by side and read what changed from each to the next.

    Args:
        found: the checkpoints in the order of training.
        meta: entries of the result's `meta`; `against` names the first with `with_first`.
        with_first: whether each is compared with the first instead of the one before it.
    """
    steps = steps_of([one.name for one in found])
    rows: list[dict[str, Any]] = []
    for number, one in enumerate(found):
        before = None if not number else found[0 if with_first else number - 1]
        words = {verdict.claim: verdict.word for verdict in one.verdicts}
        for quantity in QUANTITIES:
            value = _mean(one, quantity, _measure(one, quantity))
            change, reading = (_NONE, "") if before is None else change_between(before, one, quantity)
            rows.append({
                "model": one.name,
                "step": steps[number].number if steps else math.nan,
                "unit": steps[number].unit if steps else "",
                "quantity": quantity, **value.as_dict(), "answer": words.get(quantity, ""),
                "change": change.estimate, "change_low": change.low, "change_high": change.high,
                "change_n": change.n, "reading": reading,
            })  # fmt: skip
    return Checkpoints.from_rows(rows, meta)


def change_between(before: Checkpoint, after: Checkpoint, quantity: str) -> tuple[Interval, str]:
    """The change of a quantity between two checkpoints over what both were asked, and how it reads."""
    if not same_texts(before.grid, after.grid):
        return _NONE, OTHER_TEXTS
    change = (_measure(after, quantity) - _measure(before, quantity)).dropna()
    interval = _mean(after, quantity, change)
    return interval, read_change(interval, QUANTITIES[quantity])


def read_change(change: Interval, margin: float) -> str:
    """`higher` or `lower` if the interval excludes 0, `no change` if it excludes `margin`, else `undecided`.

    With fewer than `claims.MIN_UNITS` texts nothing is decided.
    """
    if change.n < MIN_UNITS or math.isnan(change.low) or math.isnan(change.high):
        return "undecided"
    if change.low > 0 or change.high < 0:
        return "higher" if change.low > 0 else "lower"
    return "no change" if -margin < change.low and change.high < margin else "undecided"


def same_texts(first: NeedleGrid, second: NeedleGrid) -> bool:
    """Whether the cells that two grids share hold the same fact in a text of the same tokens."""
    columns = ["needle", "context_tokens", "prompt_tokens"]
    both = [grid.where(condition=PLAIN).frame.set_index("cell")[columns] for grid in (first, second)]
    shared = both[0].index.intersection(both[1].index)
    return len(shared) > 0 and bool((both[0].loc[shared] == both[1].loc[shared]).all(axis=None))


def _measure(one: Checkpoint, quantity: str) -> pd.Series:
    """A quantity by question, or by text for the bias."""
    if quantity == "bias":
        return _user_shares(one.shares[1]) - _user_shares(one.shares[0])
    at = one.grid.where(context_tokens=int(one.grid.frame["context_tokens"].max()))
    plain, template = at.recall(condition=PLAIN), at.recall(condition=TEMPLATE)
    if quantity == "loss":
        return template - plain
    return plain if quantity == "recall without template" else template


def _mean(one: Checkpoint, quantity: str, values: pd.Series) -> Interval:
    """The mean with its interval over texts."""
    return bootstrap_mean(values) if quantity == "bias" else one.grid.mean(values)


def _user_shares(allocation: RoleAllocation) -> pd.Series:
    """The user's share of attention without sinks and template tokens, by text."""
    import pandas as pd

    shares = allocation.without_sinks().renormalised().share(Role.USER)
    return pd.Series(np.nanmean(shares, axis=(0, 1)), index=list(allocation.query_labels))


__all__ = [
    "QUANTITIES", "Checkpoint", "Checkpoints", "change_between", "compare_checkpoints", "read_change",
]  # fmt: skip
