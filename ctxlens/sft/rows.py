"""Training rows: token ids, and labels that say which of them the loss is on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctxlens.data import Conversation
from ctxlens.errors import InputError
from ctxlens.roles import INDICATOR_KEY, RenderedChat, render, render_plain

IGNORED = -100
"""The label of a token that the loss is not on."""

LOSS_ON = ("assistant", "all")


@dataclass(frozen=True)
class TrainRows:
    """Rows for the trainer, and what became of the data.

    Attributes:
        rows: `input_ids` and `labels` of each, conversations first, then replayed texts.
        counts: `conversations` and `replay` (rows of each), `truncated`, `skipped`, `indicator_messages`,
            `tokens`, `trained_tokens`.
        skipped: id and reason of the conversations that were left out.
    """

    rows: list[dict[str, list[int]]]
    counts: Mapping[str, int]
    skipped: tuple[tuple[str, str], ...] = ()


def find_trained(chat: RenderedChat, loss_on: str = "assistant") -> np.ndarray:
    """`[pos]` booleans: the tokens that the loss is on.

    `assistant`: what the model has to write by itself (`RenderedChat.mask_written`): the responses, the
    template's text in them, and the tokens that end them. `all`: every token, as in the paper's released
    code.

    Raises:
        InputError: another `loss_on`.
    """
    _check_loss_on(loss_on)
    if loss_on == "all":
        return np.ones(chat.n_tokens, dtype=bool)
    return chat.mask_written()


def _check_loss_on(loss_on: str) -> None:
    if loss_on not in LOSS_ON:
        raise InputError(f'loss_on must be "assistant" or "all", got {loss_on!r}.')


def build_row(chat: RenderedChat, loss_on: str = "assistant", *, name: str = "") -> dict[str, list[int]]:
    """One rendered conversation as a training row.

    Raises:
        InputError: no token of it would be trained; the message names it.
    """
    trained = find_trained(chat, loss_on)
    if not trained[1:].any():
        raise InputError(
            f"conversation {name!r} has no token to train on: no assistant turn with content is left in it."
        )
    labels = np.where(trained, chat.tokens, IGNORED)
    return {"input_ids": chat.tokens.tolist(), "labels": labels.tolist()}


def build_rows(
    tokenizer: Any,
    conversations: Iterable[Conversation],
    *,
    indicator: str | None = None,
    loss_on: str = "assistant",
    replay_texts: Sequence[str] = (),
    max_tokens: int | None = None,
) -> TrainRows:
    """Render conversations and raw texts into training rows.

    A conversation that cannot be rendered or has no token to train on is left out, one that is too long is
    truncated (earliest content first, see `ctxlens.render`); both are counted. A replayed text is BOS (where
    the model's sequences have one) and the text, with the loss on all of it, cut at the end if too long.

    Args:
        tokenizer: the tokenizer, with its chat template.
        conversations: the conversations; user messages with `{"indicator": True}` get the indicator.
        indicator: the indicator, or None to train without.
        loss_on: see `find_trained`.
        replay_texts: raw texts.
        max_tokens: the longest row.

    Raises:
        InputError: nothing is left to train on.
    """
    _check_loss_on(loss_on)
    rows: list[dict[str, list[int]]] = []
    counts: Counter[str] = Counter(conversations=0, replay=0, truncated=0, skipped=0, indicator_messages=0)
    skipped: list[tuple[str, str]] = []
    for conversation in conversations:
        messages = conversation.messages
        try:
            chat = render(tokenizer, messages, indicator=indicator, max_tokens=max_tokens, truncate=True)
            rows.append(build_row(chat, loss_on, name=conversation.id))
        except InputError as error:
            skipped.append((conversation.id, str(error)))
            continue
        counts["truncated"] += chat.truncated is not None
        if indicator is not None:
            counts["indicator_messages"] += sum(bool(message.get(INDICATOR_KEY)) for message in messages)
    counts["conversations"], counts["skipped"] = len(rows), len(skipped)
    if skipped and not rows:
        raise InputError(f"none of {len(skipped)} conversations can be trained on: {skipped[0][1]}")
    for text in replay_texts:
        tokens = render_plain(tokenizer, [{"role": "user", "content": text}]).tokens.tolist()
        counts["truncated"] += max_tokens is not None and len(tokens) > max_tokens
        rows.append({"input_ids": tokens[:max_tokens], "labels": tokens[:max_tokens]})
        counts["replay"] += 1
    if not rows:
        raise InputError("there is nothing to train on; give conversations or replay texts.")
    counts["tokens"] = sum(len(row["labels"]) for row in rows)
    counts["trained_tokens"] = sum(label != IGNORED for row in rows for label in row["labels"][1:])
    return TrainRows(rows, dict(counts), tuple(skipped))


def draw_replay(texts: Sequence[str], n_conversations: int, share: float | None, seed: int) -> list[str]:
    """The raw texts to replay: all of them, or so many that they are a share of all rows.

    Texts are drawn without repeats as long as there are any left, then over again.

    Raises:
        InputError: a share outside [0, 1), or a share of no texts.
    """
    if share is None:
        return list(texts)
    if not 0 <= share < 1:
        raise InputError(f"replay_share is the share of replayed rows, from 0 to below 1, got {share}.")
    wanted = round(n_conversations * share / (1 - share))
    if wanted and not texts:
        raise InputError(f"replay_share is {share}, but there are no texts to replay; give some.")
    rng = np.random.default_rng(seed)
    drawn: list[str] = []
    while len(drawn) < wanted:
        drawn += [texts[int(k)] for k in rng.permutation(len(texts))[: wanted - len(drawn)]]
    return drawn
