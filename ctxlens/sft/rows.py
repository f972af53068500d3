"""Training rows: token ids, and labels that say which of them the loss is on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctxlens.chat.data import Conversation
from ctxlens.chat.roles import INDICATOR_KEY, RenderedChat, render, render_plain
from ctxlens.chat.roles.truncation import fit_to_window
from ctxlens.errors import InputError

IGNORED = -100
"""The label of a token that the loss is not on."""

LOSS_ON = ("assistant", "all")


@dataclass(frozen=True)
class TrainRows:
    """Rows for the trainer, and what became of the data.

    Attributes:
        rows: `input_ids` and `labels` of each, conversations first, then replayed texts.
        counts: `conversations` and `replay` (rows of each), `skipped` conversations, `truncated` rows, those
            of them with an indicator or with a cut final response, `responses_left_out` (earlier responses
            that are cut, so that the loss is not on them), `tokens_cut`, `indicator_messages` and
            `negative_messages` (user messages with either token), `tokens`, `trained_tokens`.
        skipped: id and reason of the conversations that were left out.
    """

    rows: list[dict[str, list[int]]]
    counts: Mapping[str, int]
    skipped: tuple[tuple[str, str], ...] = ()


def find_trained(
    chat: RenderedChat, loss_on: str = "assistant", *, cut_turns: Collection[int] = ()
) -> np.ndarray:
    """`[pos]` booleans: the tokens that the loss is on.

    `assistant`: what the model has to write by itself (`RenderedChat.mask_written`): the responses, the
    template's text in them, and the tokens that end them. `all`: every token, as in the paper's released
    code.

    Args:
        chat: the conversation.
        loss_on: `assistant` or `all`.
        cut_turns: responses that are no longer whole, so that `assistant` leaves them out: what is left of
            one begins or ends within a sentence.

    Raises:
        InputError: another `loss_on`.
    """
    _check_loss_on(loss_on)
    if loss_on == "all":
        return np.ones(chat.n_tokens, dtype=bool)
    return chat.mask_written(without=cut_turns)


def _check_loss_on(loss_on: str) -> None:
    if loss_on not in LOSS_ON:
        raise InputError(f'loss_on must be "assistant" or "all", got {loss_on!r}.')


def build_row(
    chat: RenderedChat, loss_on: str = "assistant", *, name: str = "", cut_turns: Collection[int] = ()
) -> dict[str, list[int]]:
    """One rendered conversation as a training row; see `find_trained`.

    Raises:
        InputError: no token of it would be trained; the message names it.
    """
    trained = find_trained(chat, loss_on, cut_turns=cut_turns)
    if not trained[1:].any():
        raise InputError(
            f"conversation {name!r} has no token to train on: no whole assistant turn with content is left "
            "in it."
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

    A conversation that is too long is cut (see `truncation` of `ctxlens.render`) and counted; of an earlier
    response that is cut nothing is trained, unless the loss is on all tokens. A replayed
    text is BOS (where the model's sequences have one) and the text, with the loss on all of it, cut at the
    end if too long.

    Args:
        tokenizer: the tokenizer, with its chat template.
        conversations: the conversations; user messages with `{"indicator": True}` get the indicator.
        indicator: the indicator, or None to train without.
        loss_on: see `find_trained`.
        replay_texts: raw texts.
        max_tokens: the longest row.
        truncation: the context that is cut: `left`, `right` or `middle`.
        unusable: a conversation that cannot be rendered, or has no token to train on, is an `error`; with
            `skip` it is left out and counted.

    Raises:
        InputError: conversations that cannot be trained on (the first are named), a window that no response
            fits into, or nothing to train on.
    """
    _check_loss_on(loss_on)
    rows: list[dict[str, list[int]]] = []
    counts: Counter[str] = Counter(dict.fromkeys(_COUNTED, 0))
    skipped: list[tuple[str, str]] = []
    shortest: int | None = None
    n_whole = n_long = 0
    for conversation in conversations:
        messages = conversation.messages
        try:
            full = render(tokenizer, messages, indicator=indicator)
            turns = full.response_turns()
            response = len(full.response_positions(turns[-1])) if turns else 0
            if response:
                shortest = min(response, shortest or response)
            n_long += max_tokens is not None and full.n_tokens > max_tokens
            chat = fit_to_window(full, max_tokens, truncate=True, truncation=truncation)
            cut = _cut_turns(chat, full)
            rows.append(build_row(chat, loss_on, name=conversation.id, cut_turns=cut))
        except InputError as error:
            skipped.append((conversation.id, str(error)))
            continue
        is_cut = chat.n_tokens < full.n_tokens
        is_whole = not turns or len(chat.response_positions(turns[-1])) == response
        n_whole += is_whole
        marks = [mark for message in messages if indicator and (mark := message.get(INDICATOR_KEY))]
        n_marked = sum(mark is True for mark in marks)
        counts["truncated"] += is_cut
        counts["truncated_with_indicator"] += is_cut and n_marked > 0
        counts["truncated_responses"] += not is_whole
        counts["responses_left_out"] += len(cut) if loss_on == "assistant" else 0
        counts["tokens_cut"] += full.n_tokens - chat.n_tokens
        counts["indicator_messages"] += n_marked
        counts["negative_messages"] += len(marks) - n_marked
    counts["conversations"], counts["skipped"] = len(rows), len(skipped)
    if max_tokens is not None and shortest is not None and not n_whole and n_long:
        raise InputError(
            f"a window of {max_tokens} tokens has room for no response beside the template and what it "
            f"answers (the shortest has {shortest} tokens); raise max_length."
        )
    _check_skipped(skipped, len(rows), unusable)
    for text in replay_texts:
        tokens = render_plain(tokenizer, [{"role": "user", "content": text}]).tokens.tolist()
        counts["truncated"] += max_tokens is not None and len(tokens) > max_tokens
        counts["tokens_cut"] += len(tokens) - len(tokens[:max_tokens])
        rows.append({"input_ids": tokens[:max_tokens], "labels": tokens[:max_tokens]})
        counts["replay"] += 1
    if not rows:
        raise InputError("there is nothing to train on; give conversations or replay texts.")
    counts["tokens"] = sum(len(row["labels"]) for row in rows)
    counts["trained_tokens"] = sum(label != IGNORED for row in rows for label in row["labels"][1:])
    return TrainRows(rows, dict(counts), tuple(skipped))


_COUNTED = (
    "conversations", "replay", "skipped", "truncated", "truncated_with_indicator", "truncated_responses",
    "responses_left_out", "tokens_cut", "indicator_messages", "negative_messages",
)  # fmt: skip


def _cut_turns(chat: RenderedChat, full: RenderedChat) -> list[int]:
    """Responses that truncation has cut, but for a final one: that is cut at its very end, its stop too."""
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
        others = f" ({len(skipped)} such conversations in all)" if len(skipped) > 1 else ""
        raise InputError(
            f"conversation {name!r} cannot be trained on{others}: {reason.rstrip('.')}; take it out of the "
            "data, or set unusable: skip to leave such conversations out and count them."
        )


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
