"""A scored data set: what a threshold selects of it, and the turns to read. Nothing here knows of Dash."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxlens.errors import InputError
from ctxlens.explore.lab import Lab
from ctxlens.explore.state import DataPart
from ctxlens.report.plots.scores import selection_quality
from ctxlens.results import Scores, Selection
from ctxlens.scoring.card import rank_correlation
from ctxlens.scoring.layers import find_layer
from ctxlens.scoring.selection import LP_GAP, select_turns

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".parquet", ".jsonl")
MOST_UPLOAD = 5 * 2**20
"""The largest file of scores that may be loaded, in bytes; a request of the page carries it as text."""

MOST_UNPACKED = 2**28
"""The largest size in bytes of a loaded Parquet file when it is unpacked."""

MOST_ROWS = 400_000


@dataclass(frozen=True)
class ScoredSet:
    """Scores, and the conversations where they are known.

    Attributes:
        table: the scores.
        path: where the scores are, as commands take it.
        dataset: the scored data, as commands take them; None where they are not known.
        messages: the messages of each conversation by its id.
    """

    table: Scores
    path: str
    dataset: str | None = None
    messages: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def has_gap(self) -> bool:
        """Whether the scores hold `lp_gap`."""
        return LP_GAP in self.table.frame


@dataclass(frozen=True)
class Summary:
    """What a threshold does.

    Attributes:
        turns, selected: how many turns there are, and how many are selected.
        threshold: the threshold, in the units of the scores.
        precision, recall: against the labels; None where there are none.
        correlation: Spearman's correlation of score and context length; None where one does not vary.
    """

    turns: int
    selected: int
    threshold: float
    precision: float | None = None
    recall: float | None = None
    correlation: float | None = None


def scored_of(lab: Lab, part: DataPart) -> ScoredSet:
    """The scores that a person looks at.

    Raises:
        InputError: there are none, or the loaded file is not in memory any more.
    """
    if part.upload:
        found = lab.cache.get(f"scores-{part.upload}")
        if found is None:
            raise InputError("the loaded scores are not in memory any more; load the file again.")
        return found
    if lab.scored is None:
        raise InputError("there are no scores; start the explorer with --scores RUN, or load a file.")
    return lab.scored


def keep_upload(lab: Lab, raw: bytes, name: str) -> str:
    """Read a loaded file and keep it in the cache; returns its digest.

    Raises:
        InputError: another kind of file, one that is too large, or no scores.
    """
    shown = "".join(one for one in Path(name).name if one.isprintable())[:80] or "scores"
    if not shown.lower().endswith(SUFFIXES):
        raise InputError(f"{shown} is not a file of scores; load one that ends with .parquet or .jsonl.")
    if len(raw) > MOST_UPLOAD:
        raise InputError(
            f"{shown} has more than {MOST_UPLOAD // 2**20} MiB; start the explorer with --scores instead."
        )
    table = _read_parquet(raw, shown) if shown.lower().endswith(".parquet") else _read_lines(raw, shown)
    if table.frame.empty:
        raise InputError(f"{shown} holds no scored turns.")
    name = hashlib.sha256(raw).hexdigest()
    nbytes = int(table.frame.memory_usage(deep=True).sum())
    lab.cache.put(f"scores-{name}", ScoredSet(table, shown), nbytes)
    return name


def _read_parquet(raw: bytes, name: str) -> Scores:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        head = pq.ParquetFile(io.BytesIO(raw)).metadata
        groups = [head.row_group(i) for i in range(head.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError):
        raise InputError(f"{name} is not a Parquet file; load the scores.parquet of ctxlens score.") from None
    if head.num_rows > MOST_ROWS or sum(one.total_byte_size for one in groups) > MOST_UNPACKED:
        raise InputError(
            f"{name} is too large when it is unpacked; start the explorer with --scores instead."
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.parquet"
        path.write_bytes(raw)
        try:
            return _check(Scores.load(path), name)
        except InputError as error:
            raise InputError(str(error).replace(str(path), name)) from None
        except (pa.ArrowException, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"{name} does not hold scores; load the scores.parquet of ctxlens score."
            ) from None


def _read_lines(raw: bytes, name: str) -> Scores:
    try:
        rows = [json.loads(line) for line in raw.decode("utf-8-sig").splitlines() if line.strip()]
    except (ValueError, RecursionError):
        rows = []
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{name} is not a file of JSON lines, one scored turn and layer per line.")
    if missing := [key for key in Scores.COLUMNS if any(key not in row for row in rows)]:
        raise InputError(f"{name} lacks {', '.join(missing)} in a line; every line needs all of them.")
    return _check(Scores.from_rows(rows), name)


def _check(table: Scores, name: str) -> Scores:
    """Refuse a table whose columns do not hold what they should."""
    import pandas as pd

    frame = table.frame.copy()
    if len(frame) > MOST_ROWS:
        raise InputError(
            f"{name} has more than {MOST_ROWS:,} rows; start the explorer with --scores instead."
        )
    try:
        for column in ("turn", "layer", "context_tokens", "response_tokens"):
            frame[column] = pd.to_numeric(frame[column]).astype("int64")
        for column in (*Scores.REDUCTIONS, "uniform", *([LP_GAP] if LP_GAP in frame else [])):
            frame[column] = pd.to_numeric(frame[column]).astype(float)
    except (ValueError, TypeError):
        raise InputError(f"{name} holds something else than numbers in {column}.") from None
    frame["conversation"] = frame["conversation"].astype(str)
    if "kind" in frame:
        frame["kind"] = frame["kind"].map(lambda one: one if isinstance(one, str) else None)
    if frame.duplicated(["conversation", "turn", "layer"]).any():
        raise InputError(f"{name} has two rows for the same turn and layer.")
    return Scores(frame, dict(table.meta))


def options_of(scored: ScoredSet, part: DataPart) -> dict[str, Any]:
    """The choices as `select_turns` takes them.

    Raises:
        InputError: the rule for the layer finds none.
    """
    beta: float | str = part.rule if part.rule != "beta" else part.nats if is_gap(part) else part.beta
    options: dict[str, Any] = {"beta": beta, "reduction": part.reduction}
    if part.reduction != LP_GAP:
        options["layer"] = (
            find_layer(scored.table, "middle", reduction=part.reduction) if part.layer is None else part.layer
        )
    return options


def is_gap(part: DataPart) -> bool:
    """Whether the scores are `lp_gap`, whose threshold is in nats per token."""
    return part.reduction == LP_GAP


def select(scored: ScoredSet, part: DataPart) -> Selection:
    """What is selected, by the function of `ctxlens select`.

    Raises:
        InputError: the layer or reduction was not scored.
    """
    return select_turns(scored.table, **options_of(scored, part))


def summarise(scored: ScoredSet, chosen: Selection) -> Summary:
    """Count, quality and correlation with length of a selection."""
    rows = turns_of(scored, chosen)
    quality = selection_quality(scored.table, chosen)
    known = rows["score"].notna()
    return Summary(
        turns=len(rows),
        selected=int(rows["selected"].sum()),
        threshold=float(chosen.meta["threshold"]),
        precision=None if quality is None or math.isnan(quality.precision) else quality.precision,
        recall=None if quality is None or math.isnan(quality.recall) else quality.recall,
        correlation=rank_correlation(rows["score"][known], rows["context_tokens"][known]),
    )


def turns_of(scored: ScoredSet, chosen: Selection) -> pd.DataFrame:
    """One row per turn: those of the selection, with the lengths of context and response."""
    more = scored.table.frame.drop_duplicates(["conversation", "turn"])
    names = ["conversation", "turn", "context_tokens", "response_tokens"]
    if "kind" in more and "kind" not in chosen.frame:
        names.append("kind")
    return chosen.frame.merge(more[names], on=["conversation", "turn"], how="left")


def nearest(rows: pd.DataFrame, threshold: float, n: int) -> list[int]:
    """The rows whose scores are nearest to the threshold, half of them on each side, highest first."""
    column = rows["score"].dropna()
    above = column[column > threshold].nsmallest(n // 2)
    below = column[column <= threshold].nlargest(n - len(above))
    return [*above.index[::-1], *below.index]


def selection_bytes(chosen: Selection) -> bytes:
    """The file `selection.parquet` that `ctxlens select` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "selection.parquet"
        chosen.write(path)
        return path.read_bytes()


__all__ = [
    "MOST_UPLOAD",
    "SUFFIXES",
    "ScoredSet",
    "Summary",
    "is_gap",
    "keep_upload",
    "nearest",
    "options_of",
    "scored_of",
    "select",
    "selection_bytes",
    "summarise",
    "turns_of",
]
