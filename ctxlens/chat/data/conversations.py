"""Conversations as the studies use them: cleaned, counted, and with stable ids."""

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
from ctxlens.chat.roles import TEMPLATE_ARGS_KEY, check_messages, put_arguments
from ctxlens.chat.roles.checks import check_unicode
from ctxlens.errors import InputError
from ctxlens.files import write_atomic

_ROWS_TO_DETECT = 20
_ID_COLUMNS = ("id", "conversation_id", "prompt_id", "uid")


@dataclass(frozen=True)
class Conversation:
    """One conversation of a data set.

    Attributes:
        id: The data set's own id, or the row's number; unique in its set and the same at every load.
        messages: Mappings with ``role`` and text ``content``. If the row has a column
            ``chat_template_kwargs``, the first message carries these values for the chat template.
        source: The path or Hub id that it came from.
        labels: The row's other columns.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    source: str
    labels: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ConversationSet(Sequence[Conversation]):
    """The usable conversations of a data set, and what was left out.

    Attributes:
        conversations: The usable conversations, in the data set's order.
        layout: The layout of the rows.
        dropped: Number of dropped turns, by reason.
        skipped: Rows that were left out entirely, as id and reason.
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
    """The conversations of a data set, one after another, without keeping them in memory.

    It can be iterated several times; each time the rows are read again and the counts start again.

    Attributes:
        layout: The layout of the rows.
        dropped: Number of turns dropped so far, by reason.
        skipped: Rows that were left out entirely so far, as id and reason.
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
        """Open a data set; arguments and errors are those of `open_conversations`."""
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
        source: the path or Hub id that it comes from.
        dropped: a counter to which the dropped turns are added, by reason.
        drop_refusals: whether to reject a conversation in which an answer begins like a refusal.

    Raises:
        InputError: the row cannot be used; the message is the reason, without naming the row.
    """
    parsed = parse_row(row, layout)
    for number, message in enumerate(parsed.messages):
        check_unicode(message, f"turn {number}")
    messages = clean_messages(parsed.messages, Counter() if dropped is None else dropped)
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError("no user turn with an answer")
    if drop_refusals and has_refusal(messages):
        raise InputError("an answer is a refusal")
    used = {*parsed.used, "id"}
    labels = {k: v for k, v in row.items() if k not in used} if isinstance(row, Mapping) else {}
    messages = put_arguments(messages, labels.get(TEMPLATE_ARGS_KEY))
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
    """Open a data set; its conversations are read, cleaned and counted while you iterate over them.

    Args:
        path_or_hub_id: JSON, JSON lines (also ``.gz``, ``.xz``), Parquet, Arrow or CSV file, a folder that
            the ``datasets`` library reads, or a Hub id. An existing path is never looked up on the Hub.
        split: Which split of a folder or Hub data set.
        layout: One of `ctxlens.chat.data.LAYOUTS`; detected from the first rows by default.
        limit: Maximum number of rows, counted from the start.
        streaming: Whether the ``datasets`` library reads rows while they are used, instead of downloading
            and converting all of them first. JSON lines are always streamed.
        drop_refusals: Whether to leave out conversations in which an answer begins like a refusal
            (`ctxlens.chat.data.REFUSALS`). The whole conversation is left out, because later turns build
            on the refusal.

    Raises:
        InputError: The data set cannot be read, has no rows, or has no known layout.
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
    """Load, clean and count the conversations of a data set.

    Arguments and errors are those of `open_conversations`.

    Returns:
        The usable conversations. Rows that are malformed, or that have no answered user turn after
        cleaning, are listed in `ConversationSet.skipped` with the reason.
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
    """The row's own id if it has one, else its number; a repeated id gets the row's number as suffix."""
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
    """A number that represents a text in a set, so that millions of ids need little memory."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def read_messages_file(path: str | Path) -> list[list[dict[str, Any]]]:
    """Read a file of conversations that a user wrote by hand; all of them must be well-formed.

    Args:
        path: JSON or JSON lines with one conversation, or a list (or lines) of them. A conversation is a
            list of messages, or a mapping with ``messages`` and, if needed, ``chat_template_kwargs`` (values
            for the chat template's variables). A message is a mapping with ``role`` and ``content``.

    Returns:
        The messages of each conversation.

    Raises:
        InputError: The file cannot be read, or a conversation is malformed; the message says which one.
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
            if isinstance(item, Mapping):
                messages = put_arguments(messages, item.get(TEMPLATE_ARGS_KEY))
        except InputError as error:
            raise InputError(f"{path}: conversation {index}: {error}") from error
        conversations.append([dict(message) for message in messages])
    return conversations


def write_conversations(path: str | Path, conversations: Iterable[Conversation]) -> None:
    """Write conversations as JSON lines in the layout ``messages``, with ids and labels."""
    lines = (
        json.dumps({**c.labels, "id": c.id, "messages": list(c.messages)}, ensure_ascii=False, default=str)
        for c in conversations
    )
    write_atomic(Path(path), "".join(f"{line}\n" for line in lines).encode("utf-8"))
