"""Which data an evaluation was made from, so that a resumed run does not mix different data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctxlens.errors import RunExistsError

_SHOWN = 12
"""Number of a digest's digits that messages show."""


def describe_data(
    read: Sequence[Path], tasks: Mapping[str, Any], data_dir: str | Path | None
) -> dict[str, Any]:
    """Name, size and SHA-256 of the files that were read, and number and SHA-256 of each task's documents.

    Args:
        read: the files, and folders of which all files count.
        tasks: lm-eval's tasks by name. Documents that are not JSON values (images, sound) have no digest.
        data_dir: files inside it are named relative to it, others by their full path.
    """
    base = _base(data_dir)
    found = {path.resolve(): None for place in read for path in _files(place)}
    return {
        "files": {_name(path, base): _describe_file(path) for path in found},
        "documents": {name: _describe_documents(task.eval_docs) for name, task in tasks.items()},
    }


def check_files(recorded: Mapping[str, Any], data_dir: str | Path | None, folder: Path) -> None:
    """Check that the files of a run have not changed.

    Raises:
        RunExistsError: a file no longer exists, or its content has changed.
    """
    for name, then in recorded["files"].items():
        path = _base(data_dir) / name
        if not path.is_file():
            _refuse(folder, f"{name} no longer exists")
        now = _describe_file(path)
        if now != then:
            _refuse(folder, f"{name} was {_told(then)}, and is now {_told(now)}")


def check_data(recorded: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    """Check that the recorded data of a run equal those found now; both in the form of `describe_data`.

    Raises:
        RunExistsError: other files are read, or the documents of a task have changed.
    """
    for name in [*found["files"], *recorded["files"]]:
        if name not in recorded["files"] or name not in found["files"]:
            names = [", ".join(one["files"]) or "no file here" for one in (recorded, found)]
            _refuse(folder, f"it read {names[0]}, but {names[1]} would be read now")
    for task, now in found["documents"].items():
        then = recorded["documents"].get(task)
        if then != now:
            _refuse(folder, f"{task} had {_count(then)} and now has {_count(now)}, not all of them the same")


def _refuse(folder: Path, why: str) -> None:
    raise RunExistsError(
        f"{folder} was begun with other data: {why}; restore the old data, choose another --out folder, or "
        "start again with --overwrite."
    )


def _files(place: Path) -> Iterator[Path]:
    if place.is_dir():
        yield from (path for path in sorted(place.rglob("*")) if path.is_file())
    else:
        yield place


def _base(data_dir: str | Path | None) -> Path:
    place = Path(data_dir or ".").expanduser().resolve()
    return place.parent if place.is_file() else place


def _name(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


def _describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _describe_documents(documents: Any) -> dict[str, Any]:
    # Not `runs.digest`: manifests of runs that are resumed hold this value, and it needs no list of all
    # texts.
    digest = hashlib.sha256()
    try:
        for document in documents:
            digest.update(json.dumps(document, sort_keys=True).encode() + b"\n")
    except (TypeError, ValueError):
        return {"number": len(documents), "sha256": None}
    return {"number": len(documents), "sha256": digest.hexdigest()}


def _told(file: Mapping[str, Any]) -> str:
    return f"{file['size']:,} bytes with SHA-256 {file['sha256'][:_SHOWN]}…"


def _count(documents: Mapping[str, Any] | None) -> str:
    return f"{documents['number'] if documents else 0} documents"


__all__ = ["check_data", "check_files", "describe_data"]
