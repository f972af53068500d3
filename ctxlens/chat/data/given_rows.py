"""Rows that are in memory: data sets, tables and data frames of other libraries, lists of mappings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ctxlens.errors import InputError

Source: TypeAlias = str | Path | Any
"""A path or Hub id; or a `datasets.Dataset` (also iterable, or by split), a pandas, polars or Arrow table, or
any iterable of rows."""


def describe_source(source: Source) -> str:
    """How messages and manifests name a source: its path or Hub id, or the kind of object and its length."""
    if isinstance(source, str | Path):
        return str(source)
    kind = type(source).__name__
    if isinstance(source, Mapping):
        return f"{kind} with {', '.join(map(str, source))}"
    try:
        length = len(source)
    except TypeError:
        return kind
    return f"{kind} of {length} row{'' if length == 1 else 's'}"


def hold_rows(source: Source) -> Source:
    """The source; a generator, which can be read only once, becomes a list."""
    if not isinstance(source, str | Path) and isinstance(source, Iterator):
        return list(source)
    return source


def has_columns(source: Any) -> bool:
    """Whether an object is a data set, a table or a data frame."""
    return hasattr(source, "column_names") or hasattr(source, "columns")


def read_given(source: Any, split: str) -> Iterator[Any]:
    """Read the rows of an object.

    Args:
        source: see `Source`. A mapping of splits, such as a `datasets.DatasetDict`, is read by split, or
            whole if it has only one; any other mapping is a single row.
        split: which split of a mapping of splits.

    Raises:
        InputError: the object has no rows, or several splits and none of that name.
    """
    if isinstance(source, Mapping):
        source = _choose_split(source, split) if _has_splits(source) else [source]
    if hasattr(source, "to_pylist"):  # an Arrow table
        rows = (row for batch in _batches(source) for row in batch)
    elif hasattr(source, "to_dicts"):  # a polars data frame
        rows = iter(source.to_dicts())
    elif hasattr(source, "iterrows") and hasattr(source, "to_dict"):  # a pandas data frame
        rows = map(_plain_cells, source.to_dict(orient="records"))
    elif isinstance(source, str | bytes) or not isinstance(source, Iterable):
        raise InputError(
            f"expected a path, a Hub id or rows (a data set, a data frame or a list of mappings), not "
            f"{type(source).__name__}."
        )
    else:
        rows = iter(source)
    yield from rows


def _has_splits(source: Mapping[Any, Any]) -> bool:
    """Whether the values of a mapping are data sets or tables, which have columns."""
    return bool(source) and all(map(has_columns, source.values()))


def _choose_split(source: Mapping[Any, Any], split: str) -> Any:
    if split in source:
        return source[split]
    if len(source) == 1:
        return next(iter(source.values()))
    raise InputError(
        f"the {type(source).__name__} has no split {split!r}; it has {', '.join(map(str, source))}. Give one "
        "of them."
    )


def _batches(table: Any) -> Iterator[list[Any]]:
    from ctxlens.chat.data.table_rows import rows_of_batch

    if not hasattr(table, "to_batches"):
        yield table.to_pylist()
        return
    for batch in table.to_batches(max_chunksize=1024):
        yield rows_of_batch(batch)


def _plain_cells(row: Mapping[Any, Any]) -> dict[Any, Any]:
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    """A cell of a data frame as plain values: arrays as lists, and nothing in place of NaN, NA and NaT."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if hasattr(value, "tolist"):  # an array or a number of NumPy
        return _plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(part) for part in value]
    return value


__all__ = ["Source", "describe_source", "has_columns", "hold_rows", "read_given"]
