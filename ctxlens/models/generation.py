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
"""Tokens that are decoded beyond the bytes of a stop string, for such as hold no text."""


def continue_greedily(
    backend: Backend,
    batch: TokenBatch,
    steerings: Sequence[Steering],
    *,
    max_new_tokens: Sequence[int],
    stop_ids: Collection[int],
    stop: Stop | None = None,
) -> list[list[int]]:
    """The most likely next token, again and again, until a stop token or the row's limit.

    Args:
        backend: the model.
        batch: left-padded prompts.
        steerings: what is steered; new tokens count as assistant tokens.
        max_new_tokens: the limit of every row.
        stop_ids: tokens that end a row; they are not part of what is returned.
        stop: told what a row has written so far, says whether it is finished.

    Returns:
        The new tokens of every row.

    Raises:
        ModelFailureError: the model's logits are no numbers.
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
    """Whether a text holds one of some strings, asked token by token as it grows; None: there are none.

    Only the end of the text is decoded, as many tokens as the longest string has bytes and some more (a token
    holds at least one byte); where a string is found there, the whole text decides. Nothing is decoded after
    a token that holds the last character of none of the strings, because it completes none.
    """
    strings = [string for string in strings if string]
    if not strings:
        return None
    reach = max(len(string.encode()) for string in strings) + _SPARE
    last = {string[-1] for string in strings}

    @cache
    def may_complete(token: int) -> bool:
        text = tokenizer.decode([token], skip_special_tokens=True)
        # By itself a token may lose its blank, or be part of a character, or change the one before it.
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
    """A text up to the first of some strings, one string after the other."""
    for string in strings:
        if string:
            text = text.split(string)[0]
    return text


__all__ = ["continue_greedily", "cut_at", "stop_at"]
