"""Results of experiments on heads: a number for each head, and curves over sets of heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from ctxlens.errors import InputError
from ctxlens.results.arrays import _load_arrays, _save_arrays
from ctxlens.results.shown import Shown, count, join_names
from ctxlens.results.tables import _Table
from ctxlens.stats import Interval

if TYPE_CHECKING:
    import pandas as pd

N_RESAMPLES = 2000


@dataclass(frozen=True, repr=False)
class HeadMap(Shown):
    """One number for every head and cell, such as the effect on the needle of switching the head off.

    Attributes:
        effects: the number, by cell; NaN where a cell has none.
        contexts: which text each cell is made from. Cells of one text are not independent, so texts are the
            units of intervals.
        kind: what the number is: `zero`, `mean`, `blind` (ablations), `steer`, `gradient`, `copying`,
            `user share`.
        meta: model, condition, `quantity` (the number in words, with its unit), and further entries of the
            study.
    """

    NATIVE: ClassVar[str] = ".safetensors"
    effects: Float[np.ndarray, "cell layer head"]
    contexts: Int[np.ndarray, " cell"]
    kind: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> Float[np.ndarray, "layer head"]:
        """The mean over cells."""
        return _mean(self.effects, np.ones((1, len(self.effects))))[0]

    def interval(
        self, *, seed: int = 0, level: float = 0.95
    ) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"]]:
        """Lower and upper bound of the mean: percentile bootstrap over contexts; NaN for a single context."""
        if len(set(self.contexts.tolist())) < 2:
            nothing = np.full(self.effects.shape[1:], np.nan)
            return nothing, nothing
        draws = _mean(self.effects, draw_weights(self.contexts, seed=seed))
        low, high = np.nanquantile(draws, ((1 - level) / 2, (1 + level) / 2), axis=0)
        return low, high

    def of_contexts(self, contexts: Collection[int]) -> HeadMap:
        """Only the cells of these contexts."""
        keep = np.isin(self.contexts, list(contexts))
        return replace(self, effects=self.effects[keep], contexts=self.contexts[keep])

    def decided(self, *, seed: int = 0) -> Bool[np.ndarray, "layer head"]:
        """Where the 95 % interval excludes zero."""
        low, high = self.interval(seed=seed)
        return (low > 0) | (high < 0)

    def ranking(self, *, ascending: bool = False) -> tuple[tuple[int, int], ...]:
        """All heads as pairs of layer and head, the one with the largest (or smallest) number first."""
        values = self.values
        keys = np.nan_to_num(values if ascending else -values, nan=np.inf).ravel()
        order = np.argsort(keys, kind="stable")
        return tuple((int(i) // values.shape[1], int(i) % values.shape[1]) for i in order)

    def to_frame(self) -> pd.DataFrame:
        """One row per head: `layer` (from 0), `head`, `value` (mean over cells), `low`, `high` (95 %)."""
        import pandas as pd

        low, high = self.interval()
        layers, heads = np.indices(self.values.shape)
        columns = {"layer": layers, "head": heads, "value": self.values, "low": low, "high": high}
        return pd.DataFrame({name: column.ravel() for name, column in columns.items()})

    def describe(self) -> str:
        """What the number is, and of how many heads and cells."""
        cells, layers, heads = self.effects.shape
        texts = count(len(set(self.contexts.tolist())), "text")
        size = f"{count(layers, 'layer')} × {count(heads, 'head')}"
        return f"{size}, {self.kind}, {count(cells, 'cell')} of {texts}"

    def write(self, path: str | Path) -> None:
        """Write as safetensors."""
        arrays = {"effects": self.effects, "contexts": self.contexts}
        _save_arrays(path, self, arrays, {"kind": self.kind})

    @classmethod
    def load(cls, path: str | Path) -> HeadMap:
        """Read what `save` has written; raises `InputError` on anything else."""
        arrays, labels, meta = _load_arrays(path, cls.__name__)
        return cls(arrays["effects"], arrays["contexts"], labels["kind"], meta)


def draw_weights(
    contexts: Int[np.ndarray, " cell"], *, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "draw cell"]:
    """How often each cell occurs in each bootstrap sample; whole contexts are drawn."""
    _, index = np.unique(contexts, return_inverse=True)
    n = int(index.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    return drawn[:, index].astype(float)


def _mean(effects: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means over cells, `[draw, layer, head]`; NaN cells are skipped."""
    flat = effects.reshape(len(effects), -1).astype(float)
    known = ~np.isnan(flat)
    counts = weights @ known
    sums = weights @ np.where(known, flat, 0.0)
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return means.reshape(len(weights), *effects.shape[1:])


