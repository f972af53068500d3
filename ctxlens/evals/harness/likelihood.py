"""Log-probabilities of given continuations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.evals.harness.requests import plan_requests
from ctxlens.models import Model
from ctxlens.runs import Progress

_AT_ONCE = 8
"""Number of batches that the model gets together, so that a prefix shared by their contexts is read once."""

Score = tuple[float, bool]
"""Log-probability of a continuation in nats, and whether greedy decoding would say the same."""


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
    keep: Callable[[int, Score], None] | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """Score continuations: each one's log-probability, and whether it is what greedy decoding would say.

    Continuations that differ in their last token only are read once.

    Args:
        model: the model, steered or not.
        asked: contexts and continuations.
        batch_tokens: padded tokens in one forward pass.
        rows: number of texts in one forward pass, in place of `batch_tokens`.
        keep: called with the number and the score of each continuation as soon as it is known.
        progress: called with the numbers of scored and of all continuations.

    Returns:
        For each continuation the sum of its tokens' log-probabilities in nats, and whether every token of it
        is the most likely one. One without tokens has log-probability 0 and counts as greedy.
    """
    scores: list[Score] = [(0.0, True)] * len(asked)
    done = 0

    def note(found: Iterable[tuple[int, Score]]) -> None:
        nonlocal done
        for index, score in found:
            scores[index] = score
            done += 1
            if keep:
                keep(index, score)

    note((index, scores[index]) for index, one in enumerate(asked) if not one.tokens)
    for readings in _plan(asked, batch_tokens, rows):
        longest = max(reading.chat.n_tokens for reading in readings)
        note(_score(model, asked, readings, batch_tokens if rows is None else rows * longest))
        if progress:
            progress(done, len(asked))
    return scores


@dataclass(frozen=True)
class _Reading:
    """One text that the model reads, and the numbers of the continuations that it serves."""

    chat: RenderedChat
    members: list[int]


def _plan(asked: Sequence[Continuation], batch_tokens: int, rows: int | None) -> Iterator[list[_Reading]]:
    """The texts to be read, each once, in groups of `_AT_ONCE` batches."""
    members: dict[bytes, list[int]] = {}
    for index, one in enumerate(asked):
        if one.tokens:
            chat = one.read
            key = np.stack([chat.tokens, chat.role.astype(np.int64)]).tobytes()
            members.setdefault(key, []).append(index)
    readings = [_Reading(asked[group[0]].read, group) for group in members.values()]
    chats = [reading.chat for reading in readings]
    for some in _together(plan_requests(chats, [chat.n_tokens for chat in chats], batch_tokens, rows)):
        yield [readings[number] for number in some]


def _score(
    model: Model, asked: Sequence[Continuation], readings: Sequence[_Reading], batch_tokens: int
) -> Iterator[tuple[int, Score]]:
    """Number and score of every continuation that these texts serve."""
    counts = [max(len(asked[index].tokens) for index in reading.members) for reading in readings]
    chats = [reading.chat for reading in readings]
    for place, logprobs in model.last_logprobs(chats, counts, batch_tokens=batch_tokens):
        for index in readings[place].members:
            yield index, _judge(logprobs, asked[index].tokens)


def _together(batches: Iterator[list[int]]) -> Iterator[list[int]]:
    """The same indices with `_AT_ONCE` batches joined into one list."""
    waiting: list[list[int]] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) == _AT_ONCE:
            yield [index for one in waiting for index in one]
            waiting = []
    if waiting:
        yield [index for one in waiting for index in one]


def _judge(logprobs: torch.Tensor, tokens: Sequence[int]) -> Score:
    """The score of tokens under the log-probabilities at the last positions of what was read."""
    rows = logprobs[-len(tokens) :]
    said = torch.tensor(tokens, device=rows.device)
    chosen = rows.gather(-1, said[:, None])[:, 0]
    return float(chosen.sum()), bool((rows.argmax(-1) == said).all())


__all__ = ["Continuation", "Score", "score_continuations"]
