"""Where a conversation's response stands, and the log-probabilities that a model gave its tokens."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64

from ctxlens.chat.roles import RenderedChat


def find_response(chat: RenderedChat, turn: int | None) -> Int64[np.ndarray, " response_pos"]:
    """The positions of a response, the last one by default.

    Raises:
        InputError: no such response, its first token was cut, or no token precedes it.
    """
    positions = chat.response_positions(turn)
    chat.first_answer_position(int(chat.turn[positions[0]]))
    return positions


def pick_logprobs(
    chat: RenderedChat,
    positions: Int64[np.ndarray, " response_pos"],
    logprobs: Float[torch.Tensor, "response_pos vocab"],
) -> Float[np.ndarray, " response_pos"]:
    """Of the log-probabilities of all next tokens, those of the tokens that stand at these positions."""
    said = torch.from_numpy(np.asarray(chat.tokens)[positions]).to(logprobs.device)
    return logprobs.gather(-1, said[:, None])[:, 0].cpu().numpy()


__all__ = ["find_response", "pick_logprobs"]
