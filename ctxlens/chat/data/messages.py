"""Conversations that a user asks about: written by hand, or rows of a data set in any layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ctxlens.chat.data.given_rows import Source, describe_source
from ctxlens.chat.data.json_rows import is_conversation
from ctxlens.chat.data.layouts import detect_layout, parse_row
from ctxlens.chat.data.reading import read_rows
from ctxlens.chat.roles import TEMPLATE_ARGS_KEY, check_messages, put_arguments
from ctxlens.errors import InputError

_ROWS_TO_DETECT = 20


@dataclass(frozen=True)
class GivenMessages:
    """Conversations as they were given, without cleaning.

    Attributes:
        conversations: the messages of every conversation that can be used.
        rows: the index of the row of each conversation, from 0.
        n_rows: how many rows the source has.
        layout: the layout of the rows.
        skipped: the rows that cannot be used, by index, with the reason.
    """

    conversations: list[list[dict[str, Any]]]
    rows: list[int]
    n_rows: int
    layout: str
    skipped: tuple[tuple[int, str], ...] = ()

    def describe(self) -> dict[str, Any]:
        """The counts, for manifests."""
        reasons = Counter(reason for _, reason in self.skipped)
        return {
            "layout": self.layout, "rows_read": self.n_rows, "rows_kept": len(self.conversations),
            "rows_skipped": len(self.skipped), "reasons": dict(reasons.most_common()),
        }  # fmt: skip


def read_messages(
    source: Source, *, row: int | None = None, limit: int | None = None, split: str = "train"
) -> GivenMessages:
    """Read conversations in any layout that `load_conversations` reads, without cleaning them.

    Args:
        source: what `load_conversations` takes, or JSON with one conversation as a list of messages.
        row: take only this row, counted from 0.
        limit: take at most this many conversations, from the start.
        split: which split of a folder, Hub data set or mapping of splits.

    Raises:
        InputError: the source cannot be read, has no known layout or no such row, or none of its rows can be
            used.
    """
    return parse_messages(read_rows(source, split=split, limit=None), describe_source(source), row, limit)


def parse_messages(
    rows: Iterable[Any], name: str, row: int | None = None, limit: int | None = None
) -> GivenMessages:
    """Parse rows into conversations; see `read_messages`."""
    layout, rows = _detect(iter(rows), name)
    conversations, numbers, skipped, n_rows = [], [], [], 0
    for number, one in enumerate(rows):
        n_rows += 1
        if row not in (None, number) or (limit is not None and len(conversations) >= limit):
            continue
        try:
            messages = parse_row(one, layout).messages
            if isinstance(one, Mapping):
                messages = put_arguments(messages, one.get(TEMPLATE_ARGS_KEY))
            check_messages(messages)
        except InputError as error:
            skipped.append((number, _reason(one, error)))
        else:
            conversations.append(messages)
            numbers.append(number)
    if row is not None and row >= n_rows:
        raise InputError(f"{name} has {n_rows} rows, 0 to {n_rows - 1}; there is no row {row}.")
    if not conversations:
        number, reason = skipped[0]
        others = f" ({len(skipped)} rows, and none can be used)" if len(skipped) > 1 else ""
        raise InputError(f"{name}: conversation {number}: {reason.rstrip('.')}{others}.")
    return GivenMessages(conversations, numbers, n_rows, layout, tuple(skipped))


def _detect(rows: Iterator[Any], name: str) -> tuple[str, Iterable[Any]]:
    """The layout of rows, and the rows; rows that are messages themselves are one conversation.

    Raises:
        InputError: there are no rows, or they have no known layout.
    """
    head = list(islice(rows, _ROWS_TO_DETECT))
    if not head:
        raise InputError(f"{name} holds no conversation; expected messages with 'role' and 'content'.")
    if is_conversation(head):
        messages = [*head, *rows]
        return detect_layout([messages], name), [messages]
    return detect_layout(head, name), chain(head, rows)


def _reason(row: Any, error: InputError) -> str:
    """Why a row cannot be used, in the words for messages where the row holds messages."""
    messages = row.get("messages") if isinstance(row, Mapping) else row
    if not isinstance(messages, list | tuple):
        return str(error)
    try:
        check_messages(messages)
    except InputError as complaint:
        return str(complaint)
    return str(error)


def read_messages_file(path: Source) -> list[list[dict[str, Any]]]:
    """Read conversations that a user gives; all of them must be well-formed.

    Args:
        path: any source that `load_conversations` reads, such as JSON or JSON lines; or JSON with one
            conversation as a list of messages. A message is a mapping with ``role`` and ``content``.

    Returns:
        The messages of each conversation, without cleaning.

    Raises:
        InputError: The source cannot be read, or a conversation is malformed; the message says which one.
    """
    if isinstance(path, str | Path) and not Path(path).expanduser().exists():
        raise InputError(f"There is no file {path}; give the path of a file of conversations.")
    found = read_messages(path)
    if found.skipped:
        number, reason = found.skipped[0]
        raise InputError(f"{describe_source(path)}: conversation {number}: {reason}")
    return found.conversations


__all__ = ["GivenMessages", "parse_messages", "read_messages", "read_messages_file"]
