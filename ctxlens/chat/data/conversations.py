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
from ctxlens.chat.data.given_rows import Source, describe_source, has_columns, hold_rows
from ctxlens.chat.data.layouts import check_layout, detect_layout, parse_row
from ctxlens.chat.data.reading import read_rows
from ctxlens.chat.data.tools import carry_tools
from ctxlens.chat.data.turns import NO_LOSS
from ctxlens.chat.roles import TEMPLATE_ARGS_KEY, TOOLS_KEY, TRAIN_KEY, put_arguments
from ctxlens.chat.roles.checks import check_unicode, holds_surrogate
from ctxlens.errors import InputError
from ctxlens.files import write_atomic

_ROWS_TO_DETECT = 20
_ID_COLUMNS = ("id", "conversation_id", "prompt_id", "uid")


@dataclass(frozen=True)
class Conversation:
    """One conversation of a data set.

    Attributes:
        id: The data set's own id, or the row's number; unique in its set and the same at every load.
        messages: Mappings with ``role`` and text ``content``. The first one carries the row's tool schemas
            (``tools``) and its values for the chat template (``chat_template_kwargs``), and an answer that
            is not trained on carries ``{"train": False}``.
        source: The path or Hub id that it came from, or the kind of the object.
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
        noted: What was read in another way than it is written, or kept out of the loss, with numbers.
    """

    conversations: tuple[Conversation, ...]
    layout: str
    dropped: Counter[str] = field(default_factory=Counter)
    skipped: tuple[tuple[str, str], ...] = ()
    noted: Counter[str] = field(default_factory=Counter)

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
        source: The path or Hub id, or the kind of the object that holds the rows.
        layout: The layout of the rows.
        n_rows: Number of rows read so far.
        dropped: Number of turns dropped so far, by reason.
        skipped: Rows that were left out entirely so far, as id and reason.
        noted: What was read in another way than it is written, or kept out of the loss, with numbers.
    """

    def __init__(
        self,
        path_or_hub_id: Source,
        *,
        split: str = "train",
        layout: str | None = None,
        limit: int | None = None,
        streaming: bool = False,
        drop_refusals: bool = False,
    ) -> None:
        """Open a data set; arguments and errors are those of `open_conversations`."""
        self.source = describe_source(path_or_hub_id)
        self._source = hold_rows(path_or_hub_id)
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit}; expected a number of rows of at least 1.")
        self._reading = {"split": split, "limit": limit, "streaming": streaming}
        self._drop_refusals = drop_refusals
        rows = read_rows(self._source, **self._reading)
        head = list(islice(rows, _ROWS_TO_DETECT))
        if not head:
            raise InputError(f"{self.source} holds no records.")
        if layout is None:
            layout = detect_layout(head, self.source)
        else:
            check_layout(layout, head, self.source)
        self._opened: Iterator[Any] | None = chain(head, rows)
        self.layout = layout
        self.n_rows = 0
        self.dropped: Counter[str] = Counter()
        self.skipped: list[tuple[str, str]] = []
        self.noted: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Conversation]:
        rows = self._opened or read_rows(self._source, **self._reading)
        self._opened = None
        self.dropped, self.skipped, self.noted, self.n_rows = Counter(), [], Counter(), 0
        seen: set[int] = set()
        for number, row in enumerate(rows):
            self.n_rows = number + 1
            identity = _identity(row, number, seen)
            try:
                yield conversation_from_row(
                    row,
                    self.layout,
                    identity=identity,
                    source=self.source,
                    dropped=self.dropped,
                    noted=self.noted,
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
    noted: Counter[str] | None = None,
    drop_refusals: bool = False,
) -> Conversation:
    """Parse and clean one row of a data set.

    Args:
        row: the row.
        layout: its layout.
        identity: the conversation's id.
        source: the path or Hub id that it comes from.
        dropped: a counter to which the dropped turns are added, by reason.
        noted: a counter to which is added what was read in another way than it is written.
        drop_refusals: whether to reject a conversation in which an answer begins like a refusal.

    Raises:
        InputError: the row cannot be used; the message is the reason, without naming the row.
    """
    parsed = parse_row(row, layout)
    labels = {k: v for k, v in row.items() if k not in parsed.used} if isinstance(row, Mapping) else {}
    for number, message in enumerate(parsed.messages):
        check_unicode(message, f"turn {number}")
    check_unicode(labels, "the row")
    messages = clean_messages(parsed.messages, Counter() if dropped is None else dropped)
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError("no user turn with an answer")
    if drop_refusals and has_refusal(messages):
        raise InputError("an answer is a refusal")
    if noted is not None:
        noted.update(parsed.notes)
        noted.update(NO_LOSS for message in messages if message.get(TRAIN_KEY) is False)
    labels.pop("id", None)
    tools = next((message[TOOLS_KEY] for message in parsed.messages if TOOLS_KEY in message), ())
    messages = put_arguments(messages, labels.get(TEMPLATE_ARGS_KEY))
    return Conversation(identity, tuple(carry_tools(messages, tools)), source, labels)


def open_conversations(
    path_or_hub_id: Source,
    *,
    split: str = "train",
    layout: str | None = None,
    limit: int | None = None,
    streaming: bool = False,
    drop_refusals: bool = False,
) -> ConversationStream:
    """Open a data set; its conversations are read, cleaned and counted while you iterate over them.

    Args:
        path_or_hub_id: JSON, JSON-lines, Parquet, Arrow, CSV or TSV file, also compressed with gzip, bzip2,
            xz or zstd; a folder of them, or one that the ``datasets`` library saved; or a Hub id. An existing
            path is never looked up on the Hub. Or rows in memory: a `datasets.Dataset`, `IterableDataset` or
            `DatasetDict`, a pandas, polars or Arrow table, or any iterable of mappings.
        split: Which split of a folder, Hub data set or `DatasetDict`.
        layout: One of `ctxlens.chat.data.LAYOUTS`; detected from the first rows by default.
        limit: Maximum number of rows, counted from the start.
        streaming: Whether the rows of a Hub data set are read while they are used, instead of downloading
            and converting all of them first. Files are always streamed.
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
    path_or_hub_id: Source,
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
    skipped = tuple(stream.skipped)
    return ConversationSet(conversations, stream.layout, stream.dropped, skipped, stream.noted)


