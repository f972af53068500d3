"""Context-dependency scores: one row per turn and layer in memory, one row per turn on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Float

from ctxlens.chat.roles import Role
from ctxlens.errors import InputError
from ctxlens.results.arrays import LEAST_SHARE
from ctxlens.results.files import META_KEY, check_record, make_record, read_file
from ctxlens.results.tables import _Table

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Precision = Literal["float32", "float16"]
"""The number format in which scores are stored."""

SCHEMA_VERSION = 2
"""Version of the files that `Scores.save` writes; a file of another version is refused."""

SHARE_COLUMNS = tuple(f"share_{role.label}" for role in Role if role not in (Role.USER, Role.PAD))
"""Mean shares of all roles but the user's, whose mean share is `mean_heads`."""

RESTING_COLUMNS = tuple(f"resting_{role.label}" for role in Role if role is not Role.PAD)
"""The part of each role's mean share that rests on attention sinks of this role. Only scores that were made
with sinks have these columns."""

TURN_COLUMNS: Mapping[str, str] = {
    "conversation": "string", "turn": "int32", "uniform": "float32", "response_tokens": "int32",
    "context_tokens": "int32", "truncated": "bool",
}  # fmt: skip
"""The columns that each turn has once, and their types."""

LAYER_COLUMNS: Mapping[str, str] = {
    **dict.fromkeys(("best_of_mean", "mean_of_best", "mean_heads"), "score"),
    "best_head": "int16",
    **dict.fromkeys(SHARE_COLUMNS, "score"),
    **dict.fromkeys(RESTING_COLUMNS, "score"),
}
"""The columns that each turn has for every layer (lists on disk), and their types; `score`: the chosen
precision."""

_ROWS_AT_ONCE = 65536


