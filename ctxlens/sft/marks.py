"""Which user messages get the indicator, and what is wrong with data that cannot teach it."""

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
from ctxlens.sft.config import TrainConfig
from ctxlens.sft.variants import answered_messages, draw_control, drop_marks, mark_rest, repeat_selected


class IndicatorWarning(UserWarning):
    """An indicator that will not be learned, or cannot be used, as it is meant to."""


def mark_data(
    data: Sequence[Conversation],
    selection: Selection | Collection[tuple[str, int]] | None,
    config: TrainConfig,
    *,
    seed: int = 0,
) -> list[Conversation]:
    """Mark the user messages that the selected turns answer, and check that the indicator can be learned.

    What else the recipe does with the selection happens here too (`ctxlens.sft.variants`): a random one in
    its place, some marks left out, a token for the rest, the selected conversations more than once.

    Warns (`IndicatorWarning`) where no message carries it, or all do, or the data have it already.

    Raises:
        InputError: a selection with nothing to use it for, or of other data; none for what needs one; with
            `require_selected` also no message that carries it; somebody wrote the indicator in the data
            (unless `indicator_in_data` is `keep`).
    """
    indicator = config.indicator
    if selection is not None and indicator is None and config.upsample_selected == 1:
        raise InputError(
            'a selection is given but no indicator to mark it with; give indicator="[IND]", or no selection.'
        )
    if selection is None and (config.upsample_selected > 1 or config.selection_control != "none"):
        raise InputError(
            "upsample_selected and selection_control need a selection; give one (ctxlens select)."
        )
    turns: Collection[tuple[str, int]] = ()
    if selection is not None:
        _check_fingerprint(data, selection)
        turns = selection.turns if isinstance(selection, Selection) else selection
        if config.selection_control == "random":
            turns = draw_control(data, _count_asked(data, turns), seed)
    if indicator is None:
        if config.require_selected:
            raise InputError('require_selected needs an indicator; give indicator="[IND]".')
        return repeat_selected(data, turns, config.upsample_selected)
    n_marked_before = _count_marked(data)
    if selection is not None:
        if n_marked_before:
            _warn(f"{n_marked_before} user messages of the data are marked already; they stay so.")
        data = annotate_messages(data, turns)
    n_written = _check_written(data, indicator, config.indicator_in_data)
    n_marked, n_answered = _count_marked(data), sum(len(answered_messages(one)) for one in data)
    if not n_marked and not n_written:
        meaning = (
            f"no user message carries the indicator {indicator} (no turn is selected), so it is not trained "
            "and will mean nothing to the model"
        )
        if config.require_selected:
            raise InputError(f"{meaning}; lower the threshold β of the selection, or give other data.")
        _warn(f"{meaning}.")
    elif n_answered and n_marked >= n_answered:
        _warn(
            f"all {n_answered} answered user messages carry the indicator {indicator}, so the model cannot "
            "learn a difference between with and without it; raise the threshold β of the selection."
        )
    if config.negative_indicator is not None:
        _check_written(data, config.negative_indicator, config.indicator_in_data)
        data = mark_rest(data, config.negative_indicator, indicator=indicator)
    data = drop_marks(data, config.indicator_dropout, seed)
    return repeat_selected(data, turns, config.upsample_selected)


def _check_fingerprint(
    data: Sequence[Conversation], selection: Selection | Collection[tuple[str, int]]
) -> None:
    known = selection.meta.get("fingerprint") if isinstance(selection, Selection) else None
    if known is not None and known != fingerprint_conversations(data):
        raise InputError(
            "the conversations are not those that the selection was made from: others were added, left out "
            "or changed; give the data that were scored (same split, layout and limit), or select again."
        )


def _warn(text: str) -> None:
    warnings.warn(text, IndicatorWarning, stacklevel=4)


def _count_asked(data: Sequence[Conversation], turns: Collection[tuple[str, int]]) -> int:
    """How many user messages these turns answer; before and after a tool's, two turns answer one."""
    return _count_marked(annotate_messages(drop_marks(data, 1.0, 0), turns))


def _count_marked(data: Iterable[Conversation]) -> int:
    return sum(message.get(INDICATOR_KEY) is True for one in data for message in one.messages)


def _check_written(data: Iterable[Conversation], indicator: str, choice: str) -> int:
    """How many messages hold the indicator as text; an error unless they are to be kept."""
    found = [
        (one.id, index)
        for one in data
        for index, message in enumerate(one.messages)
        if indicator in (message.get("content") or "")
    ]
    if found:
        name, index = found[0]
        what = (
            f"{len(found)} messages of the data hold the indicator {indicator} in their text already, "
            f"message {index} of conversation {name!r} for one"
        )
        if choice == "error":
            raise InputError(
                f"{what}; set indicator_in_data: keep to train on it as it stands, or choose another "
                "indicator."
            )
        _warn(f"{what}; they are kept.")
    return len(found)


def hash_data(data: Iterable[Conversation], texts: Iterable[str]) -> str:
    """A short fingerprint of the marked conversations and the replayed texts, in their order."""
    digest = hashlib.sha256()
    for conversation in data:
        content = [conversation.id, [dict(message) for message in conversation.messages]]
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    for text in texts:
        digest.update(json.dumps(text).encode())
    return digest.hexdigest()[:16]


__all__ = ["IndicatorWarning", "hash_data", "mark_data"]