def as_conversations(data: Source | Iterable[Conversation]) -> Iterable[Conversation]:
    """Conversations as they are; anything else is loaded with `load_conversations`.

    Raises:
        InputError: it cannot be read as conversations.
    """
    if isinstance(data, ConversationSet | ConversationStream):
        return data
    if isinstance(data, Iterator):
        first = next(data, None)
        data = chain(() if first is None else (first,), data)
        return data if first is None or isinstance(first, Conversation) else load_conversations(list(data))
    if not isinstance(data, Iterable) or isinstance(data, str | Path | Mapping) or has_columns(data):
        return load_conversations(data)
    first = next(iter(data), None)
    return data if first is None or isinstance(first, Conversation) else load_conversations(data)


def are_conversations(data: Any) -> bool:
    """Whether data are conversations already: what was loaded or opened, or a list of `Conversation`."""
    if isinstance(data, Sequence) and not isinstance(data, str):
        return bool(data) and isinstance(data[0], Conversation)
    return isinstance(data, ConversationSet | ConversationStream)


def describe_reading(data: Iterable[Conversation]) -> dict[str, Any]:
    """Layout and counts of what was read: rows, rows kept, and rows skipped by reason, for manifests.

    Conversations that were not read by `load_conversations` or `open_conversations` have only a count.
    """
    if isinstance(data, ConversationSet):
        n_rows = len(data) + len(data.skipped)
    elif isinstance(data, ConversationStream):
        n_rows = data.n_rows
    else:
        return {"conversations": sum(1 for _ in data)} if isinstance(data, Sequence) else {}
    dropped, noted = (dict(sorted(counts.items())) for counts in (data.dropped, data.noted))
    reading = {"layout": data.layout, "rows_read": n_rows, "turns_dropped": dropped, "noted": noted}
    return add_skipped(reading, data.skipped)


def add_skipped(reading: Mapping[str, Any], skipped: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The counts of `describe_reading`, with all rows that were skipped, on reading or later."""
    if "rows_read" not in reading:
        return dict(reading)
    reasons = Counter(reason for _, reason in skipped)
    left = reading["rows_read"] - reasons.total()
    return {
        **reading, "rows_kept": left, "rows_skipped": reasons.total(), "reasons": dict(reasons.most_common()),
    }  # fmt: skip


def _identity(row: Any, number: int, seen: set[int]) -> str:
    """The row's own id if it has one, else its number; a repeated id gets the row's number as suffix."""
    own = [row[name] for name in _ID_COLUMNS if name in row] if isinstance(row, Mapping) else []
    identity = next((str(given) for given in own if _is_identity(given)), str(number))
    if _short_digest(identity) in seen:
        identity = f"{identity}#{number}"
    seen.add(_short_digest(identity))
    return identity


def _is_identity(given: Any) -> bool:
    """Whether a value can be an id: a text that can be written to a file, or a number of a usual size."""
    if isinstance(given, str):
        return given != "" and not holds_surrogate(given)
    return isinstance(given, int) and abs(given) < 2**64


def _short_digest(text: str) -> int:
    """A number that represents a text in a set, so that millions of ids need little memory."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def write_conversations(path: str | Path, conversations: Iterable[Conversation]) -> None:
    """Write conversations as JSON lines in the layout ``messages``, with ids and labels."""
    lines = (
        json.dumps({**c.labels, "id": c.id, "messages": list(c.messages)}, ensure_ascii=False, default=str)
        for c in conversations
    )
    write_atomic(Path(path), "".join(f"{line}\n" for line in lines).encode("utf-8"))
