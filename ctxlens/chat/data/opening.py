"""Open a data file: what it is and how it is compressed are read from its first bytes, not from its name."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxlens.errors import InputError, first_line
from ctxlens.files import decode_text

COMPRESSIONS = {
    ".gz": ("gzip", b"\x1f\x8b"),
    ".bz2": ("bzip2", b"BZh"),
    ".xz": ("xz", b"\xfd7zXZ\x00"),
    ".zst": ("zstd", b"\x28\xb5\x2f\xfd"),
}
"""Compressions that are read: by the ending of a name, its own name, and the first bytes of a file."""

_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive or an Excel file; unpack it, or save the table as CSV or Parquet",
    b"\xd0\xcf\x11\xe0": "an old Excel file; save the table as CSV",
    b"SQLite format 3": "an SQLite database; export the table as JSON lines or Parquet",
    b"version https://git-lfs": "a Git LFS pointer, not the data themselves; fetch them with: git lfs pull",
    b"%PDF": "a PDF document",
    b"\x89HDF": "an HDF5 file; save the rows as Parquet or JSON lines",
    b"\x93NUMPY": "a NumPy array; save the rows as Parquet or JSON lines",
    b"\x80\x04\x95": "a pickle; save the rows as Parquet or JSON lines",
    b"\x80\x05\x95": "a pickle; save the rows as Parquet or JSON lines",
}
_WEB_PAGE = re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE)
_HEAD_BYTES = 4096
_BUFFER_BYTES = 1 << 18
_READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)


@dataclass(frozen=True)
class DataFile:
    """A file that is open for reading, without its compression.

    Attributes:
        name: how messages name it.
        suffix: the ending that names its format, such as ``.jsonl`` for ``rows.jsonl.xz``.
        stream: its decompressed bytes.
        path: where it is, if it is not compressed.
    """

    name: str
    suffix: str
    stream: io.BufferedReader
    path: Path | None = None

    @property
    def head(self) -> bytes:
        """The first bytes, without moving on in the file."""
        try:
            return self.stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]
        except _READ_ERRORS as error:
            raise self._unreadable(error, "at its beginning") from error

    def read(self) -> bytes:
        """All bytes.

        Raises:
            InputError: the file cannot be read, or its compressed data are damaged or cut off.
        """
        try:
            return self.stream.read()
        except _READ_ERRORS as error:
            raise self._unreadable(error, "to its end") from error

    def lines(self) -> Iterator[tuple[int, str]]:
        """The lines of a text file with their numbers, from 1; line ends are kept.

        The encoding is that of the byte-order mark, else UTF-16 or UTF-32 as NUL bytes show, else UTF-8.

        Raises:
            InputError: the bytes are not text in that encoding; the message names line and byte.
        """
        encoding = _find_encoding(self.head)
        if encoding != "utf-8":
            text = decode_text(_with_mark(self.read(), encoding), self.name)
            yield from enumerate(io.StringIO(text, newline="\n"), start=1)
            return
        number = 0
        while True:
            try:
                line = self.stream.readline()
            except _READ_ERRORS as error:
                raise self._unreadable(error, f"after line {number}") from error
            if not line:
                return
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            yield number, _decode_line(line, f"{self.name}, line {number}")

    def _unreadable(self, error: Exception, where: str) -> InputError:
        reason = str(error) or type(error).__name__
        if isinstance(error, EOFError) or "runcated" in reason or "end-of-stream" in reason:
            return InputError(
                f"{self.name} cannot be read {where}: the compressed file is cut off; copy or download it "
                "again."
            )
        return InputError(f"{self.name} cannot be read {where}: {first_line(error)}.")


def open_file(path: Path) -> DataFile:
    """Open a data file, compressed or not.

    Raises:
        InputError: it cannot be opened, or its first bytes show that it holds no rows.
    """
    try:
        raw = path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {error.strerror or error}.") from error
    return _open(raw, str(path), path)


def open_bytes(content: bytes, name: str) -> DataFile:
    """Open what standard input or a pipe gave, as if it were a file."""
    return _open(io.BytesIO(content), name, None)


def name_suffix(path: Path) -> str:
    """The ending that names a file's format: ``.jsonl`` for ``rows.jsonl.xz``."""
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path
    return inner.suffix.lower()


def _open(raw: io.BufferedIOBase, name: str, path: Path | None) -> DataFile:
    suffix = name_suffix(path) if path is not None else ""
    file = DataFile(name, suffix, io.BufferedReader(raw, _BUFFER_BYTES), path)  # pyright: ignore
    for compression, magic in COMPRESSIONS.values():
        if file.head.startswith(magic):
            stream = _Decompressed(file.stream, compression)
            file = DataFile(name, suffix, io.BufferedReader(stream, _HEAD_BYTES))
            break
    head = file.head
    for magic, kind in _OTHER_KINDS.items():
        if head.startswith(magic):
            raise InputError(f"{name} is {kind}.")
    if _WEB_PAGE.match(head):
        raise InputError(f"{name} is a web page, not data; download the file itself.")
    return file


class _Decompressed(io.RawIOBase):
    """Decompressed bytes, as far as they can be read: an error comes only after everything before it."""

    def __init__(self, stream: io.BufferedReader, compression: str) -> None:
        if compression == "zstd":
            import pyarrow as pa

            self._read = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd").read
        else:
            opened: Any = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[compression](stream, "rb")
            self._read = opened.read1

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _find_encoding(head: bytes) -> str:
    """The encoding of text: `json.detect_encoding` looks at byte-order marks and NULs, as RFC 4627 says."""
    encoding = json.detect_encoding(head)
    return "utf-8" if encoding == "utf-8-sig" or head.startswith(b"\0" * 4) else encoding


def _with_mark(content: bytes, encoding: str) -> bytes:
    """The bytes with a byte-order mark, which `decode_text` reads the encoding from."""
    marks = {
        "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE,
        "utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE,
    }  # fmt: skip
    return marks.get(encoding, b"") + content


def _decode_line(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        try:
            return line.decode("utf-8", "surrogatepass")  # the conversation is skipped, with its reason
        except UnicodeDecodeError:
            raise InputError(
                f"{where}, byte {error.start + 1}: 0x{line[error.start]:02x} is not UTF-8; save the file as "
                "UTF-8, or repair the line."
            ) from error


__all__ = ["COMPRESSIONS", "DataFile", "name_suffix", "open_bytes", "open_file"]
