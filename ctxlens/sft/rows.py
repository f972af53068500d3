"""Training rows: token ids, and labels that say which tokens contribute to the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from ctxlens.chat.data import Conversation
from ctxlens.chat.roles import INDICATOR_KEY, TRAIN_KEY, RenderedChat, render, render_plain
from ctxlens.chat.roles.truncation import fit_to_window
from ctxlens.errors import InputError
from ctxlens.sft.keys.training import LossOn

IGNORED = -100
"""The label of a token that does not contribute to the loss."""

LOSS_ON: tuple[str, ...] = get_args(LossOn)


@dataclass(frozen=True)
class TrainRows:
    """Rows for the trainer, and counts of what happened to the data.

    Attributes:
        rows: `input_ids` and `labels` of each row; conversations come first, then raw texts.
        counts: `conversations` and `replay` (rows of each kind), `skipped` conversations, `truncated` rows,
            `truncated_with_indicator` and `truncated_responses` (truncated rows with an indicator, and those
            whose final response is truncated), `responses_left_out` (earlier responses that are not trained
            on, because they are truncated), `answers_without_loss` (answers that the data exclude from
            training, kept as context), `conversations_without_loss` (conversations that are left out because
            the data exclude all their answers), `tokens_cut`, `indicator_messages` and `negative_messages`
            (user messages with either token), `tokens`, `trained_tokens`.
        skipped: id of every conversation that was skipped, and why.
        left_out: what the chat template leaves out of the conversations, and how often.
        noted: what was read in another way than the data have it, and how often.
    """

    rows: list[dict[str, list[int]]]
    counts: Mapping[str, int]
    skipped: tuple[tuple[str, str], ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    noted: Mapping[str, int] = field(default_factory=dict)


def find_trained(
    chat: RenderedChat,
    loss_on: str = "assistant",
    *,
    cut_turns: Collection[int] = (),
    untrained: Collection[int] = (),
) -> np.ndarray:
    """Find the tokens that contribute to the loss.

    Args:
        chat: the conversation.
        loss_on: `assistant`: what the model has to write (`RenderedChat.mask_written`), which is the
            responses, the template's text in them, and the tokens that end them. `all`: every token, as in
            the paper's released code.
        cut_turns: truncated responses, which `assistant` leaves out, because they begin or end within a
            sentence.
        untrained: answers that the data exclude from training; neither choice trains on them.

    Returns:
        Booleans of shape `[pos]`.

    Raises:
        InputError: `loss_on` has another value.
    """
    _check_loss_on(loss_on)
    if loss_on == "all":
        return ~chat.mask_written(without=set(chat.response_turns()).difference(untrained))
    return chat.mask_written(without={*cut_turns, *untrained})


def _check_loss_on(loss_on: str) -> None:
    if loss_on not in LOSS_ON:
        raise InputError(f'loss_on must be "assistant" or "all", got {loss_on!r}.')


def build_row(
    chat: RenderedChat,
    loss_on: str = "assistant",
    *,
    name: str = "",
    cut_turns: Collection[int] = (),
    untrained: Collection[int] = (),
) -> dict[str, list[int]]:
    """Make the training row of a rendered conversation; see `find_trained`.

    Raises:
        InputError: no token would contribute to the loss; the message contains `name`.
    """
    trained = find_trained(chat, loss_on, cut_turns=cut_turns, untrained=untrained)
    if not trained[1:].any():
        raise InputError(
            f"conversation {name!r} has no token to train on: it contains no complete assistant turn with "
            "content."
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
    truncation: str = "left",
    unusable: str = "error",
) -> TrainRows:
    """Render conversations and raw texts into training rows.

    A conversation that is too long is truncated (see `truncation` of `ctxlens.render`) and counted. We do not
    train on earlier responses that were truncated, unless the loss is on all tokens. An answer with
    `{"train": False}` is context and has no loss; a conversation without another answer is left out. The row
    of a raw text is BOS (if the model's sequences begin with one) and the text; the loss is on all of it, and
    a text that is too long is truncated at its end.

    Args:
        tokenizer: the tokenizer, with its chat template.
        conversations: the conversations; user messages with `{"indicator": True}` get the indicator.
        indicator: the indicator, or None to train without one.
        loss_on: see `find_trained`.
        replay_texts: raw texts.
        max_tokens: the maximum length of a row.
        truncation: where the context is truncated: `left`, `right` or `middle`.
        unusable: what to do with a conversation that cannot be rendered, or has no token to train on:
            `error`, or `skip` it and count it.

    Raises:
        InputError: conversations cannot be trained on (the message names the first), no response fits into
            the window, or there is nothing to train on.
    """
    _check_loss_on(loss_on)
    rows: list[dict[str, list[int]]] = []
    counts: Counter[str] = Counter(dict.fromkeys(_COUNTED, 0))
    skipped: list[tuple[str, str]] = []
    sizes: list[tuple[int, int]] = []
    left_out: Counter[str] = Counter()
    for conversation in conversations:
        untrained, is_trained = _read_training(conversation)
        if not is_trained:
            counts["conversations_without_loss"] += 1
            continue
        try:
            full = render(tokenizer, conversation.messages, indicator=indicator)
            sizes.append((full.n_tokens, _final_response_tokens(full)))
            chat = fit_to_window(full, max_tokens, truncate=True, truncation=truncation)
            cut = _cut_turns(chat, full)
            row = build_row(chat, loss_on, name=conversation.id, cut_turns=cut, untrained=untrained)
        except InputError as error:
            skipped.append((conversation.id, str(error)))
            continue
        rows.append(row)
        marks = _read_marks(conversation) if indicator else []
        counts.update(_count_truncation(chat, full, marks, len(cut) if loss_on == "assistant" else 0))
        counts["answers_without_loss"] += len(untrained)
        left_out.update(full.left_out)
    n_usable = len(rows)
    _check_window(sizes, max_tokens, n_whole=n_usable - counts["truncated_responses"])
    _check_skipped(skipped, n_usable, unusable)
    _add_replay(tokenizer, replay_texts, max_tokens, rows, counts, skipped)
    _check_not_empty(rows, counts)
    counts.update(
        conversations=n_usable,
        skipped=len(skipped),
        tokens=sum(len(row["labels"]) for row in rows),
        trained_tokens=sum(label != IGNORED for row in rows for label in row["labels"][1:]),
    )
    return TrainRows(rows, dict(counts), tuple(skipped), dict(left_out.most_common()))


def _add_replay(
    tokenizer: Any,
    texts: Sequence[str],
    max_tokens: int | None,
    rows: list[dict[str, list[int]]],
    counts: Counter[str],
    skipped: list[tuple[str, str]],
) -> None:
    """Add the rows of raw texts; a text that cannot be encoded is skipped."""
    for number, text in enumerate(texts):
        try:
            tokens = render_plain(tokenizer, [{"role": "user", "content": text}]).tokens.tolist()
        except InputError as error:
            skipped.append((f"replay text {number}", str(error)))
            continue
        kept = tokens[:max_tokens]
        rows.append({"input_ids": kept, "labels": list(kept)})
        counts.update(replay=1, truncated=len(kept) < len(tokens), tokens_cut=len(tokens) - len(kept))


def _check_not_empty(rows: Sequence[Any], counts: Mapping[str, int]) -> None:
    if rows:
        return
    if counts["conversations_without_loss"]:
        raise InputError(
            "there is nothing to train on: the data exclude every answer from training, by weight 0 or by "
            "train, trainable or label false."
        )
    raise InputError("there is nothing to train on; give conversations or replay texts.")


_COUNTED = (
    "conversations", "replay", "skipped", "truncated", "truncated_with_indicator", "truncated_responses",
    "responses_left_out", "answers_without_loss", "conversations_without_loss", "tokens_cut",
    "indicator_messages", "negative_messages",
)  # fmt: skip


def _read_training(conversation: Conversation) -> tuple[list[int], bool]:
    """The answers that the data exclude from training, and whether any answer is left (or there was none)."""
    answers = [at for at, message in enumerate(conversation.messages) if message.get("role") == "assistant"]
    untrained = [at for at in answers if conversation.messages[at].get(TRAIN_KEY) is False]
    return untrained, not untrained or len(untrained) < len(answers)


def _read_marks(conversation: Conversation) -> list[bool | str]:
    """The marks of a conversation's messages: True for the indicator, a text for another token."""
    return [mark for message in conversation.messages if (mark := message.get(INDICATOR_KEY))]


def _count_truncation(
    chat: RenderedChat, full: RenderedChat, marks: Sequence[bool | str], n_left_out: int
) -> dict[str, int]:
    """What one row adds to `TrainRows.counts`.

    Args:
        chat: the conversation as it is trained on.
        full: the same conversation before truncation.
        marks: the marks of its messages.
        n_left_out: number of responses that are not trained on, because they are truncated.
    """
    is_truncated = chat.n_tokens < full.n_tokens
    n_marked = sum(mark is True for mark in marks)
    return {
        "truncated": is_truncated,
        "truncated_with_indicator": is_truncated and n_marked > 0,
        "truncated_responses": _final_response_tokens(chat, full) < _final_response_tokens(full),
        "responses_left_out": n_left_out,
        "tokens_cut": full.n_tokens - chat.n_tokens,
        "indicator_messages": n_marked,
        "negative_messages": len(marks) - n_marked,
    }


def _final_response_tokens(chat: RenderedChat, full: RenderedChat | None = None) -> int:
    """Number of tokens that are left of the final response of `full` (by default the same conversation)."""
    turns = (full or chat).response_turns()
    return len(chat.response_positions(turns[-1])) if turns else 0


def _check_window(sizes: Sequence[tuple[int, int]], max_tokens: int | None, *, n_whole: int) -> None:
    """Refuse a window into which no final response fits.

    Args:
        sizes: tokens of every conversation that was rendered, and of its final response.
        max_tokens: the window.
        n_whole: number of rows whose final response is whole.
    """
    responses = [response for _, response in sizes if response]
    if max_tokens is None or n_whole or not responses or all(tokens <= max_tokens for tokens, _ in sizes):
        return
    raise InputError(
        f"a window of {max_tokens} tokens has room for no response besides the template and the question "
        f"(the shortest response has {min(responses)} tokens); raise max_length."
    )


def _cut_turns(chat: RenderedChat, full: RenderedChat) -> list[int]:
    """The truncated responses, except the final one, which only loses its end and is trained on."""
    final = len(chat.messages) - 1
    return [
        turn
        for turn in chat.response_turns()
        if turn != final and len(chat.response_positions(turn)) < len(full.response_positions(turn))
    ]


def _check_skipped(skipped: Sequence[tuple[str, str]], n_rows: int, unusable: str) -> None:
    if not skipped:
        return
    name, reason = skipped[0]
    if not n_rows:
        raise InputError(f"none of {len(skipped)} conversations can be trained on: {reason}")
    if unusable == "error":
        others = f" ({len(skipped)} such conversations in total)" if len(skipped) > 1 else ""
        raise InputError(
            f"conversation {name!r} cannot be trained on{others}: {reason.rstrip('.')}; remove it from the "
            "data, or set unusable: skip to skip and count such conversations."
        )


__all__ = ["IGNORED", "TrainRows", "build_row", "build_rows", "find_trained"]
