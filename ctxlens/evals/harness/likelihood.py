"""How likely given continuations are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.evals.harness.requests import plan_requests
from ctxlens.models import Model

_AT_ONCE = 8
"""So many batches are planned together, so that what their contexts share is read once."""


@dataclass(frozen=True)
class Continuation:
    """A context and the tokens that follow it.

    Attributes:
        chat: the context.
        tokens: what follows; it counts as the assistant's.
    """

    chat: RenderedChat
    tokens: tuple[int, ...]

    @classmethod
    def of_tokens(cls, context: Sequence[int], after: Sequence[int]) -> Continuation:
        """A context of bare tokens: the first counts as BOS, the rest as the user's."""
        role = np.full(len(context), int(Role.USER), dtype=np.int8)
        role[0] = Role.BOS
        chat = RenderedChat(
            text="",
            tokens=np.asarray(context, dtype=np.int64),
            role=role,
            turn=np.zeros(len(context), dtype=np.int32),
            spans=np.zeros((len(context), 2), dtype=np.int32),
            messages=(),
            templated=False,
            stops={},
            open_ended=True,
        )
        return cls(chat, tuple(int(token) for token in after))

    @property
    def read(self) -> RenderedChat:
        """What the model reads: the context and all but the last of the tokens that follow."""
        more = len(self.tokens) - 1
        if not more:
            return self.chat
        return replace(
            self.chat,
            tokens=np.concatenate([self.chat.tokens, self.tokens[:-1]]).astype(np.int64),
            role=np.pad(self.chat.role, (0, more), constant_values=int(Role.ASSISTANT)),
            turn=np.pad(self.chat.turn, (0, more), constant_values=-1),
            spans=np.pad(self.chat.spans, ((0, more), (0, 0)), constant_values=len(self.chat.text)),
        )


def score_continuations(
    model: Model,
    asked: Sequence[Continuation],
    *,
    batch_tokens: int,
    rows: int | None = None,
    keep: Callable[[int, tuple[float, bool]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, bool]]:
    """The log-probability of every continuation, in nats, and whether each token of it is the likeliest.

    Continuations that differ in their last token only are read once.

    Args:
        model: the model, steered or not.
        asked: contexts and continuations.
        batch_tokens: padded tokens in one forward pass.
        rows: number of readings in one forward pass, in place of `batch_tokens`.
        keep: called with number and answer of each as soon as it is known.
        progress: called with the numbers done and in all.
    """
    answers: list[tuple[float, bool]] = [(0.0, True)] * len(asked)
    readings: dict[bytes, list[int]] = {}
    for index, one in enumerate(asked):
        if one.tokens:
            chat = one.read
            key = np.stack([chat.tokens, chat.role.astype(np.int64)]).tobytes()
            readings.setdefault(key, []).append(index)
        elif keep:
            keep(index, answers[index])
    members = list(readings.values())
    chats = [asked[group[0]].read for group in members]
    counts = [max(len(asked[index].tokens) for index in group) for group in members]
    done = 0
    sizes = [chat.n_tokens for chat in chats]
    for some in _together(plan_requests(chats, sizes, batch_tokens, rows)):
        budget = batch_tokens if rows is None else rows * max(sizes[k] for k in some)
        found = model.last_logprobs([chats[k] for k in some], [counts[k] for k in some], batch_tokens=budget)
        for place, logprobs in found:
            for index in members[some[place]]:
                answers[index] = _judge(logprobs, asked[index].tokens)
                if keep:
                    keep(index, answers[index])
                done += 1
        if progress:
            progress(done, len(asked))
    return answers


def _together(batches: Iterator[list[int]]) -> Iterator[list[int]]:
    waiting: list[list[int]] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) == _AT_ONCE:
            yield [index for one in waiting for index in one]
            waiting = []
    if waiting:
        yield [index for one in waiting for index in one]


def _judge(logprobs: torch.Tensor, tokens: Sequence[int]) -> tuple[float, bool]:
    rows = logprobs[-len(tokens) :]
    said = torch.tensor(tokens, device=rows.device)
    chosen = rows.gather(-1, said[:, None])[:, 0]
    return float(chosen.sum()), bool((rows.argmax(-1) == said).all())


__all__ = ["Continuation", "score_continuations"]
