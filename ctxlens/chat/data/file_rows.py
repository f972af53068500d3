"""Rows of one open file, by what its first bytes show and then by the ending of its name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ctxlens.chat.data.json_rows import looks_like_json, read_json
from ctxlens.chat.data.opening import COMPRESSIONS, DataFile
from ctxlens.chat.data.table_rows import read_arrow, read_csv, read_parquet
from ctxlens.errors import InputError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_CSV = (".csv", ".tsv")
KINDS = (*JSON_SUFFIXES, ".parquet", *_CSV, ".arrow")
"""The endings of data files, without those of compressions."""


def read_open(file: DataFile) -> Iterator[Any]:
    """Read the rows of an open file.

    Raises:
        InputError: it is not of a known kind, or cannot be read; the message names the file and the place.
    """
    head = file.head
    if head.startswith(b"PAR1"):
        return read_parquet(file)
    if head.startswith(b"ARROW1") or file.suffix == ".arrow":
        return read_arrow(file)
    text = head.replace(b"\0", b"").decode("utf-8-sig", "replace").lstrip("\N{REPLACEMENT CHARACTER}")
    if file.suffix in JSON_SUFFIXES or looks_like_json(text) or not head:
        return read_json(file)
    if file.suffix in _CSV:
        return read_csv(file)
    found = (
        "does not begin like a Parquet file" if file.suffix == ".parquet" else "is not a known kind of file"
    )
    raise InputError(
        f"{file.name} {found}; expected one of {', '.join(KINDS)}, also compressed as "
        f"{', '.join(COMPRESSIONS)}."
    )


__all__ = ["JSON_SUFFIXES", "KINDS", "read_open"]
