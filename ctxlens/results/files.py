"""What all result files have in common: a record with type and `meta`, and errors for unreadable files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ctxlens.errors import InputError

META_KEY = "ctxlens"
"""Key of a file's metadata that holds its record."""
_T = TypeVar("_T")


def make_record(result: Any, **more: Any) -> str:
    """The record of a result as JSON: its type, its `meta` and further entries."""
    record = {"type": type(result).__name__, "meta": dict(result.meta), **more}
    return json.dumps(record, indent=2, default=str)


def read_file(path: str | Path, reader: Callable[[Path], _T]) -> _T:
    """Read a file with a reader; raise `InputError` if the file does not exist or is damaged."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the path of a ctxlens result.")
    try:
        return reader(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a ctxlens result ({error}).") from error


def check_record(path: str | Path, raw: bytes | str | None, name: str | None = None) -> Mapping[str, Any]:
    """Parse the record of a file; raise `InputError` if it is not a record or not of the type `name`."""
    try:
        record = json.loads(raw) if raw else None
    except ValueError:
        record = None
    found = record.get("type") if isinstance(record, dict) and "meta" in record else None
    if record is None or found is None or (name is not None and found != name):
        raise InputError(
            f"{path} is not a ctxlens result"
            + (f" of type {name}" if name else "")
            + (f", but one of type {found}." if found is not None else ".")
        )
    return record


def read_parquet_record(path: str | Path) -> bytes | None:
    """The record of a Parquet file, if it holds one."""
    import pyarrow.parquet as pq

    return (read_file(path, pq.read_schema).metadata or {}).get(META_KEY.encode())


def read_safetensors_record(path: str | Path) -> str | None:
    """The record of a safetensors file, if it holds one."""
    from safetensors import SafetensorError, safe_open

    def read(file_path: Path) -> str | None:
        try:
            with safe_open(file_path, framework="numpy") as file:
                return (file.metadata() or {}).get(META_KEY)
        except SafetensorError as error:
            raise ValueError(str(error)) from error

    return read_file(path, read)
