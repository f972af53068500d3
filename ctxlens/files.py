"""Atomic writing of files, files of JSON lines that grow, and text in any Unicode encoding.

A killed process never damages what was written before.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from io import BufferedRandom
from pathlib import Path
from typing import Any

from ctxlens.errors import InputError

_BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32-LE",
    codecs.BOM_UTF32_BE: "UTF-32-BE",
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16-LE",
    codecs.BOM_UTF16_BE: "UTF-16-BE",
}


def write_atomic(path: str | Path, content: bytes | str | Callable[[Path], object]) -> Path:
    """Write a file atomically: it is either complete or unchanged.

    Args:
        path: the path of the file; a missing folder is created.
        content: the bytes or text (UTF-8), or a function that writes the file at the path it is given.

    Raises:
        InputError: the path cannot be written to, or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"Cannot write {path}: it is a folder; give the path of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}; choose a writable folder.") from error
    temporary = Path(name)
    try:
        os.close(handle)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"Cannot write {path}: {os.strerror(error.errno) if error.errno else error}; free some space or "
            "choose another folder. What was written before is kept."
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def decode_text(content: bytes, name: str | Path) -> str:
    """Decode the bytes of a text file: UTF-8, or the encoding that its byte-order mark names.

    Args:
        content: all bytes of the file.
        name: the name of the file, for the message.

    Returns:
        The text without its byte-order mark. Line ends are kept as they are.

    Raises:
        InputError: the bytes are not text in that encoding, or contain a NUL; the message states the offset
            of the first such byte.
    """
    mark = next((mark for mark in _BYTE_ORDER_MARKS if content.startswith(mark)), b"")
    encoding = _BYTE_ORDER_MARKS.get(mark, "UTF-8")
    problem = None
    text = ""
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        offset = len(mark) + error.start
        problem = f"byte 0x{content[offset]:02x} at offset {offset} cannot be decoded"
    if "\0" in text:
        offset = len(mark) + len(text[: text.index("\0")].encode(encoding))
        problem = f"there is a NUL at byte offset {offset}"
    if problem:
        raise InputError(
            f"{name} is not a text file in {encoding}: {problem}; save the text as UTF-8, or leave the file "
            "out."
        )
    return text


def plain_value(value: Any) -> Any:
    """A value (of Python, numpy or pandas) as a JSON value; NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(key): plain_value(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(one) for one in value]
    if hasattr(value, "tolist"):  # scalars and arrays of numpy
        return plain_value(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file; empty if there is no file. An incomplete last line is skipped.

    Raises:
        InputError: a line is not a JSON object; the message names it.
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
            raise InputError(f"{path}, line {number}, is not a JSON object; remove the line or the file.")
        rows.append(row)
    return rows


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append objects to a file and wait until they are on disk.

    Raises:
        InputError: the path cannot be written to, or the disk is full.
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
    """Replace a file atomically."""
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
    """Complete the last line if it holds an object; otherwise remove it."""
    file.seek(0)
    content = file.read()
    if not content or content.endswith(b"\n"):
        return
    start = content.rfind(b"\n") + 1
    if _parse(content[start:]) is None:
        file.truncate(start)
    else:
        file.write(b"\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


__all__ = ["append_lines", "decode_text", "plain_value", "read_lines", "write_atomic", "write_lines"]
