"""A judge's ratings of models' answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ctxlens.results.tables import _Table
from ctxlens.stats import Interval, PairedComparison, bootstrap_mean, compare_pairs

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Ratings(_Table):
    """A judge's ratings, one row per answer.

    Columns: `model`, `question_id`, `category`, `turn` (from 1), `score` (1 to 10; NaN if the judge gave no
    rating) and `error` (why there is no rating; empty if there is one). Questions are the units of all
    intervals, because the turns of one conversation are not independent.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = ("model", "question_id", "category", "turn", "score", "error")

    @property
    def models(self) -> list[str]:
        """The models, in the order of the rows."""
        return list(dict.fromkeys(self.frame["model"]))

    @property
    def unrated(self) -> pd.DataFrame:
        """The rows without a rating. No mean includes them."""
        return self.frame[self.frame["score"].isna()]

    def mean(self, **values: Any) -> Interval:
        """Mean rating of the rows whose columns hold these values, with an interval over questions."""
        rows = self.where(**values).frame
        return bootstrap_mean(rows["score"], clusters=rows["question_id"])

    def compare(self, first: str, second: str, **values: Any) -> PairedComparison:
        """Second model minus first over the answers that both have a rating for, with questions as units."""
        rows = self.where(**values).frame
        wide = rows.pivot_table(index=["question_id", "turn"], columns="model", values="score", dropna=False)
        wide = wide.reindex(columns=[first, second])
        return compare_pairs(wide[first], wide[second], clusters=wide.index.get_level_values("question_id"))

    def differences(self) -> list[dict[str, Any]]:
        """Every other model compared with the first, in the form of `compare`."""
        first, *others = self.models
        found = []
        for other in others:
            pair = self.compare(first, other)
            found.append(
                {
                    "first": first, "second": other, **pair.difference.as_dict(), "p_value": pair.p_value,
                    "pairs": pair.pairs, "reading": pair.reading,
                }
            )  # fmt: skip
        return found

    def summary(self) -> list[dict[str, Any]]:
        """Means with intervals and counts by model, category and turn; `all` stands for every one of them."""
        found = []
        for model in self.models:
            of_model = self.where(model=model)
            turns = sorted(of_model.frame["turn"].unique())
            categories = list(dict.fromkeys(of_model.frame["category"]))
            for category in ("all", *categories):
                for turn in ("all", *(int(turn) for turn in turns)):
                    chosen = {
                        key: value
                        for key, value in {"category": category, "turn": turn}.items()
                        if value != "all"
                    }
                    rows = of_model.where(**chosen)
                    if len(rows):
                        found.append(
                            {
                                "model": model, "category": category, "turn": turn,
                                **rows.mean().as_dict(), "unrated": len(rows.unrated),
                            }
                        )  # fmt: skip
        return found
