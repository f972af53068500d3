"""Rows of tables: CSV with cells as text, Parquet and Arrow batch by batch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ctxlens.chat.data.opening import DataFile
from ctxlens.errors import InputError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 1024
_DELIMITERS = ",;\t"
_LONGEST_CELL = 2**31 - 1
_JSON_FEATURE = b'"_type": "Json"'


def read_csv(file: DataFile) -> Iterator[dict[str, str]]:
    """Read the rows of a CSV or TSV file. Every cell is text, also ``None``, ``NA`` and a blank.

    Raises:
        InputError: a row has more or fewer cells than the header, a quote is not closed, or two columns have
            the same name; the message names the line.
    """
    csv.field_size_limit(_LONGEST_CELL)
    lines = _split_returns(line for _, line in file.lines())
    first = next(lines, None)
    if first is None:
        return
    delimiter = "\t" if file.suffix == ".tsv" else max(_DELIMITERS, key=first.count)
    reader = csv.reader(_chained(first, lines), delimiter=delimiter, strict=True)
    try:
        header = [name or f"Unnamed: {number}" for number, name in enumerate(next(reader))]
        if repeated := [name for number, name in enumerate(header) if name in header[:number]]:
            raise InputError(f"{file.name} has two columns {repeated[0]!r}; rename one of them.")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{file.name}, line {reader.line_num}: a row of {len(cells)} "
                    f"cell{'s' if len(cells) > 1 else ''}, but the header has {len(header)} "
                    f"({', '.join(header)}); put texts that contain {delimiter!r}, quotes or "
                    "line breaks in double quotes."
                )
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        reason = str(error)
        if "unexpected end" in reason:
            reason = "the file ends within a quoted text, so a quote is not closed or the file was cut off"
        raise InputError(f"{file.name}, line {reader.line_num}: not valid CSV: {reason}.") from error


def read_parquet(file: DataFile) -> Iterator[dict[str, Any]]:
    """Read the rows of a Parquet file, batch by batch.

    Raises:
        InputError: the file is damaged; the message says after which row.
    """
    import pyarrow.parquet as pq

    def batches() -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(file.path or io.BytesIO(file.read())) as table:
            yield from table.iter_batches(_BATCH_ROWS)

    return _read_batches(batches(), f"{file.name} cannot be read as Parquet")


def read_arrow(file: DataFile) -> Iterator[dict[str, Any]]:
    """Read the rows of an Arrow file or stream, batch by batch; errors are those of `read_parquet`."""
    import pyarrow as pa

    def batches() -> Iterator[pa.RecordBatch]:
        source = pa.memory_map(str(file.path)) if file.path else pa.BufferReader(file.read())
        with source:
            if file.head.startswith(b"ARROW1"):
                reader = pa.ipc.open_file(source)
                whole = (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                whole = iter(pa.ipc.open_stream(source))
            for batch in whole:
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield batch.slice(start, _BATCH_ROWS)

    return _read_batches(batches(), f"{file.name} cannot be read as Arrow")


def _read_batches(batches: Iterable[pa.RecordBatch], problem: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    done = 0
    try:
        for batch in batches:
            rows = rows_of_batch(batch)
            yield from rows
            done += len(rows)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{problem} after row {done}: {first_line(error).rstrip('.')}.") from error


def rows_of_batch(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a batch. Bytes that are not UTF-8 become half surrogate pairs, so the row is refused."""
    if _JSON_FEATURE in (batch.schema.metadata or {}).get(b"huggingface", b""):
        return _decoded_rows(batch)
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        names = batch.schema.names
        return [
            {name: _plain(batch.column(column)[row]) for column, name in enumerate(names)}
            for row in range(batch.num_rows)
        ]


def _decoded_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows whose columns the `datasets` library keeps as JSON text, decoded by it."""
    import pyarrow as pa
    from datasets import Dataset

    return list(Dataset(pa.Table.from_batches([batch])))  # pyright: ignore


def _plain(scalar: Any) -> Any:
    import pyarrow as pa

    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.StructScalar):
        return {name: _plain(scalar[name]) for name in scalar}
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar):
        return [_plain(value) for value in scalar.values]
    if isinstance(scalar, pa.StringScalar | pa.LargeStringScalar):
        return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
    return scalar.as_py()


def _chained(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    yield from lines


def _split_returns(lines: Iterator[str]) -> Iterator[str]:
    """The lines of a file whose lines may end with a carriage return alone."""
    for line in lines:
        body = line.rstrip("\r\n")
        if "\r" in body and '"' not in body:
            yield from io.StringIO(line, newline="")
        else:
            yield line


__all__ = ["read_arrow", "read_csv", "read_parquet", "rows_of_batch"]
