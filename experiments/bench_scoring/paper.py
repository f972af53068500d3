"""The paper's way to the score, as its code runs it: one padded conversation, all patterns at once."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ctxlens.chat.roles import RenderedChat, Role


@torch.no_grad()
def score_as_the_paper(
    eager_model: Any, chat: RenderedChat, window: int, pad_id: int
) -> dict[int, Float[Tensor, " layer"]]:
    """The score of every assistant turn at every layer: the best head for each token, then the mean.

    Args:
        eager_model: the whole model with eager attention; its language-modelling head runs too.
        chat: a conversation of at most `window` tokens.
        window: tokens that the input is padded to, on the right.
        pad_id: the padding token.
    """
    device = eager_model.device
    n_tokens = len(chat.tokens)
    tokens = torch.full((1, window), pad_id)
    tokens[0, :n_tokens] = torch.tensor(chat.tokens.tolist())
    mask = (torch.arange(window) < n_tokens).long()[None]
    output = eager_model(
        input_ids=tokens.to(device), attention_mask=mask.to(device), output_attentions=True, use_cache=False
    )
    user = torch.tensor([*chat.mask(Role.USER).tolist(), *[False] * (window - n_tokens)], device=device)
    scores = {}
    for turn in chat.response_turns():
        rows = torch.tensor(chat.response_positions(turn).tolist(), device=device)
        by_layer = [pattern[0, :, rows][:, :, user].sum(-1).amax(0).mean() for pattern in output.attentions]
        scores[turn] = torch.stack(by_layer).float().cpu()
    return scores
