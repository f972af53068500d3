"""Conversations as the studies take them: cleaned, counted, with stable ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ctxlens.data.layouts import check_layout, detect_layout, parse_row
from ctxlens.data.reading import read_json_rows, read_rows
from ctxlens.errors import InputError
from ctxlens.roles import check_messages
from ctxlens.runs import write_atomic

_ROWS_TO_DETECT = 20
_ID_COLUMNS = ("id", "conversation_id", "prompt_id", "uid")


@dataclass(frozen=True)
class Conversation:
    """One conversation of a data set.

    Attributes:
        id: The data's own id, or the row's number; unique in its set and the same at every load.
        messages: Mappings with ``role`` and text ``content``.
        source: Where it came from: path or Hub id.
        labels: The row's other columns.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    source: str
    labels: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ConversationSet(Sequence[Conversation]):
    """Conversations, and what was left out on the way to them.

    Attributes:
        conversations: Those that can be used, in the data's order.
        layout: The layout they were read in.
        dropped: How many turns were dropped, by reason.
        skipped: Rows left out altogether, as id and reason.
    """

    conversations: tuple[Conversation, ...]
    layout: str
    dropped: Counter[str] = field(default_factory=Counter)
    skipped: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: Any) -> Any:
        return self.conversations[index]

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self.conversations)


def load_conversations(
    path_or_hub_id: str | Path, *, split: str = "train", layout: str | None = None, limit: int | None = None
) -> ConversationSet:
    """Load, clean and count the conversations of a data set.

    Args:
        path_or_hub_id: JSON, JSON lines (also ``.gz``, ``.xz``), parquet or CSV file, a folder that the
            ``datasets`` library reads, or a Hub id. What exists as a path is never looked up on the Hub.
        split: Which split of a folder or Hub data set.
        layout: One of `ctxlens.data.LAYOUTS`; found out from the first rows by default.
        limit: At most this many rows, from the start.

    Returns:
        The usable conversations. Rows that are malformed, or have no user turn with an answer after
        cleaning, are in `ConversationSet.skipped` with the reason.

    Raises:
        InputError: The data cannot be read, has no rows or no known layout.
    """
    source = str(path_or_hub_id)
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected a number of rows of at least 1.")
    rows = read_rows(source, split=split, limit=limit)
    head = list(islice(rows, _ROWS_TO_DETECT))
    if not head:
        raise InputError(f"{source} holds no records.")
    if layout is None:
        layout = detect_layout(head, source)
    else:
        check_layout(layout, head, source)
    seen: set[str] = set()
    dropped: Counter[str] = Counter()
    skipped: list[tuple[str, str]] = []
    conversations: list[Conversation] = []
    for number, row in enumerate(chain(head, rows)):
        identity = _identity(row, number, seen)
        try:
            parsed = parse_row(row, layout)
        except InputError as error:
            skipped.append((identity, str(error)))
            continue
        messages = clean_messages(parsed.messages, dropped)
        if not any(message["role"] == "assistant" for message in messages):
            skipped.append((identity, "no user turn with an answer"))
            continue
        used = {*parsed.used, "id"}
        labels = {} if not isinstance(row, Mapping) else {k: v for k, v in row.items() if k not in used}
        conversations.append(Conversation(identity, tuple(messages), source, labels))
    return ConversationSet(tuple(conversations), layout, dropped, tuple(skipped))


def _identity(row: Any, number: int, seen: set[str]) -> str:
    """The row's own id if it has one; a repeated one gets the row's number too."""
    given = None
    if isinstance(row, Mapping):
        given = next(
            (row[k] for k in _ID_COLUMNS if isinstance(row.get(k), (str, int)) and row[k] != ""), None
        )
    identity = str(number if given is None else given)
    if identity in seen:
        identity = f"{identity}#{number}"
    seen.add(identity)
    return identity


def clean_messages(messages: Iterable[dict[str, Any]], dropped: Counter[str]) -> list[dict[str, Any]]:
    """Drop the turns that the paper drops, and count each drop by its reason.

    Empty turns go first; then assistant and tool turns before the first user turn; then user (and
    system) turns after the last answer.
    """
    kept: list[dict[str, Any]] = []
    user_spoke = False
    for message in messages:
        if not message["content"].strip() and not message.get("tool_calls"):
            dropped["empty turn"] += 1
            continue
        user_spoke = user_spoke or message["role"] == "user"
        if not user_spoke and message["role"] in ("assistant", "tool"):
            dropped[f"{message['role']} turn before the first user turn"] += 1
            continue
        kept.append(message)
    while kept and kept[-1]["role"] != "assistant":
        dropped[f"{kept.pop()['role']} turn without an answer"] += 1
    return kept


def read_messages_file(path: str | Path) -> list[list[dict[str, Any]]]:
    """Read conversations that a user wrote to be looked at, all of which must be well-formed.

    Args:
        path: JSON or JSON lines: one conversation, or a list (or lines) of them. A conversation is a list
            of messages or a mapping with ``messages``; a message a mapping with ``role`` and ``content``.

    Returns:
        The messages of each conversation.

    Raises:
        InputError: The file cannot be read, or a conversation is malformed; the message names which.
    """
    path = Path(path)
    items = list(read_json_rows(path))
    if not items:
        raise InputError(f"{path} holds no conversation; expected messages with 'role' and 'content'.")
    if all(isinstance(item, Mapping) and "messages" not in item for item in items):
        items = [items]
    conversations: list[list[dict[str, Any]]] = []
    for index, item in enumerate(items):
        messages: Any = item.get("messages") if isinstance(item, Mapping) else item
        try:
            check_messages(messages)
        except InputError as error:
            raise InputError(f"{path}: conversation {index}: {error}") from error
        conversations.append([dict(message) for message in messages])
    return conversations


def write_conversations(path: str | Path, conversations: Iterable[Conversation]) -> None:
    """Write conversations as JSON lines in the layout ``messages``, with their ids and labels."""
    lines = (
        json.dumps({**c.labels, "id": c.id, "messages": list(c.messages)}, ensure_ascii=False, default=str)
        for c in conversations
    )
    write_atomic(Path(path), "".join(f"{line}\n" for line in lines).encode("utf-8"))
