"""JSON lines that grow while work goes on: what was written stays, whenever the process is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from io import BufferedRandom
from pathlib import Path
from typing import Any

from ctxlens.errors import InputError
from ctxlens.runs import write_atomic


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, none if there is no file; a last line that a kill cut short is left out.

    Raises:
        InputError: a line that is no JSON object; the message names it.
    """
    if not path.is_file():
        return []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    lines = content.splitlines()
    if lines and not content.endswith(b"\n") and _parse(lines[-1]) is None:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parse(line)
        if row is None:
            raise InputError(f"{path}, line {number}, is no JSON object; remove the line or the file.")
        rows.append(row)
    return rows


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add objects to a file and wait until they are on the disk.

    Raises:
        InputError: the place cannot be written to, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            _mend_end(file)
            file.write(_dump(rows).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(
            f"Cannot write {path}: {error.strerror}; free some space or choose another folder. What was "
            "written before is kept."
        ) from error


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a file anew, atomically."""
    return write_atomic(path, _dump(rows))


def _dump(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _mend_end(file: BufferedRandom) -> None:
    """Complete the last line, or cut it off if it was cut short."""
    file.seek(0)
    content = file.read()
    if not content or content.endswith(b"\n"):
        return
    start = content.rfind(b"\n") + 1
    if _parse(content[start:]) is None:
        file.truncate(start)
    else:
        file.write(b"\n")


__all__ = ["append_lines", "read_lines", "write_lines"]
