"""Read rows from files, folders and the Hub."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any

from ctxlens.errors import InputError, first_line

_COMPRESSED = {".gz": gzip.open, ".xz": lzma.open}
_JSON = (".json", ".jsonl", ".ndjson")
_TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
_SUFFIXES = (*_JSON, *_TABLES, *_COMPRESSED)
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


def read_rows(
    path_or_hub_id: str, *, split: str, limit: int | None, streaming: bool = False
) -> Iterator[Any]:
    """Read the rows of a file or folder if it exists, and otherwise of a data set on the Hub.

    Args:
        path_or_hub_id: JSON or JSON lines (also ``.gz``, ``.xz``), Parquet, Arrow, CSV, a folder that the
            ``datasets`` library reads, or a Hub id such as ``GAIR/lima``.
        split: Which split of a folder or Hub data set.
        limit: Maximum number of rows, counted from the start.
        streaming: Whether the ``datasets`` library reads rows while they are used.

    Raises:
        InputError: It does not exist, or it cannot be read.
    """
    limit = None if limit is None else min(limit, sys.maxsize)
    path = Path(path_or_hub_id).expanduser()
    if path.is_file() and _kind(path) in _JSON:
        return islice(read_json_rows(path), limit)
    if path.exists():
        _watch(path)
        return islice(_read_with_datasets(path, split, streaming), limit)
    if path.is_absolute() or path_or_hub_id.startswith((".", "~")) or path.suffix in _SUFFIXES:
        raise InputError(
            f"There is no file or folder {path_or_hub_id}; give the path of a data set, or a Hub id."
        )
    return islice(_read_from_hub(path_or_hub_id, split, streaming), limit)


def read_json_rows(path: Path) -> Iterator[Any]:
    """Read the items of a JSON list or of JSON lines; a single JSON object is the only item.

    Raises:
        InputError: The file is missing or not JSON; the message names the line.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}; give the path of a JSON or JSON-lines file.")
    _watch(path)
    if _kind(path) != ".json":
        yield from _read_lines(path)
        return
    with _open(path) as file:
        text = _read_text(file, path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            yield from _read_lines(path)
            return
        raise InputError(f"{path} is not valid JSON: line {error.lineno}: {error.msg}.") from error
    except RecursionError:
        raise InputError(f"{path} is nested too deeply to be conversations.") from None
    yield from value if isinstance(value, list) else [value]


def _read_lines(path: Path) -> Iterator[Any]:
    with _open(path) as file:
        number = 0
        while True:
            try:
                line = file.readline()
            except (UnicodeDecodeError, OSError, EOFError, lzma.LZMAError) as error:
                raise InputError(f"{path} cannot be read as text after line {number}: {error}.") from error
            if not line:
                return
            number += 1
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path} is not valid JSON lines: line {number}: {error.msg}.") from error
            except RecursionError:
                raise InputError(f"{path}, line {number}: nested too deeply to be a conversation.") from None


def _watch(path: Path) -> None:
    if (found := _watched.get()) is not None and path not in found:
        found.append(path)


def _kind(path: Path) -> str:
    """The suffix that names a file's format: ``.jsonl`` for ``rows.jsonl.xz``."""
    return (Path(path.stem) if path.suffix in _COMPRESSED else path).suffix.lower()


def _open(path: Path) -> TextIOWrapper:
    try:
        return _COMPRESSED.get(path.suffix, open)(path, mode="rt", encoding="utf-8-sig")  # pyright: ignore
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {error.strerror or error}.") from error


def _read_text(file: TextIOWrapper, path: Path) -> str:
    try:
        return file.read()
    except (UnicodeDecodeError, OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"{path} cannot be read as text: {error}.") from error


def _read_with_datasets(path: Path, split: str, streaming: bool) -> Iterator[Any]:
    from datasets import DatasetDict, load_dataset, load_from_disk

    try:
        if path.is_file():
            if _kind(path) not in _TABLES:
                raise InputError(
                    f"{path} is not a known kind of file; expected one of {', '.join((*_JSON, *_TABLES))}, "
                    f"also compressed as {' or '.join(_COMPRESSED)}."
                )
            options: dict[str, Any] = {"delimiter": "\t"} if _kind(path) == ".tsv" else {}
            options |= {"data_files": str(path), "split": "train", "streaming": streaming}
            loaded = load_dataset(_TABLES[_kind(path)], **options)
        elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = load_from_disk(str(path))
            if isinstance(loaded, DatasetDict):
                if split not in loaded:
                    raise InputError(f"{path} has no split {split!r}; it has {', '.join(map(str, loaded))}.")
                loaded = loaded[split]
        else:
            loaded = load_dataset(str(path), split=split, streaming=streaming)
        yield from loaded
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds of errors for unreadable data
        raise InputError(f"{path} cannot be read as a data set: {first_line(error)}.") from error


def _read_from_hub(name: str, split: str, streaming: bool) -> Iterator[Any]:
    from datasets import load_dataset

    try:
        try:
            loaded = load_dataset(name, split=split, streaming=streaming)
        except RuntimeError as error:  # needs a script, which the library refuses; the Hub keeps a copy
            if "script" not in str(error):
                raise
            revision = "refs/convert/parquet"
            loaded = load_dataset(name, split=split, streaming=streaming, revision=revision)
        yield from loaded
    except Exception as error:  # network, access, name and format errors all differ in kind
        raise InputError(
            f"{name} is not a file or folder here, and the Hub has no readable data set of that name with "
            f"split {split!r}: {first_line(error)}."
        ) from error
