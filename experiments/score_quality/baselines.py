"""Scores that need no model: lengths, and how much of the answer occurs in the prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ctxlens.chat.data import Conversation


def containment(response: str, prompt: str, n: int) -> float:
    """Share of the response's word n-grams that occur in the prompt, 0 to 1.

    Words are lower-cased; a response of fewer than `n` words is compared as a whole.
    """
    said, seen = words(response), words(prompt)
    n = min(n, len(said))
    if not n:
        return 0.0
    there = set(_grams(seen, n))
    grams = _grams(said, n)
    return sum(gram in there for gram in grams) / len(grams)


def words(text: str) -> list[str]:
    """The words of a text, lower-cased."""
    return re.findall(r"\w+", text.lower())


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]


def baselines(conversation: Conversation, turn: int) -> dict[str, float]:
    """The baselines' scores of one answer; the prompt is all that the user wrote before it."""
    asked = [m["content"] for m in conversation.messages[:turn] if m["role"] == "user"]
    prompt, response = "\n".join(asked), conversation.messages[turn]["content"]
    return {
        "prompt length": float(len(prompt)),
        "response length": float(len(response)),
        "overlap, words": containment(response, prompt, 1),
        "overlap, pairs of words": containment(response, prompt, 2),
    }
