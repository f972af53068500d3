"""From the places of what was said to the role and turn of every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ctxlens.chat.roles.chat import MESSAGE_ROLES, Message, RenderedChat, Role
from ctxlens.chat.roles.spans import label_tokens
from ctxlens.chat.roles.tokenizer import special_ids


class Stretch(NamedTuple):
    """Characters ``[start, end)`` of a text that belong to a turn, as its message or as its indicator."""

    start: int
    end: int
    turn: int
    is_indicator: bool = False


def label(
    tokenizer: Any,
    messages: Sequence[Message],
    text: str,
    tokens: np.ndarray,
    spans: np.ndarray,
    said: Sequence[Stretch],
    *,
    bos: Role,
) -> RenderedChat:
    """Give every token its role and turn.

    Args:
        tokenizer: The tokenizer that made the tokens.
        messages: The conversation.
        text: The rendered text.
        tokens: ``[pos]`` token ids.
        spans: ``[pos, 2]`` characters of each token.
        said: What was said, in order.
        bos: The role of the BOS tokens that nobody said at the very start.
    """
    n_turns = len(messages)
    bounds, owners = [0], [-1]
    for start, end, turn, is_indicator in said:
        if start < end:
            bounds += [start, end]
            owners += [turn + n_turns * is_indicator, -1]
    owner = label_tokens(text, spans, np.asarray(bounds), np.asarray(owners))
    role_of = [MESSAGE_ROLES[message["role"]] for message in messages] + [Role.INDICATOR] * n_turns
    role = np.asarray([*role_of, Role.TEMPLATE], dtype=np.int8)[owner]
    turn = np.where(owner < 0, -1, owner % n_turns).astype(np.int32)
    position = 0
    while position < len(tokens) and owner[position] < 0 and tokens[position] == tokenizer.bos_token_id:
        role[position] = bos
        position += 1
    special, _ = special_ids(tokenizer)
    typed = tokens[(turn >= 0) & (role != Role.INDICATOR) & np.isin(tokens, special)]
    return RenderedChat(
        text=text,
        tokens=tokens,
        role=role,
        turn=turn,
        spans=spans,
        messages=tuple(messages),
        templated=False,
        stops={},
        spoofed_special_tokens=tuple(tokenizer.convert_ids_to_tokens(list(dict.fromkeys(typed.tolist())))),
    )


def find_stops(chat: RenderedChat, added: np.ndarray, ends: frozenset[int]) -> dict[int, int]:
    """The position of the token that ends each turn, where there is one.

    It is the first added token after the turn's last word and before the next speaker's, if it is one that
    ends turns. The syntax of tool calls may hold added tokens of its own; there the first that ends turns
    counts.

    Args:
        chat: The conversation with labels.
        added: Ids of the tokens that were added to the vocabulary.
        ends: Ids of the tokens that end turns.
    """
    stops: dict[int, int] = {}
    said = np.flatnonzero(chat.turn >= 0)
    marks = np.flatnonzero((chat.turn < 0) & np.isin(chat.tokens, added))
    last_of = {int(chat.turn[position]): int(position) for position in said.tolist()}
    for turn, last in last_of.items() if ends else ():
        later = np.searchsorted(said, last + 1)
        following = said[later] if later < len(said) else chat.n_tokens
        between = marks[np.searchsorted(marks, last) : np.searchsorted(marks, following)]
        if not chat.messages[turn].get("tool_calls"):
            between = between[:1]
        stop = next((int(at) for at in between if int(chat.tokens[at]) in ends), None)
        if stop is not None:
            stops[turn] = stop
    return stops


def find_openings(chat: RenderedChat, said: Sequence[Stretch], headers: Sequence[str]) -> dict[int, int]:
    """For assistant turns, the first token after the turn's header where template text follows it.

    The header is looked for only in the template's own text in front of what the turn says.

    Args:
        chat: The conversation with labels.
        said: What was said, in order.
        headers: What stands in front of what a model writes; the first that is found counts.
    """
    openings: dict[int, int] = {}
    starts = np.maximum.accumulate(chat.spans[:, 0])
    ended, seen = 0, set[int]()
    for start, end, turn, _ in said:
        if MESSAGE_ROLES[chat.messages[turn]["role"]] == Role.ASSISTANT and turn not in seen:
            found = ((chat.text.rfind(header, ended, start), len(header)) for header in headers)
            begin = next((at + length for at, length in found if at >= 0), start)
            if begin < start:
                openings[turn] = int(np.searchsorted(starts, begin))
        seen.add(turn)
        ended = end
    return openings
