"""Raw texts that are trained on besides the conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ctxlens.errors import InputError, first_line


def read_replay(path: str | Path) -> list[str]:
    """Read raw texts from a file.

    Args:
        path: JSON Lines (`.jsonl`, `.json`) with the key `text` or bare strings; or plain text with blank
            lines between the texts.

    Raises:
        InputError: the file cannot be read, or a line does not contain a text.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the replay texts {path} cannot be read ({first_line(error)}).") from error
    if Path(path).suffix not in {".jsonl", ".json"}:
        return [text for part in content.split("\n\n") if (text := part.strip("\n"))]
    lines = enumerate(content.splitlines(), 1)
    return [_read_line(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _read_line(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: this is not JSON ({first_line(error)}).") from error
    text = record.get("text") if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise InputError(f'{where}: expected a string or an object with the key "text".')
    return text


def draw_replay(texts: Sequence[str], n_conversations: int, share: float | None, seed: int) -> list[str]:
    """Draw the raw texts that are trained on.

    Texts are drawn without replacement until all have been drawn, and then again.

    Args:
        texts: the raw texts.
        n_conversations: number of conversations that are trained on.
        share: share of raw texts among all rows, in [0, 1); None: every text once.
        seed: seed of the draw.

    Raises:
        InputError: the share is out of range, or there are no texts to draw from.
    """
    if share is None:
        return list(texts)
    if not 0 <= share < 1:
        raise InputError(f"replay_share must be at least 0 and below 1, got {share}.")
    wanted = round(n_conversations * share / (1 - share))
    if wanted and not texts:
        raise InputError(f"replay_share is {share}, but there are no texts to replay; give some (replay).")
    rng = np.random.default_rng(seed)
    drawn: list[str] = []
    while len(drawn) < wanted:
        drawn += [texts[int(k)] for k in rng.permutation(len(texts))[: wanted - len(drawn)]]
    return drawn


__all__ = ["draw_replay", "read_replay"]