@dataclass(frozen=True, repr=False)
class Scores(_Table):
    """Context-dependency scores, one row per assistant turn and layer.

    Columns: `conversation` (id), `turn` (index of the assistant message), `layer`; `best_of_mean`
    (user share of the head with the largest mean over the response), `mean_of_best` (the largest
    user share over heads, token by token, then the mean), `mean_heads`, all 0 to 1; `uniform` (the
    user share if attention were uniform); `response_tokens`, `context_tokens` (user tokens that the
    turn can see); `truncated`. `score_conversations` adds `best_head` (that of `best_of_mean`) and
    `share_<role>`, the mean over heads and response tokens of the other roles' shares: with
    `mean_heads` they sum to 1. Scores made with sinks also have `resting_<role>`, the part of each of these
    shares that rests on attention sinks (`without_sinks`). Labelled data also have `kind`.

    The file has one row per turn; the columns that differ by layer are lists. Any further column is stored
    once per turn.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "conversation", "turn", "layer", "best_of_mean", "mean_of_best", "mean_heads", "uniform",
        "response_tokens", "context_tokens", "truncated",
    )  # fmt: skip
    COUNTED: ClassVar[tuple[tuple[str, str], ...]] = (("conversation", "conversation"), ("layer", "layer"))
    REDUCTIONS: ClassVar[tuple[str, ...]] = ("best_of_mean", "mean_of_best", "mean_heads")

    def layer(self, layer: int, reduction: str = "mean_of_best") -> pd.Series:
        """The scores of one layer, indexed by conversation and turn.

        Raises:
            InputError: the table lacks the layer or the reduction.
        """
        if reduction not in self.REDUCTIONS:
            raise InputError(f"unknown reduction {reduction!r}; choose one of {', '.join(self.REDUCTIONS)}.")
        rows = self.frame[self.frame["layer"] == layer]
        if rows.empty:
            layers = ", ".join(map(str, sorted(self.frame["layer"].unique())))
            raise InputError(f"layer {layer} is not among the scored layers ({layers or 'none'}).")
        return rows.set_index(["conversation", "turn"])[reduction]

    def without_sinks(self, role: str | Role = Role.USER) -> pd.Series:
        """A role's part of the attention that rests on no attention sink, for every row, 0 to 1.

        This is a ratio of means over heads and response tokens. The score itself, the paper's, counts sinks
        and does not change. NaN where all attention rests on sinks.

        Raises:
            InputError: the scores were made without sinks.
        """
        if RESTING_COLUMNS[0] not in self.frame:
            raise InputError(
                "the view without sinks is not available, because these scores were made without attention "
                "sinks; score the data again with --sinks (sinks=True)."
            )
        label = Role.parse(role).label
        share = self.frame["mean_heads" if label == "user" else f"share_{label}"]
        left = 1 - self.frame[list(RESTING_COLUMNS)].sum(axis=1) - self.frame["share_sink"]
        return ((share - self.frame[f"resting_{label}"]) / left).where(left >= LEAST_SHARE)

    @classmethod
    def from_turns(
        cls,
        turns: pa.Table,
        stored: Sequence[int],
        meta: Mapping[str, Any],
        layers: Sequence[int] | None = None,
    ) -> Scores:
        """Expand a table of turns, as in the file, to one row per turn and layer.

        Args:
            turns: one row per turn.
            stored: the layers that the elements of its lists belong to.
            meta: the `meta` of the scores.
            layers: the layers to keep; by default all.
        """
        import pandas as pd

        wanted = [layer for layer in stored if layers is None or layer in set(layers)]
        places = [list(stored).index(layer) for layer in wanted]
        columns: dict[str, Any] = {}
        for name in turns.column_names:
            column = turns[name].combine_chunks()
            if name in LAYER_COLUMNS:
                values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(turns), len(stored))
                values = values.astype(np.float32) if values.dtype == np.float16 else values
                columns[name] = values[:, places].reshape(-1)
            else:
                columns[name] = column.to_pandas().repeat(len(wanted)).to_numpy()
        order = [*cls.COLUMNS, *(name for name in columns if name not in cls.COLUMNS)]
        columns["layer"] = np.tile(wanted, len(turns))
        return cls(pd.DataFrame({name: columns[name] for name in order}), meta)

    def by_turn(self, precision: Precision | str | None = None) -> pa.Table:
        """The table as it is stored, one row per turn; with a precision, in the types of that precision.

        Raises:
            InputError: not every turn was scored exactly once at the same layers.
        """
        layers, frame = self._layers(), self.frame
        group = frame.groupby(["conversation", "turn"], sort=False).ngroup().to_numpy()
        frame = frame.iloc[np.lexsort((frame["layer"].to_numpy(), group))]
        n_turns = len(set(group.tolist()))
        if not np.array_equal(frame["layer"].to_numpy(), np.tile(layers, n_turns)):
            raise InputError("scores can only be stored if every turn was scored once at the same layers.")
        first = frame.iloc[:: len(layers)]
        turns = {
            str(name): first[name].to_numpy()
            for name in frame.columns
            if name not in LAYER_COLUMNS and name != "layer"
        }
        by_layer = {
            str(name): frame[name].to_numpy().reshape(n_turns, len(layers))
            for name in frame.columns
            if name in LAYER_COLUMNS
        }
        return make_turns(turns, by_layer, precision)

    def _layers(self) -> list[int]:
        found = sorted(int(layer) for layer in self.frame["layer"].unique())
        return found or [int(layer) for layer in self.meta.get("layers", [0])]

    def write(self, path: str | Path) -> None:
        """Write the scores as Parquet, one row per turn, in the precision of `meta["precision"]`, if any."""
        turns = self.by_turn(self.meta.get("precision"))
        write_turns(path, [turns], self.meta, self._layers())

    @classmethod
    def load(cls, path: str | Path, *, layers: Sequence[int] | None = None) -> Scores:
        """Read the scores of some layers, or of all.

        Raises:
            InputError: the file does not exist, is damaged, or does not hold scores of this version.
        """
        import pandas as pd

        meta, stored = read_head(path)
        parts = [cls.from_turns(turns, stored, meta, layers) for turns in read_turns(path)]
        return cls(pd.concat([part.frame for part in parts], ignore_index=True), meta)


def make_turns(
    turns: Mapping[str, Any], by_layer: Mapping[str, np.ndarray], precision: Precision | str | None = None
) -> pa.Table:
    """Build a table with one row per turn.

    Args:
        turns: values by column and turn.
        by_layer: values `[turn, layer]` by column.
        precision: of the scores; the other known columns are then cast to their types too. By default no
            column is cast.
    """
    import pyarrow as pa

    columns = {
        name: pa.array(values, type=_type(TURN_COLUMNS.get(name), precision))
        for name, values in turns.items()
    }
    for name, values in by_layer.items():
        kind = _type(LAYER_COLUMNS[name], precision)
        flat = values.reshape(-1) if kind is None else values.reshape(-1).astype(kind.to_pandas_dtype())
        ends = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        columns[name] = pa.ListArray.from_arrays(pa.array(ends), pa.array(flat))
    return pa.table(columns)


def write_turns(
    path: str | Path, tables: Iterable[pa.Table], meta: Mapping[str, Any], layers: Sequence[int]
) -> None:
    """Write tables of turns into one file, with checksums; only a few are held in memory at once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: Any = None
    waiting: list[pa.Table] = []
    try:
        for table in tables:
            if writer is None:
                record = make_record(Scores(_empty(), meta), schema=SCHEMA_VERSION, layers=[*layers])
                schema = table.schema.with_metadata({META_KEY: record})
                writer = pq.ParquetWriter(path, schema, write_page_checksum=True)
            waiting.append(table.cast(writer.schema))
            if sum(map(len, waiting)) >= _ROWS_AT_ONCE:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
    finally:
        if writer is not None:
            writer.close()


