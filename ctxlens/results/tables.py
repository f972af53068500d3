"""Results that are tables: one row per unit, each saved as a Parquet file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np

from ctxlens.errors import InputError
from ctxlens.results.files import META_KEY, check_record, make_record, read_file
from ctxlens.results.shown import Shown, count, join_names
from ctxlens.stats import Interval, PairedComparison, bootstrap_mean, compare_pairs

if TYPE_CHECKING:
    import pandas as pd

_T = TypeVar("_T", bound="_Table")
ClusterBy = Literal["context", "length"]


@dataclass(frozen=True, repr=False)
class _Table(Shown):
    """A result that is a table: one row per unit, named columns, and `meta`."""

    frame: pd.DataFrame
    meta: Mapping[str, Any] = field(default_factory=dict)

    NATIVE: ClassVar[str] = ".parquet"
    COLUMNS: ClassVar[tuple[str, ...]] = ()
    """The required columns; a table may have more."""
    COUNTED: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Columns whose distinct values `describe` counts, each with a noun."""

    def __post_init__(self) -> None:
        missing = [name for name in self.COLUMNS if name not in self.frame.columns]
        if missing:
            raise InputError(
                f"{type(self).__name__} needs the columns {', '.join(self.COLUMNS)}; "
                f"{', '.join(missing)} missing among {', '.join(map(str, self.frame.columns)) or 'none'}."
            )

    @classmethod
    def from_rows(
        cls: type[_T], rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any] | None = None
    ) -> _T:
        """Build the table from one mapping per row."""
        import pandas as pd

        frame = pd.DataFrame(list(rows)) if rows else pd.DataFrame(columns=list(cls.COLUMNS))
        return cls(frame, dict(meta or {}))

    @classmethod
    def concat(cls: type[_T], tables: Sequence[_T]) -> _T:
        """Concatenate the rows of tables; the `meta` is that of the first."""
        import pandas as pd

        return cls(pd.concat([table.frame for table in tables], ignore_index=True), tables[0].meta)

    def where(self: _T, **values: Any) -> _T:
        """The rows whose columns hold these values."""
        keep = np.ones(len(self.frame), dtype=bool)
        for name, value in values.items():
            keep &= (self.frame[name] == value).to_numpy()
        return replace(self, frame=self.frame[keep].reset_index(drop=True))

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table; the class names its columns."""
        return self.frame.copy()

    def describe(self) -> str:
        """Number of rows, and whose they are."""
        found = [count(len(self.frame), "row")]
        if not len(self.frame):
            return found[0]
        named = [name for name in ("model", "condition", "task") if name in self.frame]
        found += [f"{name} {join_names(self.frame[name])}" for name in named]
        return ", ".join(found + [count(self.frame[name].nunique(), noun) for name, noun in self.COUNTED])

    def __len__(self) -> int:
        return len(self.frame)

    def write(self, path: str | Path) -> None:
        """Write the table as Parquet, `meta` in the file's schema metadata."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pandas(self.frame, preserve_index=False)
        metadata = {**(table.schema.metadata or {}), META_KEY.encode(): make_record(self).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), path)

    @classmethod
    def load(cls: type[_T], path: str | Path) -> _T:
        """Read a table that `save` has written.

        Raises:
            InputError: there is no such file, or it is not a result of this type.
        """
        import pyarrow.parquet as pq

        table = read_file(path, pq.read_table)
        raw = (table.schema.metadata or {}).get(META_KEY.encode())
        return cls(table.to_pandas(), check_record(path, raw, cls.__name__)["meta"])


def name_length(built: int, requested: int) -> str:
    """A context length as built and, if it differs, as requested: `505 (512 requested)`."""
    return str(built) if built == requested else f"{built} ({requested} requested)"


