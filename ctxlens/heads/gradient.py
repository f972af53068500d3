"""All heads at once: the derivative of the needle's log-probability by every head's attention bias."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ctxlens.chat.roles import RenderedChat
from ctxlens.heads.answers import Answers
from ctxlens.heads.parts import ARRAY_PARTS
from ctxlens.models import Model
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.batch import TokenBatch
from ctxlens.results import HeadMap
from ctxlens.runs import Parts, Progress, Run


@dataclass(frozen=True, eq=False)
class _WeightedSteering(Steering):
    """Steering by one nat times a differentiable weight per head."""

    weights: Tensor | None = None

    def head_select(self, layer: int, n_heads: int) -> Float[Tensor, " head"]:
        assert self.weights is not None
        return self.weights[layer]


def gradient_map(
    model: Model,
    answers: Answers,
    *,
    out: Run | None = None,
    progress: Progress | None = None,
) -> HeadMap:
    """How fast the needle's log-probability grows as each head is steered, from one backward pass per cell.

    Steering a head with α = exp(-w) adds a bias of -w nats to every token but the user's. The map is the
    derivative by w at w = 0, in nats per token per nat. Multiplied by log(1/α), it is the first-order
    estimate of steering that head alone (`estimate_steering`). Blinding is the limit of w to minus infinity.

    Args:
        model: the model.
        answers: the cells and how they are asked; the measure is the log-probability.
        out: a run folder in which finished cells are kept.
        progress: called with the number of finished cells and the total.
    """
    answers = replace(answers, measure="logprob")
    parts = Parts(out, "gradient", [model.identity, answers.as_dict()], form=ARRAY_PARTS)
    effects = []
    for number, (chat, cell) in enumerate(zip(answers.said(model), answers.cells, strict=True)):

        def differentiate(chat: RenderedChat = chat, number: int = number) -> np.ndarray:
            return bias_gradient(model, chat, answers.positions(chat, answers.cells[number]))

        effects.append(parts.get(str(cell.number), differentiate))
        if progress:
            progress(number + 1, len(answers.cells))
    meta = {
        **answers.describe(model),
        "quantity": "derivative of the needle's log-probability (nats per token) by the bias (nats)",
    }
    return HeadMap(np.stack(effects), answers.contexts, "gradient", meta)


def bias_gradient(model: Model, chat: RenderedChat, positions: np.ndarray) -> Float[np.ndarray, "layer head"]:
    """Derivative of the mean log-probability of some tokens by each head's steering, in one pass.

    Args:
        model: the model.
        chat: the conversation.
        positions: the tokens whose log-probability counts; position 0 is not allowed.
    """
    weights = torch.zeros(model.n_layers, model.n_heads, requires_grad=True)
    steering = _WeightedSteering(math.exp(-1.0), weights=weights)
    batch = TokenBatch.from_chats([chat], pad_id=0, side="right", device=model.device)
    logits = model.backend.logits(batch, [steering], grad=True)[0]
    at = torch.as_tensor(positions, device=logits.device)
    said = batch.tokens[0].to(logits.device)[at]
    mean = logits[at - 1].float().log_softmax(-1).gather(-1, said[:, None]).mean()
    (gradient,) = torch.autograd.grad(mean, [weights])
    return gradient.numpy()


def estimate_steering(found: HeadMap, alpha: float) -> HeadMap:
    """The first-order estimate of steering each head alone with strength α, from a `gradient_map`."""
    Steering(alpha)  # raises for an alpha that is out of range
    quantity = "estimated change of the needle's log-probability, nats per token"
    meta = {**found.meta, "alpha": alpha, "quantity": quantity}
    return replace(found, effects=found.effects * -math.log(alpha), kind="estimate", meta=meta)


__all__ = ["bias_gradient", "estimate_steering", "gradient_map"]
