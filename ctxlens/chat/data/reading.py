"""Read rows from files, folders, the Hub and objects in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import Any

from ctxlens.chat.data.file_rows import KINDS, read_open
from ctxlens.chat.data.folders import iterate_loaded, read_folder
from ctxlens.chat.data.given_rows import Source, read_given
from ctxlens.chat.data.json_rows import read_json
from ctxlens.chat.data.opening import COMPRESSIONS, open_bytes, open_file
from ctxlens.errors import InputError, first_line

_watched: ContextVar[list[Path] | None] = ContextVar("watched", default=None)


@contextmanager
def watch_files() -> Iterator[list[Path]]:
    """Collect the files and folders from which rows are read inside the block, in order."""
    found: list[Path] = []
    token = _watched.set(found)
    try:
        yield found
    finally:
        _watched.reset(token)


def read_rows(source: Source, *, split: str, limit: int | None, streaming: bool = False) -> Iterator[Any]:
    """Read the rows of a file or folder if it exists, of a data set on the Hub, or of an object in memory.

    Args:
        source: a JSON, JSON-lines, Parquet, Arrow, CSV or TSV file, also compressed with gzip, bzip2, xz or
            zstd; a folder of such files, or one that the ``datasets`` library saved; a Hub id such as
            ``GAIR/lima``; or rows in memory (see `ctxlens.chat.data.given_rows.Source`). What a file is,
            and how it is compressed, is read from its first bytes.
        split: Which split of a folder, Hub data set or mapping of splits.
        limit: Maximum number of rows, counted from the start.
        streaming: Whether the rows of a Hub data set are read while they are used; files always are.

    Raises:
        InputError: It does not exist, or it cannot be read; the message names the file and the place.
    """
    limit = None if limit is None else min(limit, sys.maxsize)
    if not isinstance(source, str | Path):
        return islice(read_given(source, split), limit)
    path = Path(source).expanduser()
    if path.is_dir():
        _watch(path)
        return islice(read_folder(path, split), limit)
    if path.exists():
        return islice(read_file_rows(path), limit)
    name = str(source)
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix.lower() in (*KINDS, *COMPRESSIONS):
        raise InputError(f"There is no file or folder {source}; give the path of a data set, or a Hub id.")
    return islice(_read_from_hub(name, split, streaming), limit)


def read_file_rows(path: Path) -> Iterator[Any]:
    """Read the rows of one file of any kind; see `read_rows`."""
    _watch(path)
    return read_open(open_file(path))


def read_bytes_rows(content: bytes, name: str) -> Iterator[Any]:
    """Read the rows of what standard input or a pipe gave; see `read_rows`."""
    return read_open(open_bytes(content, name))


def read_json_rows(path: Path) -> Iterator[Any]:
    """Read the items of a JSON list or of JSON lines; a single JSON object is the only item.

    Raises:
        InputError: The file is missing or not JSON; the message names line and column.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}; give the path of a JSON or JSON-lines file.")
    _watch(path)
    yield from read_json(open_file(path))


def _watch(path: Path) -> None:
    if (found := _watched.get()) is not None and path not in found:
        found.append(path)


def _read_from_hub(name: str, split: str, streaming: bool) -> Iterator[Any]:
    from datasets import load_dataset

    problem = (
        f"{name} is not a file or folder here, and the Hub has no readable data set of that name with "
        f"split {split!r}"
    )
    try:
        try:
            loaded = load_dataset(name, split=split, streaming=streaming)
        except RuntimeError as error:  # needs a script, which the library refuses; the Hub keeps a copy
            if "script" not in str(error):
                raise
            revision = "refs/convert/parquet"
            loaded = load_dataset(name, split=split, streaming=streaming, revision=revision)
    except Exception as error:  # network, access, name and format errors all differ in kind
        raise InputError(f"{problem}: {first_line(error)}.") from error
    yield from iterate_loaded(loaded, problem)


__all__ = ["read_bytes_rows", "read_file_rows", "read_json_rows", "read_rows", "watch_files"]