def read_turns(path: str | Path) -> Iterator[pa.Table]:
    """Yield the tables of turns in a file, at least one, each with some ten thousand turns.

    Raises:
        InputError: the file is missing or damaged.
    """
    import pyarrow.parquet as pq

    file = read_file(path, lambda p: pq.ParquetFile(p, page_checksum_verification=True))
    with file:
        if not file.num_row_groups:
            yield file.schema_arrow.empty_table()
        for group in range(file.num_row_groups):
            yield read_file(path, lambda _, group=group: file.read_row_group(group))


def read_values(path: str | Path, column: str) -> Float[np.ndarray, "turn layer"]:
    """Read one column of a file of scores for all turns and layers, without the rest of the file.

    Raises:
        InputError: the file is missing or damaged, or has no such column.
    """
    import pyarrow.parquet as pq

    _, layers = read_head(path)
    read = {"columns": [column], "page_checksum_verification": True}
    table = read_file(path, lambda place: pq.read_table(place, **read))
    if column not in table.column_names:
        raise InputError(f"{path} has no column {column!r}.")
    values = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float32).reshape(len(table), len(layers))


def read_head(path: str | Path) -> tuple[Mapping[str, Any], list[int]]:
    """Read the `meta` and the layers of a file of scores, without the scores.

    Raises:
        InputError: the file is missing or damaged, or does not hold scores of this version.
    """
    import pyarrow.parquet as pq

    raw = (read_file(path, pq.read_schema).metadata or {}).get(META_KEY.encode())
    record = check_record(path, raw, Scores.__name__)
    if record.get("schema") != SCHEMA_VERSION:
        raise InputError(
            f"{path} holds scores in another version of the file format; "
            "score the data again with this ctxlens."
        )
    return record["meta"], record["layers"]


def check_precision(precision: str) -> None:
    """Raise `InputError` for a number format in which scores cannot be stored."""
    if precision not in get_args(Precision):
        raise InputError(f"scores are stored as {' or '.join(get_args(Precision))}, not {precision!r}.")


def _type(name: str | None, precision: Precision | str | None) -> pa.DataType | None:
    import pyarrow as pa

    if precision is not None:
        check_precision(precision)
    if name is None or precision is None:
        return None
    kinds = {
        "string": pa.string(), "bool": pa.bool_(), "int16": pa.int16(), "int32": pa.int32(),
        "float32": pa.float32(), "score": pa.float16() if precision == "float16" else pa.float32(),
    }  # fmt: skip
    return kinds[name]


def _empty() -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(columns=list(Scores.COLUMNS))


__all__ = [
    "LAYER_COLUMNS", "RESTING_COLUMNS", "SCHEMA_VERSION", "SHARE_COLUMNS", "TURN_COLUMNS", "Precision",
    "Scores", "check_precision", "make_turns", "read_head", "read_turns", "read_values", "write_turns",
]  # fmt: skip
