"""Greedy continuation of a batch, the same for every backend."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from ctxlens.batching import Backend, TokenBatch
from ctxlens.models.sharing import choose
from ctxlens.steering import Steering


def continue_greedily(
    backend: Backend,
    batch: TokenBatch,
    steerings: Sequence[Steering],
    *,
    max_new_tokens: Sequence[int],
    stop_ids: Collection[int],
) -> list[list[int]]:
    """The most likely next token, again and again, until a stop token or the row's limit.

    Args:
        backend: the model.
        batch: left-padded prompts.
        steerings: what is steered; new tokens count as assistant tokens.
        max_new_tokens: the limit of every row.
        stop_ids: tokens that end a row; they are not part of what is returned.

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
                running[row] = len(written[row]) < max_new_tokens[row]
            tokens = torch.tensor(chosen, device=batch.tokens.device)[:, None]
    return written


__all__ = ["continue_greedily"]
