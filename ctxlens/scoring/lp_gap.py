"""How much more likely the user's text makes an answer: an alternative to the attention score.

    lp_gap(turn) = mean over its response tokens of
        log p(token | everything before it) - log p(token | everything before it except the user's tokens)

in nats per token. The removed tokens are those that the attention score counts: every token of role `user`
(and `indicator`) before the response, in this turn and earlier ones. The system message, earlier answers,
tool results and the template's own tokens remain. The response's tokens stay the same, because tokens are
removed from the rendered conversation and nothing is rendered again. Above 0, the user's text makes the
answer more likely.

It costs two forward passes through all layers per conversation, regardless of the number of turns: in the
second pass, the user tokens of all turns are removed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from ctxlens.chat.data import Conversation, as_conversations
from ctxlens.chat.data.given_rows import Source
from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.errors import InputError
from ctxlens.results import Scores

COLUMNS = ("logprob", "logprob_without_user", "lp_gap")
"""What `add_lp_gap` adds to scores: mean log-probabilities per response token, and their difference."""

_CHUNK = 128


@runtime_checkable
class LogprobModel(Protocol):
    """What the gap requires of a model; `ctxlens.load_model` returns one."""

    @property
    def name(self) -> str: ...
    @property
    def n_ctx(self) -> int: ...

    def render(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> RenderedChat:
        """Render a conversation with the model's tokenizer and template."""
        ...

    def logprobs(
        self, chats: Sequence[RenderedChat], *, turn: int | None = None, batch_tokens: int = 8192
    ) -> list[Float[np.ndarray, " response_pos"]]:
        """Log-probability of every token of a response, in nats."""
        ...


def add_lp_gap(
    model: LogprobModel,
    conversations: Iterable[Conversation] | Source,
    scores: Scores,
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Add the log-probability gap of every scored turn, as columns `COLUMNS`, to scores.

    Args:
        model: the seed model; it may differ from the model of the attention scores.
        conversations: the data set that was scored, or what `load_conversations` takes.
        scores: its scores; conversations are truncated as for them (`meta["max_tokens"]`).
        batch_tokens: padded tokens in one forward pass.
        progress: called with the number of finished conversations and the total.

    Returns:
        The scores with three additional columns, equal in all rows of a turn. They are NaN for a response
        that only user text precedes, and for turns that are not among the conversations.

    Raises:
        InputError: log-probabilities are not numbers; the message names the turn.
    """
    wanted = set(scores.frame["conversation"].astype(str))
    max_tokens = min(scores.meta.get("max_tokens") or model.n_ctx, model.n_ctx)
    found: dict[tuple[str, int], tuple[float, float]] = {}
    waiting = (one for one in as_conversations(conversations) if one.id in wanted)
    done = 0
    while chunk := list(islice(waiting, _CHUNK)):
        chats = [model.render(one.messages, max_tokens=max_tokens, truncate=True) for one in chunk]
        for one, chat, means in zip(chunk, chats, _means(model, chats, batch_tokens), strict=True):
            for turn, pair in zip(chat.response_turns(), means, strict=True):
                if np.isinf(pair).any() or np.isnan(pair[0]):
                    raise InputError(
                        f"{model.name} gives log-probabilities that are not numbers in turn {turn} of "
                        f"conversation {one.id!r}; load it in float32 or check its weights."
                    )
                found[one.id, turn] = pair
        done += len(chunk)
        if progress is not None:
            progress(done, len(wanted))
    return Scores(_joined(scores, found), {**scores.meta, "lp_gap": {"model": model.name, "unit": "nats"}})


def _joined(scores: Scores, found: Mapping[tuple[str, int], tuple[float, float]]) -> Any:
    frame = scores.frame
    turns = zip(frame["conversation"].astype(str), frame["turn"].astype(int), strict=True)
    pairs = np.array([found.get(turn, (np.nan, np.nan)) for turn in turns], dtype=np.float32).reshape(-1, 2)
    values = (pairs[:, 0], pairs[:, 1], pairs[:, 0] - pairs[:, 1])
    return frame.assign(**dict(zip(COLUMNS, values, strict=True)))


def _means(
    model: LogprobModel, chats: Sequence[RenderedChat], batch_tokens: int
) -> list[list[tuple[float, float]]]:
    """For every response of every chat, its mean log-probability with and without the user's tokens."""
    full = [_as_one_response(chat) for chat in chats if chat.response_turns()]
    bare = [without_user(chat) for chat in full]
    sides = [_read(model, side, batch_tokens) for side in (full, bare)]
    read = iter(zip(*sides, strict=True))
    means = []
    for chat in chats:
        turns = chat.response_turns()
        if not turns:
            means.append([])
            continue
        lengths = [len(chat.response_positions(turn)) for turn in turns]
        ends = np.cumsum(lengths)[:-1]
        parts = [np.split(side, ends) for side in next(read)]
        means.append([(float(a.mean()), float(b.mean())) for a, b in zip(*parts, strict=True)])
    return means


def _read(
    model: LogprobModel, chats: Sequence[RenderedChat], batch_tokens: int
) -> list[Float[np.ndarray, " response_pos"]]:
    """Log-probabilities of all response tokens; NaN if the first one has no token before it."""
    read = [np.full(len(chat.response_positions()), np.nan) for chat in chats]
    able = [i for i, chat in enumerate(chats) if chat.response_positions()[0] > 0]
    values = model.logprobs([chats[i] for i in able], batch_tokens=batch_tokens) if able else []
    for i, value in zip(able, values, strict=True):
        read[i] = value.astype(np.float64)
    return read


def without_user(chat: RenderedChat) -> RenderedChat:
    """The conversation without the user's tokens and indicators; the remaining tokens become adjacent."""
    keep = ~chat.mask(Role.USER, Role.INDICATOR)
    return replace(
        chat,
        tokens=chat.tokens[keep], role=chat.role[keep], turn=chat.turn[keep], spans=chat.spans[keep],
        stops={}, openings={}, emphasised=None,
    )  # fmt: skip


def _as_one_response(chat: RenderedChat) -> RenderedChat:
    """The conversation with all responses counted as one, so that one pass reads them all."""
    last = chat.response_turns()[-1]
    turn = np.where(chat.role == Role.ASSISTANT, last, chat.turn).astype(chat.turn.dtype)
    return replace(chat, turn=turn, beheaded_turns=())


__all__ = ["COLUMNS", "LogprobModel", "add_lp_gap", "without_user"]
