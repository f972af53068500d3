"""Rows of a folder: data files with their splits, or a data set that the `datasets` library saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ctxlens.chat.data.file_rows import KINDS, read_open
from ctxlens.chat.data.opening import name_suffix, open_file
from ctxlens.errors import InputError, first_line

_READ_HERE = ("json", "csv", "parquet", "arrow")


def read_folder(path: Path, split: str) -> Iterator[Any]:
    """The rows of a folder: one that `datasets` saved, or data files, whose splits `datasets` finds."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        yield from _read_saved(path, split)
        return
    files = _find_data_files(path, split)
    if files is None:
        yield from _load_with_datasets(path, split)
        return
    yield from chain.from_iterable(map(read_open, map(open_file, _without_side_files(files))))


def _find_data_files(path: Path, split: str) -> list[Path] | None:
    """The data files of a split; None if the folder holds a kind of files that only `datasets` reads.

    Raises:
        InputError: the folder has other splits, or no data files.
    """
    from datasets import load_dataset_builder

    own = sorted(file for file in path.rglob("*") if _is_data_file(file, path))
    try:
        builder = load_dataset_builder(str(path))
        kind, splits = type(builder).__module__.split(".")[-1], dict(builder.config.data_files or {})
    except Exception as error:  # the library raises many kinds of errors for folders without data files
        if own:
            return own
        raise InputError(
            f"{path} cannot be read as a data set: {first_line(error).rstrip('.')}; expected files that end "
            f"in one of {', '.join(KINDS)}."
        ) from error
    if kind not in _READ_HERE:
        return own or None
    if split not in splits:
        raise InputError(f"{path} has no split {split!r}; it has {', '.join(map(str, splits))}.")
    return [Path(file) for file in splits[split]]


def _is_data_file(file: Path, folder: Path) -> bool:
    inside = file.relative_to(folder).parts
    hidden = any(part.startswith((".", "_")) for part in inside)
    return not hidden and name_suffix(file) in KINDS and file.is_file()


def _without_side_files(files: list[Path]) -> list[Path]:
    """The files without those that hold one JSON object which has no column of the other files' rows."""
    if all(name_suffix(file) != ".json" for file in files):
        return files
    heads = {file: list(islice(read_open(open_file(file)), 2)) for file in files}
    single = [file for file in files if name_suffix(file) == ".json" and len(heads[file]) == 1]
    columns = {name for file in files if file not in single for name in _columns(heads[file])}
    return [file for file in files if file not in single or not columns or columns & _columns(heads[file])]


def _columns(rows: list[Any]) -> set[Any]:
    return set(rows[0]) if rows and isinstance(rows[0], Mapping) else set()


def _read_saved(path: Path, split: str) -> Iterator[Any]:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds of errors for unreadable data
        raise InputError(f"{path} cannot be read as a saved data set: {first_line(error)}.") from error
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise InputError(f"{path} has no split {split!r}; it has {', '.join(map(str, loaded))}.")
        loaded = loaded[split]
    yield from iterate_loaded(loaded, f"{path} cannot be read as a saved data set")


def _load_with_datasets(path: Path, split: str) -> Iterator[Any]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(str(path), split=split)
    except Exception as error:  # as above
        raise InputError(f"{path} cannot be read as a data set: {first_line(error)}.") from error
    yield from iterate_loaded(loaded, f"{path} cannot be read as a data set")


def iterate_loaded(loaded: Iterable[Any], problem: str) -> Iterator[Any]:
    """The rows of what `datasets` loaded; its errors while reading become `InputError`."""
    try:
        yield from loaded
    except Exception as error:  # network and format errors all differ in kind
        raise InputError(f"{problem}: {first_line(error)}.") from error


__all__ = ["iterate_loaded", "read_folder"]