@dataclass(frozen=True, repr=False)
class NeedleGrid(_Table):
    """Needle-in-a-haystack cells, one row per cell and condition.

    Columns: `model`; `condition` (`plain+prefix`, `template+prefix`, `template`, `assistant+prefix`);
    `indicator` (whether the indicator was given); `alpha` (1.0: not steered), `heads` (label of the
    steered heads, `none`, `all`, `retrieval`, `random`), `draw` (number of the random draw, otherwise 0);
    `cell` (the same text has the same number in every condition, so that conditions can be paired);
    `needle`; `context_tokens`, `depth_percent` (as requested); `prompt_tokens` (as built); `response`;
    `recall` (0 to 1); `memory_recall` (0 to 1, the keywords of what the model memorised; NaN if
    it has memorised nothing). Optional columns: `contains` (1: the response contains the answer verbatim),
    `needle_logprob` (nats per token of the answer), `built_context_tokens` and `built_depth_percent` (what
    was built for the requested length and depth) and `error` (why there is no answer, otherwise empty).
    If nothing was generated or the model failed, `response` is missing and the scores are NaN.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "model", "condition", "indicator", "alpha", "heads", "draw", "cell", "needle",
        "context_tokens", "prompt_tokens", "depth_percent", "response", "recall", "memory_recall",
    )  # fmt: skip

    COUNTED: ClassVar[tuple[tuple[str, str], ...]] = (("context_tokens", "length"), ("cell", "cell"))

    def overview(self) -> pd.DataFrame:
        """Mean of the first score by variant, one column per context length."""
        if not self.scores:
            return self.to_frame()
        asked = ["model", "condition", "indicator", "alpha", "heads"]
        means = self.frame.groupby([*asked, "context_tokens"], sort=False)[self.scores[0]].mean()
        return means.unstack().round(3).rename_axis(columns=None).reset_index()

    def recall(self, column: str = "recall", **values: Any) -> pd.Series:
        """Mean recall by cell among the rows that hold these values, so that conditions can be paired."""
        return self.where(**values).frame.groupby("cell")[column].mean()

    @property
    def scores(self) -> tuple[str, ...]:
        """The score columns that hold any value, among `recall`, `contains`, `needle_logprob`."""
        names = ("recall", "contains", "needle_logprob")
        return tuple(name for name in names if name in self.frame and self.frame[name].notna().any())

    @property
    def built_lengths(self) -> dict[int, int]:
        """The mean length of the contexts that were built for each requested length, in rounded tokens.

        Grids of earlier versions may not say what was built; it is then taken to be what was requested.
        """
        frame = self.frame.drop_duplicates("cell")
        built = frame["context_tokens" if "built_context_tokens" not in frame else "built_context_tokens"]
        built = built.fillna(frame["context_tokens"])
        means = built.groupby(frame["context_tokens"]).mean()
        return {int(length): round(mean) for length, mean in means.items()}  # pyright: ignore

    @property
    def failed(self) -> pd.DataFrame:
        """The rows on which the model failed; `error` says why. No mean includes them."""
        if "error" not in self.frame:
            return self.frame.iloc[:0]
        return self.frame[self.frame["error"].fillna("") != ""]

    @property
    def silent(self) -> pd.DataFrame:
        """The rows in which the model ended without any text. They count as recall 0."""
        return self.frame[self.frame["response"].str.strip() == ""]

    def contexts(self, cells: Collection[Any]) -> np.ndarray:
        """A number for the text around each cell's needle.

        Cells of one length and case have the same text with the needle at other depths. They are not
        independent, so texts are the units of intervals. Without a column `case`, each cell is its own unit.
        """
        return self._clusters(cells, "context")

    def _clusters(self, cells: Collection[Any], by: ClusterBy) -> np.ndarray:
        if by == "context" and "case" not in self.frame:
            return np.asarray(list(cells))
        rows = self.frame.drop_duplicates("cell").set_index("cell")
        columns = ["context_tokens", "case"] if by == "context" else ["context_tokens"]
        return rows.groupby(columns).ngroup().loc[list(cells)].to_numpy()

    def mean(self, values: pd.Series, *, cluster: ClusterBy = "context") -> Interval:
        """Mean of values by cell, such as those from `recall`, with an interval over contexts or lengths."""
        return bootstrap_mean(values, clusters=self._clusters(values.index, cluster))

    def difference(self, first: pd.Series, second: pd.Series, *, cluster: ClusterBy = "context") -> Interval:
        """Mean of `second - first` over the cells that both have, with an interval as in `mean`."""
        return self.mean((second - first).dropna(), cluster=cluster)

    def compare(
        self,
        first: Mapping[str, Any],
        second: Mapping[str, Any],
        *,
        column: str = "recall",
        cluster: ClusterBy = "context",
    ) -> PairedComparison:
        """Compare two treatments cell by cell, for instance two conditions or two models.

        Args:
            first: values of columns that choose the rows of one treatment, for instance
                `{"condition": "plain+prefix"}`.
            second: the same for the other treatment.
            column: what is compared: `recall`, `contains`, `needle_logprob`, `memory_recall`.
            cluster: the units of interval and test. `context`: all cells of one length and case, which share
                their text. `length`: all cells of one length, for claims about lengths other than those
                measured. With one case per length the two are the same. Single cells are never units,
                because depths of one text are not independent.

        Raises:
            InputError: the table has no such column.
        """
        if column not in self.frame:
            raise InputError(f"the needle grid has no column {column}; it was run without that score.")
        one, other = (self.recall(column, **dict(values)) for values in (first, second))
        cells = one.index.intersection(other.index)
        labels = self._clusters(cells, cluster)
        return compare_pairs(one[cells].to_numpy(), other[cells].to_numpy(), clusters=labels)

    def by(self, axis: Literal["length", "depth"], column: str = "recall", **values: Any) -> pd.DataFrame:
        """Mean at each context length or depth, with its 95 % interval over contexts.

        Args:
            axis: `length` (over depths) or `depth` (over lengths).
            column: what is averaged.
            **values: values of columns that choose rows.

        Returns:
            One row per length (in tokens, as requested) or depth (in percent): `mean`, `low`, `high`,
            `cells`. A length with one case has a single context and therefore no interval. The lengths that
            were built are in `built_lengths`.
        """
        import pandas as pd

        key = {"length": "context_tokens", "depth": "depth_percent"}[axis]
        chosen = self.where(**values)
        rows = []
        for at, part in chosen.frame.groupby(key):
            cells = part.groupby("cell")[column].mean().dropna()
            found = self.mean(cells)
            rows.append({key: at, "mean": found.estimate, "low": found.low, "high": found.high,
                         "cells": len(cells)})  # fmt: skip
        return pd.DataFrame(rows, columns=[key, "mean", "low", "high", "cells"])


@dataclass(frozen=True, repr=False)
class Ability(_Table):
    """Questions that need no context, one row per question: `recall` (0 to 1) of the answer's keywords."""

    COLUMNS: ClassVar[tuple[str, ...]] = ("model", "indicator", "question", "response", "recall")


@dataclass(frozen=True, repr=False)
class Selection(_Table):
    """Which turns were chosen as context-dependent: `conversation`, `turn`, `score`, `selected`.

    `meta` holds `threshold`, `rule` (how the threshold was found), `layer` and `reduction`.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = ("conversation", "turn", "score", "selected")

    def describe(self) -> str:
        """Number of turns, and how many are selected."""
        return f"{count(len(self.turns), 'turn')} of {len(self.frame):,} selected"

    @cached_property
    def turns(self) -> frozenset[tuple[str, int]]:
        """The chosen turns as pairs of conversation id and message index."""
        rows = self.frame[self.frame["selected"].astype(bool)]
        return frozenset(zip(rows["conversation"].astype(str), rows["turn"].astype(int), strict=True))
