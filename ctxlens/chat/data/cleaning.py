"""Drop what a data set should not contain, and count each drop by its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

REFUSALS = (
    "i'm sorry, but", "i am sorry, but", "sorry, but i", "i apologize, but", "i apologise, but",
    "my apologies, but", "i cannot assist", "i can't assist", "i cannot help", "i can't help",
    "i cannot provide", "i can't provide", "i cannot fulfill", "i can't fulfill", "i'm unable to",
    "i am unable to", "i'm not able to", "i am not able to", "as an ai ", "as an ai,",
    "as a language model", "as a large language model",
)  # fmt: skip
"""Beginnings of answers that `--drop-refusals` treats as refusals, in lower case with straight apostrophes.

A heuristic for English: it misses refusals that begin differently, and counts an apology as a refusal.
"""


def clean_messages(messages: Iterable[dict[str, Any]], dropped: Counter[str]) -> list[dict[str, Any]]:
    """Drop the turns that the paper drops, and count each drop by its reason.

    Empty turns go first; then assistant and tool turns before the first user turn; then user (and
    system) turns after the last answer.
    """
    kept: list[dict[str, Any]] = []
    user_spoke = False
    for message in messages:
        if not message["content"].strip() and not message.get("tool_calls"):
            dropped["empty turn"] += 1
            continue
        user_spoke = user_spoke or message["role"] == "user"
        if not user_spoke and message["role"] in ("assistant", "tool"):
            dropped[f"{message['role']} turn before the first user turn"] += 1
            continue
        kept.append(message)
    while kept and kept[-1]["role"] != "assistant":
        dropped[f"{kept.pop()['role']} turn without an answer"] += 1
    return kept


def has_refusal(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether any answer begins like one of `REFUSALS`."""
    return any(
        message["role"] == "assistant"
        and message["content"].lstrip().replace("’", "'").lower().startswith(REFUSALS)
        for message in messages
    )