def correlate_maps(
    first: HeadMap, second: HeadMap, *, rank: bool = False, seed: int = 0, level: float = 0.95
) -> Interval:
    """Pearson's (or Spearman's rank) correlation of two maps over heads, with a bootstrap over contexts.

    Both maps must be of the same cells; each bootstrap sample draws the same contexts for both. `n` is the
    number of contexts.

    Raises:
        InputError: the maps differ in cells or heads.
    """
    if first.effects.shape != second.effects.shape or not np.array_equal(first.contexts, second.contexts):
        raise InputError(
            "only maps of the same cells and heads can be correlated; got [cell, layer, head] "
            f"{list(first.effects.shape)} and {list(second.effects.shape)}."
        )
    n = len(set(first.contexts.tolist()))
    weights = np.concatenate([np.ones((1, len(first.contexts))), draw_weights(first.contexts, seed=seed)])
    a, b = (_mean(one.effects, weights).reshape(len(weights), -1) for one in (first, second))
    if rank:
        from scipy.stats import rankdata

        a, b = rankdata(a, axis=1), rankdata(b, axis=1)
    a, b = (one - one.mean(1, keepdims=True) for one in (a, b))
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    found = np.divide((a * b).sum(1), size, out=np.full(len(size), np.nan), where=size > 0)
    draws = found[1:][~np.isnan(found[1:])]
    if n < 2 or not len(draws):
        return Interval(float(found[0]), float("nan"), float("nan"), n)
    low, high = np.quantile(draws, ((1 - level) / 2, (1 + level) / 2))
    return Interval(float(found[0]), float(low), float(high), n)


@dataclass(frozen=True, repr=False)
class HeadCurves(_Table):
    """The effect of acting on the first k heads of a ranking, one row per ranking, k, random draw and cell.

    Columns: `ranking` (what the heads are ranked by; `random`: a random order), `k`, `draw` (number of the
    random draw, otherwise 0), `cell`, `context`, `effect` (change from the unmodified model; there is no row
    for k = 0). `meta` holds model, condition, `action` (`steer`, `zero`, `mean`, `blind`), `alpha`,
    `quantity` and the `rankings` themselves.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = ("ranking", "k", "draw", "cell", "context", "effect")

    def describe(self) -> str:
        """Number of rows, rankings and sizes."""
        rankings = join_names(self.frame["ranking"])
        return f"{count(len(self.frame), 'row')}, rankings {rankings}, {count(len(self.sizes), 'size')}"

    @property
    def sizes(self) -> list[int]:
        """The numbers of heads, in ascending order."""
        return sorted(int(k) for k in self.frame["k"].unique())

    def points(self, ranking: str) -> list[tuple[int, Interval]]:
        """Mean effect by k, with an interval over contexts, or over draws for `random`.

        The interval of a random curve says how much sets of that size differ in their means over cells.
        """
        from ctxlens.stats import bootstrap_mean, t_interval

        rows = self.frame[self.frame["ranking"] == ranking]
        found = []
        for k in sorted(rows["k"].unique().tolist()):
            at = rows[rows["k"] == k]
            if ranking == "random":
                found.append((k, t_interval(at.groupby("draw")["effect"].mean().to_numpy())))
            else:
                found.append((k, bootstrap_mean(at["effect"].to_numpy(), clusters=at["context"])))
        return found

    def against_random(self, ranking: str, k: int) -> Interval:
        """Mean effect of a ranking's first k heads minus that of k random ones, paired by cell."""
        from ctxlens.stats import bootstrap_mean

        at = self.frame[self.frame["k"] == k]
        cells = at.groupby(["ranking", "cell"])["effect"].mean()
        contexts = at.drop_duplicates("cell").set_index("cell")["context"]
        if not {ranking, "random"} <= set(at["ranking"]):
            raise InputError(f"no {ranking} and random curve at {k} heads; sizes are {self.sizes}.")
        difference = (cells[ranking] - cells["random"]).dropna()
        return bootstrap_mean(difference.to_numpy(), clusters=contexts.loc[difference.index].to_numpy())


__all__ = ["HeadCurves", "HeadMap", "correlate_maps", "draw_weights"]
