"""Where a conversation's response stands, and the log-probabilities that a model gave its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64

from ctxlens.chat.roles import RenderedChat


@runtime_checkable
class EndReader(Protocol):
    """What is needed of a model."""

    def last_logprobs(
        self, chats: Sequence[RenderedChat], counts: Sequence[int], *, batch_tokens: int = 8192
    ) -> Iterator[tuple[int, Float[torch.Tensor, "last vocab"]]]:
        """See `Model.last_logprobs`."""
        ...


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


def read_at_ends(
    model: EndReader, chats: Sequence[RenderedChat], turn: int | None, batch_tokens: int
) -> list[Float[np.ndarray, " response_pos"]]:
    """The log-probabilities of responses, from the positions of each conversation's end.

    A prefix that several conversations share is read once. Under steering, the responses would count as
    written by the model.
    """
    positions = [find_response(chat, turn) for chat in chats]
    counts = [len(chat.tokens) + 1 - int(at[0]) for chat, at in zip(chats, positions, strict=True)]
    result: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(chats)
    for i, values in model.last_logprobs(chats, counts, batch_tokens=batch_tokens):
        at = positions[i]
        result[i] = pick_logprobs(chats[i], at, values[at - at[0]])
    return result


__all__ = ["find_response", "pick_logprobs", "read_at_ends"]
