"""Marks the user messages that get the indicator, and finds data that cannot teach it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Iterable, Sequence

from ctxlens.chat.data import Conversation, fingerprint_conversations
from ctxlens.chat.data.annotate import annotate_messages
from ctxlens.chat.roles import INDICATOR_KEY
from ctxlens.errors import InputError
from ctxlens.results import Selection
from ctxlens.sft.keys import TrainConfig
from ctxlens.sft.variants import answered_messages, draw_control, drop_marks, mark_rest, repeat_selected


class IndicatorWarning(UserWarning):
    """The indicator will not be learned, or cannot be used, as intended."""


Turns = Collection[tuple[str, int]]
"""Assistant turns, each as the id of its conversation and the index of its message."""


def mark_data(
    data: Sequence[Conversation], selection: Selection | Turns | None, config: TrainConfig, *, seed: int = 0
) -> list[Conversation]:
    """Apply a selection to the data as the recipe says.

    The user messages that the selected turns answer are marked with the indicator. A recipe can also replace
    the selection by a random one, drop some marks, mark the other messages with a second indicator, and
    repeat the selected conversations (`ctxlens.sft.variants`).

    Args:
        data: the conversations.
        selection: the selected turns, or None.
        config: the recipe's keys.
        seed: seed of all random draws.

    Warns:
        IndicatorWarning: no user message carries the indicator, or all of them do, or the data already
            contain it.

    Raises:
        InputError: the recipe has no use for the selection, or needs one that is not given; the selection
            was made from other data; no message carries the indicator although `require_selected` is set;
            or the data contain the indicator as text (unless `indicator_in_data` is `keep`).
    """
    check_use(selection, config)
    turns = choose_turns(data, selection, config, seed)
    if config.indicator is not None:
        marked, warned = add_marks(data, None if selection is None else turns, config.indicator, config)
        for text in warned:
            warnings.warn(text, IndicatorWarning, stacklevel=4)  # the caller of `train`
        data = drop_marks(marked, config.indicator_dropout, seed)
    return repeat_selected(data, turns, config.upsample_selected)


def check_use(selection: Selection | Turns | None, config: TrainConfig) -> None:
    """Check that the recipe uses the selection that is given, and is given the one that it needs."""
    if selection is not None and config.indicator is None and config.upsample_selected == 1:
        raise InputError(
            'a selection is given but no indicator to mark it with; give indicator="[IND]", or no selection.'
        )
    if selection is None and (config.upsample_selected > 1 or config.selection_control != "none"):
        raise InputError(
            "upsample_selected and selection_control need a selection; give one (ctxlens select)."
        )
    if config.indicator is None and config.require_selected:
        raise InputError('require_selected needs an indicator; give indicator="[IND]".')


def choose_turns(
    data: Sequence[Conversation], selection: Selection | Turns | None, config: TrainConfig, seed: int
) -> Turns:
    """The turns that count as selected: the selection's, or as many random ones as a control."""
    if selection is None:
        return ()
    _check_fingerprint(data, selection)
    turns = selection.turns if isinstance(selection, Selection) else selection
    if config.selection_control == "random":
        return draw_control(data, _count_asked(data, turns), seed)
    return turns


def add_marks(
    data: Sequence[Conversation], turns: Turns | None, indicator: str, config: TrainConfig
) -> tuple[list[Conversation], list[str]]:
    """Mark the user messages that the turns answer, and with a second indicator the others if wanted.

    Args:
        data: the conversations.
        turns: the selected turns; None to leave the marks of the data as they are.
        indicator: the indicator.
        config: the recipe's keys.

    Returns:
        The marked conversations, and the warnings about them.
    """
    warned = []
    marked = list(data)
    if turns is not None:
        if n_before := _count_marked(data):
            warned.append(f"{n_before} user messages of the data are already marked and remain so.")
        marked = annotate_messages(data, turns)
    written = _find_written(marked, indicator, config.indicator_in_data)
    warned += [*written, *_check_learnable(marked, indicator, bool(written), config.require_selected)]
    if config.negative_indicator is not None:
        warned += _find_written(marked, config.negative_indicator, config.indicator_in_data)
        marked = mark_rest(marked, config.negative_indicator, indicator=indicator)
    return marked, warned


def _check_learnable(
    data: Sequence[Conversation], indicator: str, is_written: bool, is_required: bool
) -> list[str]:
    """Warnings about an indicator that no message carries, or all of them do."""
    n_marked, n_answered = _count_marked(data), sum(len(answered_messages(one)) for one in data)
    if not n_marked and not is_written:
        meaning = (
            f"no user message carries the indicator {indicator} (no turn is selected), so it is not trained "
            "and will mean nothing to the model"
        )
        if is_required:
            raise InputError(f"{meaning}; lower the threshold β of the selection, or give other data.")
        return [f"{meaning}."]
    if n_answered and n_marked >= n_answered:
        return [
            f"all {n_answered} answered user messages carry the indicator {indicator}, so the model cannot "
            "learn a difference between prompts with and without it; raise the threshold β of the selection."
        ]
    return []


def _check_fingerprint(data: Sequence[Conversation], selection: Selection | Turns) -> None:
    known = selection.meta.get("fingerprint") if isinstance(selection, Selection) else None
    if known is not None and known != fingerprint_conversations(data):
        raise InputError(
            "the selection was made from other conversations: some were added, removed or changed; give the "
            "data that were scored (same split, layout and limit), or select again."
        )


def _count_asked(data: Sequence[Conversation], turns: Turns) -> int:
    """How many user messages these turns answer; two turns around a tool call answer the same one."""
    return _count_marked(annotate_messages(drop_marks(data, 1.0, 0), turns))


def _count_marked(data: Iterable[Conversation]) -> int:
    return sum(message.get(INDICATOR_KEY) is True for one in data for message in one.messages)


def _find_written(data: Iterable[Conversation], indicator: str, choice: str) -> list[str]:
    """A warning if messages contain the indicator as text, or an error if the recipe does not keep them."""
    found = [
        (one.id, index)
        for one in data
        for index, message in enumerate(one.messages)
        if indicator in (message.get("content") or "")
    ]
    if not found:
        return []
    name, index = found[0]
    what = (
        f"{len(found)} messages of the data already contain the indicator {indicator} as text, for instance "
        f"message {index} of conversation {name!r}"
    )
    if choice == "error":
        raise InputError(
            f"{what}; set indicator_in_data: keep to train on them unchanged, or choose another indicator."
        )
    return [f"{what}; they are kept."]


def hash_data(data: Iterable[Conversation], texts: Iterable[str]) -> str:
    """A short fingerprint of the marked conversations and the raw texts, in their order.

    It is computed item by item, so that large data are never joined into one text, and its values stand in
    the manifests of finished runs; that is why it is not `ctxlens.runs.digest`.
    """
    digest = hashlib.sha256()
    for conversation in data:
        content = [conversation.id, [dict(message) for message in conversation.messages]]
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    for text in texts:
        digest.update(json.dumps(text).encode())
    return digest.hexdigest()[:16]


__all__ = ["IndicatorWarning", "Turns", "hash_data", "mark_data"]
