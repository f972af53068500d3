"""Conversations as the studies take them: cleaned, counted, with stable ids."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ctxlens.chat.data.cleaning import clean_messages, has_refusal
from ctxlens.chat.data.layouts import check_layout, detect_layout, parse_row
from ctxlens.chat.data.reading import read_json_rows, read_rows
from ctxlens.chat.roles import check_messages
from ctxlens.errors import InputError
from ctxlens.files import write_atomic

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


class ConversationStream(Iterable[Conversation]):
    """The conversations of a data set one after another, none of them kept.

    It can be gone through several times; every time the rows are read anew, and the counts begin anew.

    Attributes:
        layout: The layout that the rows are read in.
        dropped: How many turns were dropped so far, by reason.
        skipped: Rows left out altogether so far, as id and reason.
    """

    def __init__(
        self,
        path_or_hub_id: str | Path,
        *,
        split: str = "train",
        layout: str | None = None,
        limit: int | None = None,
        streaming: bool = False,
        drop_refusals: bool = False,
    ) -> None:
        """Open a data set; arguments and errors as `open_conversations`."""
        self.source = str(path_or_hub_id)
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit}; expected a number of rows of at least 1.")
        self._reading = {"split": split, "limit": limit, "streaming": streaming}
        self._drop_refusals = drop_refusals
        rows = read_rows(self.source, **self._reading)
        head = list(islice(rows, _ROWS_TO_DETECT))
        if not head:
            raise InputError(f"{self.source} holds no records.")
        if layout is None:
            layout = detect_layout(head, self.source)
        else:
            check_layout(layout, head, self.source)
        self._opened: Iterator[Any] | None = chain(head, rows)
        self.layout = layout
        self.dropped: Counter[str] = Counter()
        self.skipped: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[Conversation]:
        rows = self._opened or read_rows(self.source, **self._reading)
        self._opened = None
        self.dropped, self.skipped = Counter(), []
        seen: set[int] = set()
        for number, row in enumerate(rows):
            identity = _identity(row, number, seen)
            try:
                yield conversation_from_row(
                    row,
                    self.layout,
                    identity=identity,
                    source=self.source,
                    dropped=self.dropped,
                    drop_refusals=self._drop_refusals,
                )
            except InputError as error:
                self.skipped.append((identity, str(error)))


def conversation_from_row(
    row: Any,
    layout: str,
    *,
    identity: str,
    source: str,
    dropped: Counter[str] | None = None,
    drop_refusals: bool = False,
) -> Conversation:
    """Parse and clean one row of a data set.

    Args:
        row: the row.
        layout: its layout.
        identity: the conversation's id.
        source: where it comes from.
        dropped: counts the turns that are dropped, by reason.
        drop_refusals: refuse a conversation in which an answer begins like a refusal.

    Raises:
        InputError: the row cannot be used; the message is the reason, without naming the row.
    """
    parsed = parse_row(row, layout)
    messages = clean_messages(parsed.messages, Counter() if dropped is None else dropped)
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError("no user turn with an answer")
    if drop_refusals and has_refusal(messages):
        raise InputError("an answer is a refusal")
    used = {*parsed.used, "id"}
    labels = {k: v for k, v in row.items() if k not in used} if isinstance(row, Mapping) else {}
    return Conversation(identity, tuple(messages), source, labels)


def open_conversations(
    path_or_hub_id: str | Path,
    *,
    split: str = "train",
    layout: str | None = None,
    limit: int | None = None,
    streaming: bool = False,
    drop_refusals: bool = False,
) -> ConversationStream:
    """Open a data set whose conversations are read, cleaned and counted as they are asked for.

    Args:
        path_or_hub_id: JSON, JSON lines (also ``.gz``, ``.xz``), parquet, Arrow or CSV file, a folder that
            the ``datasets`` library reads, or a Hub id. What exists as a path is never looked up on the Hub.
        split: Which split of a folder or Hub data set.
        layout: One of `ctxlens.chat.data.LAYOUTS`; found out from the first rows by default.
        limit: At most this many rows, from the start.
        streaming: Let the ``datasets`` library read while the rows are used, instead of downloading
            and converting all of them first. JSON lines are always read so.
        drop_refusals: Leave out conversations in which an answer begins like a refusal
            (`ctxlens.chat.data.REFUSALS`): all of it, because later turns build on the refusal.

    Raises:
        InputError: The data cannot be read, has no rows or no known layout.
    """
    return ConversationStream(
        path_or_hub_id,
        split=split,
        layout=layout,
        limit=limit,
        streaming=streaming,
        drop_refusals=drop_refusals,
    )


def load_conversations(
    path_or_hub_id: str | Path,
    *,
    split: str = "train",
    layout: str | None = None,
    limit: int | None = None,
    streaming: bool = False,
    drop_refusals: bool = False,
) -> ConversationSet:
    """Load, clean and count the conversations of a data set; arguments and errors as `open_conversations`.

    Returns:
        The usable conversations. Rows that are malformed, or have no user turn with an answer after
        cleaning, are in `ConversationSet.skipped` with the reason.
    """
    stream = open_conversations(
        path_or_hub_id,
        split=split,
        layout=layout,
        limit=limit,
        streaming=streaming,
        drop_refusals=drop_refusals,
    )
    conversations = tuple(stream)
    return ConversationSet(conversations, stream.layout, stream.dropped, tuple(stream.skipped))


def _identity(row: Any, number: int, seen: set[int]) -> str:
    """The row's own id if it has one; a repeated one gets the row's number too."""
    given = None
    if isinstance(row, Mapping):
        given = next(
            (row[k] for k in _ID_COLUMNS if isinstance(row.get(k), (str, int)) and row[k] != ""), None
        )
    identity = str(number if given is None else given)
    if _short_digest(identity) in seen:
        identity = f"{identity}#{number}"
    seen.add(_short_digest(identity))
    return identity


def _short_digest(text: str) -> int:
    """A number that stands for a text in a set, so that millions of ids take little room."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


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
