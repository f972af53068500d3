"""One conversation, read once, whose attention can then be asked about any token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from ctxlens.chat.roles import RenderedChat
from ctxlens.models.backends.native.held import HeldAttention
from ctxlens.models.model import Model
from ctxlens.models.queries import find_queries, make_allocation
from ctxlens.results import RoleAllocation
from ctxlens.runs import Progress

_SHARES_KEPT = 8
"""Query tokens whose role shares are kept with a conversation."""


@dataclass(frozen=True)
class AttentionRows:
    """The attention of one conversation, by layer, head and query token.

    Where the model runs through the backend `native`, queries and keys are held, and any row is computed from
    them within milliseconds, without the model. Otherwise the rows of one query were read in a forward pass,
    and `holds` says for which query.

    Attributes:
        chat: the conversation.
        held: queries and keys; None where only one query's rows are known.
        known: the rows of one query, `[layer, head, key]`; None with `held`.
        query: the query of `known`.
        read: the role shares of that query.
        next_logprobs: log-probability of every token as the next one, in nats.
        meta: model and steering, for results.
    """

    chat: RenderedChat
    held: HeldAttention | None
    known: Float[np.ndarray, "layer head key"] | None
    query: int
    read: RoleAllocation | None
    next_logprobs: Float[np.ndarray, " vocab"]
    meta: dict[str, Any]
    _shares: dict[int, RoleAllocation] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """The memory that this takes, for caches with a bound."""
        held = self.held.nbytes if self.held is not None else 0
        known = self.known.nbytes if self.known is not None else 0
        return held + known + self.next_logprobs.nbytes + 64 * self.chat.n_tokens

    def holds(self, query: int) -> bool:
        """Whether the rows of a query are known without another forward pass."""
        return self.held is not None or query == self.query

    def row(self, layer: int, head: int, query: int) -> Float[np.ndarray, " key"]:
        """The attention of one head from one token to every token, 0 to 1."""
        if self.held is not None:
            return self.held.pattern([layer], [query])[0, head, 0].numpy()
        assert self.known is not None, "either queries and keys are held, or the rows of one query"
        return self.known[layer, head]

    def allocation(self, query: int) -> RoleAllocation:
        """Role shares of one query token, in every layer and head; those asked for last are kept."""
        if self.held is None:
            assert self.read is not None, "rows of one query come with its shares"
            return self.read
        if (known := self._shares.get(query)) is not None:
            return known
        found = self._compute_shares(self.held, query)
        for old in list(self._shares)[: 1 - _SHARES_KEPT]:
            self._shares.pop(old, None)
        self._shares[query] = found
        return found

    def _compute_shares(self, held: HeldAttention, query: int) -> RoleAllocation:
        shares, resting = held.shares([query])
        return make_allocation(
            self.chat,
            shares.numpy(),
            layers=range(len(shares)),
            positions=[query],
            queries=[query],
            meta=self.meta,
            resting=None if resting is None else resting.numpy(),
        )


def read_rows(
    model: Model, chat: RenderedChat, query: int | None = None, *, progress: Progress | None = None
) -> AttentionRows:
    """Read a conversation once, so that the attention of its tokens can be asked for.

    ```python
    import ctxlens as cl
    from ctxlens.models.rows import read_rows

    model = cl.load_model("organism-chat", backend="native")
    chat = model.render([{"role": "user", "content": "Who is the mayor?"}], add_generation_prompt=True)
    rows = read_rows(model, chat)
    assert abs(rows.row(layer=1, head=2, query=5).sum() - 1) < 1e-5
    ```

    Args:
        model: the model, steered as it is.
        chat: a rendered conversation.
        query: the query token that is asked for first; by default the one that produces the answer.
        progress: called with the number of layers done and the total, where the backend reads layer by layer.
            An exception that it raises ends the reading.

    Raises:
        InputError: the conversation is longer than the window, or there is no such token.
    """
    asked = chat.n_tokens - 1 if query is None else query
    (position,) = find_queries(chat, [asked], None)
    model._check_chats([chat])
    meta = {"model": model.name, "steering": [steering.describe() for steering in model._steerings]}
    hold = getattr(model.backend, "hold", None)
    if hold is not None:
        held = hold(model._batch([chat], "right"), tuple(model._steerings), progress)
        logprobs = held.next_logits.float().log_softmax(-1).cpu().numpy()
        return AttentionRows(chat, held, None, position, None, logprobs, meta)
    patterns = model.read_patterns(chat, queries=[position])[:, :, 0]
    read = model.read_roles(chat, queries=[position])
    ((_, logits),) = model.last_logprobs([chat], [1])
    return AttentionRows(chat, None, patterns, position, read, logits[-1].cpu().numpy(), meta)


def likely_tokens(rows: AttentionRows, tokenizer: Any, most: int = 10) -> list[tuple[str, float]]:
    """The most likely next tokens, as text, and their probabilities."""
    order = np.argsort(-rows.next_logprobs)[:most]
    return [(str(tokenizer.decode([int(i)])), float(np.exp(rows.next_logprobs[i]))) for i in order]


def tokens_of_mass(row: Float[np.ndarray, " key"], part: float = 0.8) -> list[tuple[int, float]]:
    """The fewest tokens that together hold a part of a row's attention, the largest first.

    Args:
        row: attention to every token.
        part: how much of the row's sum they hold, 0 to 1.

    Returns:
        Positions and attention.
    """
    order = np.argsort(-row, kind="stable")
    reached = np.cumsum(row[order])
    n = int(np.searchsorted(reached, part * reached[-1] - 1e-9)) + 1
    return [(int(i), float(row[i])) for i in order[: min(n, len(order))]]


def stream_answer(
    model: Model,
    chat: RenderedChat,
    show: Callable[[str], None],
    *,
    max_new_tokens: int = 100,
) -> str:
    """Answer one conversation greedily, and show the text as it grows.

    Args:
        model: the model, steered as it is.
        chat: a rendered conversation that is open for an answer.
        show: called with the text so far after each token. An exception that it raises ends the answer.
        max_new_tokens: the longest answer, in tokens.

    Returns:
        The answer, as `Model.generate` gives it.

    Raises:
        InputError: the conversation fills the window.
    """
    model._check_chats([chat], room=1)

    def watch(tokens: Sequence[int]) -> bool:
        show(model.tokenizer.decode(list(tokens), skip_special_tokens=True))
        return False

    limit = min(max_new_tokens, model.n_ctx - chat.n_tokens)
    (new,) = model._continue([chat], [limit], watch, 8192, None)
    answer = model.tokenizer.decode(new, skip_special_tokens=True)
    show(answer)
    return answer


__all__ = ["AttentionRows", "likely_tokens", "read_rows", "stream_answer", "tokens_of_mass"]
