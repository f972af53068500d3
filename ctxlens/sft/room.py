"""Whether the disk has room for what a training writes, estimated before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from ctxlens.errors import InputError

_WEIGHT = {"float32": 4, "bfloat16": 2, "float16": 2}
_STATES = 8
"""Bytes of Adam's two states for each weight that is trained."""
_ADAPTER = 0.03
"""Weights of an adapter for each weight of the model, generously."""
_SPARE = 50 * 2**20
"""Tokenizer, logs and cards."""


def estimate_bytes(
    parameters: int, *, dtype: str = "float32", adapter: bool = False, saves: bool = False, kept: int = 1
) -> int:
    """Bytes that a training writes at most.

    The delivered checkpoint has all weights, also after an adapter was merged. Each intermediate checkpoint
    has the trained weights and Adam's states, and a new one is written before the oldest is removed.

    Args:
        parameters: number of weights of the model.
        dtype: number format of the weights.
        adapter: whether an adapter is trained instead of all weights.
        saves: whether there are intermediate checkpoints.
        kept: how many of them are kept.
    """
    weight = _WEIGHT.get(dtype, 4)
    trained = parameters * _ADAPTER if adapter else parameters
    checkpoints = (kept + 1) * trained * (weight + _STATES) if saves else 0
    delivered = weight * (parameters + (trained if adapter else 0))
    return round(delivered + checkpoints) + _SPARE


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that may not exist yet."""
    place = folder.expanduser().resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_room(folder: Path, needed: int) -> None:
    """Refuse a folder on whose disk an estimate does not fit.

    Raises:
        InputError: the disk has less room.
    """
    free = free_bytes(folder)
    if free < needed:
        raise InputError(
            f"the disk of {folder} has {say_bytes(free)} free, but this training writes about "
            f"{say_bytes(needed)}; free some room, give a folder on another disk, or set save_strategy=no, "
            "which writes no intermediate checkpoints."
        )


def say_bytes(number: float | int) -> str:
    """A number of bytes in words."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


__all__ = ["check_room", "estimate_bytes", "free_bytes", "say_bytes"]
