"""How large a checkpoint is, read from its files without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

_LENGTH = 8
"""Bytes at the start of a safetensors file that hold the length of its header."""
_LONGEST_HEADER = 100_000_000


def count_parameters(source: Path | str) -> int | None:
    """The number of weights of a local checkpoint, from the headers of its safetensors files.

    None for a model on the Hub, a GGUF file, or files that cannot be read.
    """
    if not isinstance(source, Path) or not source.is_dir():
        return None
    try:
        counts = [
            math.prod(one["shape"])
            for file in source.glob("*.safetensors")
            for name, one in _read_header(file).items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sum(counts) or None


def _read_header(file: Path) -> dict[str, Any]:
    """The names, types and shapes of a safetensors file's tensors."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_LENGTH), "little")
        if not 0 < length < _LONGEST_HEADER:
            raise ValueError(f"{file} does not begin as a safetensors file does")
        return json.loads(opened.read(length))


def read_vocabulary_size(source: Path | str) -> int | None:
    """The number of rows of a local checkpoint's embedding; None if its configuration does not say."""
    if not isinstance(source, Path):
        return None
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


__all__ = ["count_parameters", "read_vocabulary_size"]
