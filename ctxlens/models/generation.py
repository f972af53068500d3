"""Greedy continuation of a batch, the same for every backend."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import torch

from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.batch import TokenBatch
from ctxlens.models.backends.protocol import Backend
from ctxlens.models.sharing import Stop, choose

_SPARE = 4
"""How many more tokens than a stop string has bytes are decoded, because some tokens hold no text."""


def continue_greedily(
    backend: Backend,
    batch: TokenBatch,
    steerings: Sequence[Steering],
    *,
    max_new_tokens: Sequence[int],
    stop_ids: Collection[int],
    stop: Stop | None = None,
) -> list[list[int]]:
    """Append the most likely next token to every row until a stop token or the row's limit.

    Args:
        backend: the model.
        batch: left-padded prompts.
        steerings: what is steered; new tokens count as assistant tokens.
        max_new_tokens: the limit of every row.
        stop_ids: tokens that end a row; they are not part of the result.
        stop: takes the new tokens of a row and returns whether it is finished.

    Returns:
        The new tokens of every row.

    Raises:
        ModelFailureError: the model's logits are not numbers (NaN).
    """
    written: list[list[int]] = [[] for _ in max_new_tokens]
    running = [limit > 0 for limit in max_new_tokens]
    tokens = batch.tokens
    with backend.decoder(batch, steerings) as decode:
        while any(running):
            chosen = choose(decode(tokens))
            for row, token in enumerate(chosen):
                if not running[row]:
                    continue
                if token in stop_ids:
                    running[row] = False
                    continue
                written[row].append(token)
                running[row] = len(written[row]) < max_new_tokens[row] and not (stop and stop(written[row]))
            tokens = torch.tensor(chosen, device=batch.tokens.device)[:, None]
    return written


def stop_at(tokenizer: Any, strings: Sequence[str]) -> Stop | None:
    """A function that tells whether a growing text contains one of some strings; None without strings.

    The function is called after every new token. It decodes only the end of the text: a few tokens more than
    the longest string has bytes, since a token normally holds at least one byte. If a string is found there,
    the whole text is decoded and decides. Nothing is decoded after a token that contains the last character
    of none of the strings, because such a token completes no string.
    """
    strings = [string for string in strings if string]
    if not strings:
        return None
    reach = max(len(string.encode()) for string in strings) + _SPARE
    last = {string[-1] for string in strings}

    @cache
    def may_complete(token: int) -> bool:
        text = tokenizer.decode([token], skip_special_tokens=True)
        # Decoded alone, a token may lose its leading space, be part of a character, or be empty.
        return " " in last or "\ufffd" in text or not text or any(end in text for end in last)

    def holds_one(tokens: Sequence[int]) -> bool:
        if not may_complete(tokens[-1]):
            return False
        for some in (tokens[-reach:], tokens):
            text = tokenizer.decode(some, skip_special_tokens=True)
            if not any(string in text for string in strings):
                return False
        return True

    return holds_one


def cut_at(text: str, strings: Sequence[str]) -> str:
    """Cut a text before the first occurrence of each string, one string after the other."""
    for string in strings:
        if string:
            text = text.split(string)[0]
    return text


__all__ = ["continue_greedily", "cut_at", "stop_at"]
