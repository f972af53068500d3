"""Mark selected instructions in a data set's own rows, and undo the marks exactly.

`write_marked` copies a data set and appends the indicator to the text of the selected user messages, in
whatever column the layout keeps them; nothing else changes. A separate column (`RECORD_COLUMN`) records
where the indicator was inserted, so that `unmark_file` can restore the original rows.

The layout alone does not tell which string of a row holds a message. A candidate string is accepted if the
row, with the indicator appended to it, parses to the same conversation with the indicator in that message
and nowhere else.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxlens.chat.data import Conversation
from ctxlens.chat.data.cleaning import clean_messages
from ctxlens.chat.data.given_rows import Source, describe_source
from ctxlens.chat.data.layouts import parse_row
from ctxlens.chat.data.opening import open_file
from ctxlens.chat.data.places import (
    Place,
    extend_text,
    find_texts,
    move_place,
    read_pointer,
    shorten_text,
    write_pointer,
)
from ctxlens.chat.data.reading import read_rows
from ctxlens.chat.roles import DEFAULT_INDICATOR, INDICATOR_KEY, TEMPLATE_ARGS_KEY, TOOLS_KEY
from ctxlens.chat.roles.checks import check_unicode
from ctxlens.errors import InputError
from ctxlens.files import write_atomic

RECORD_COLUMN = "ctxlens_indicator"
"""The column that records the inserted `text`, and the places `at` as JSON pointers (RFC 6901).

In a column that holds its turns as JSON text, the last number of a pointer is a position in that text.
"""

_NUMBER = "ctxlens_number"
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Marks:
    """How many rows were written, how many of them were marked, and how many indicators they got."""

    rows: int
    marked_rows: int
    indicators: int


def marked_suffix(source: Source) -> str:
    """Return the suffix of the file that `write_marked` writes for a data set: Parquet stays Parquet."""
    return ".parquet" if _is_parquet(source) else ".jsonl"


def write_marked(
    path: str | Path,
    source: Source,
    conversations: Iterable[Conversation],
    *,
    layout: str,
    split: str = "train",
    indicator: str = DEFAULT_INDICATOR,
) -> Marks:
    """Copy a data set, and append one space and the indicator to its marked user messages.

    Args:
        path: the file to write: Parquet if the source is a Parquet file, and otherwise JSON lines.
        source: the data set, as given to `load_conversations`; not a generator, whose rows are gone.
        conversations: its conversations in the data set's order, marked by `annotate_messages`. Rows that
            gave no conversation (skipped, or beyond a limit) are copied unchanged.
        layout: the layout of the rows.
        split: split of a folder or Hub data set.
        indicator: the indicator; `check_unmarked` finds data that contain it already.

    Returns:
        The counts of what was written.

    Raises:
        InputError: the data set was marked before, its rows do not give these conversations, it holds a
            value that JSON cannot represent, or the file cannot be written.
    """
    name = describe_source(source)
    editor = _Marker(list(conversations), layout, indicator, name)

    def write(file: Path) -> None:
        if isinstance(source, str | Path) and _is_parquet(source):
            _edit_parquet(Path(source), file, editor.edit, adds_record=True)
        else:
            rows = read_rows(source, split=split, limit=None)
            _write_lines(file, map(editor.edit, rows), name)
        editor.check_finished()

    write_atomic(path, write)
    return Marks(editor.rows, editor.marked_rows, editor.indicators)


def check_unmarked(conversations: Iterable[Conversation], indicator: str = DEFAULT_INDICATOR) -> None:
    """Refuse data whose texts contain the indicator already, because marks would be ambiguous.

    Raises:
        InputError: they contain it, or they are the output of an earlier selection.
    """
    conversations = list(conversations)
    held = [c.id for c in conversations if any(indicator in message["content"] for message in c.messages)]
    before = [c.id for c in conversations if c.labels.get(RECORD_COLUMN)]
    if before:
        raise InputError(
            f"{before[0]!r} and {len(before) - 1} other conversations were marked by an earlier selection; "
            "select from the original data (ctxlens select --undo gives it back)."
        )
    if held:
        raise InputError(
            f"{len(held)} of {len(conversations)} conversations contain the text {indicator!r} already (for "
            f"example {held[0]!r}); choose another --indicator, or pass --allow-existing."
        )


def check_marked(path: str | Path) -> None:
    """Raise `InputError` if a file has no record of indicators that `write_marked` inserted."""
    if _is_parquet(path):
        import pyarrow.parquet as pq

        found = RECORD_COLUMN in pq.read_schema(Path(path).expanduser()).names
    else:
        rows = read_rows(str(path), split="train", limit=None)
        found = any(isinstance(row, Mapping) and RECORD_COLUMN in row for row in rows)
    if not found:
        raise InputError(
            f"{path} has no record of an indicator in it; expected a file that ctxlens select wrote."
        )


def unmark_file(path: str | Path, out: str | Path) -> Marks:
    """Restore the rows from which `write_marked` made a file, exactly as they were.

    Args:
        path: the marked file.
        out: the file to write, in the same format.

    Raises:
        InputError: the file has no record of marks, or a text no longer ends with the indicator.
    """
    check_marked(path)
    counts = Counter[str]()

    def edit(row: Any) -> Any:
        counts["rows"] += 1
        record = row.get(RECORD_COLUMN) if isinstance(row, Mapping) else None
        if record is None:
            return _without_record(row)
        if not isinstance(record, Mapping) or not isinstance(record.get("at"), list) or "text" not in record:
            raise InputError(
                f"row {counts['rows']} of {path} has a {RECORD_COLUMN} that ctxlens did not write."
            )
        counts["marked"] += 1
        counts["indicators"] += len(record["at"])
        return _unmarked(row, record, counts["rows"], path)

    if _is_parquet(path):
        write_atomic(out, lambda file: _edit_parquet(Path(path), file, edit, adds_record=False))
    else:
        rows = read_rows(str(path), split="train", limit=None)
        write_atomic(out, lambda file: _write_lines(file, map(edit, rows), str(path)))
    return Marks(counts["rows"], counts["marked"], counts["indicators"])


class _Marker:
    """Walk through the rows, and through the conversations that were read from them, side by side."""

    def __init__(
        self, conversations: Sequence[Conversation], layout: str, indicator: str, source: str
    ) -> None:
        self.layout, self.indicator, self.source = layout, indicator, source
        self.rows = self.marked_rows = self.indicators = 0
        self._waiting = iter(conversations)
        self._next = next(self._waiting, None)

    def edit(self, row: Any) -> Any:
        """Return the row, marked if its conversation is marked."""
        self.rows += 1
        if isinstance(row, Mapping) and RECORD_COLUMN in row:
            raise InputError(
                f"{self.source} has a column {RECORD_COLUMN}, so it was marked before; undo that first "
                f"(ctxlens select --undo {self.source})."
            )
        conversation = self._next
        if conversation is None:
            return row
        parsed, kept = _read(row, self.layout)
        if [_own(parsed[number]) for number in kept] != [_own(message) for message in conversation.messages]:
            return row
        self._next = next(self._waiting, None)
        marked = [kept[at] for at, message in enumerate(conversation.messages) if message.get(INDICATOR_KEY)]
        if not marked:
            return row
        self.marked_rows += 1
        self.indicators += len(marked)
        return self._mark(row, parsed, marked, conversation.id)

    def check_finished(self) -> None:
        """Raise `InputError` if no row matched one of the conversations."""
        if self._next is not None:
            raise InputError(
                f"conversation {self._next.id!r} was not found in the rows of {self.source}; the data set "
                "has changed since it was read."
            )

    def _mark(self, row: Any, parsed: list[dict[str, Any]], marked: Sequence[int], name: str) -> Any:
        suffix = f" {self.indicator}"
        pointers = []
        for number in marked:
            expected = [dict(message) for message in parsed]
            expected[number]["content"] += suffix
            place = _find(row, parsed[number]["content"], expected, self.layout, suffix)
            if place is None:
                raise InputError(
                    f"no single text of conversation {name!r} in {self.source} holds its message {number}, "
                    "so the indicator cannot be appended to it."
                )
            row, parsed = extend_text(row, place, suffix), expected
            pointers.append(move_place(row, place, suffix))
        if isinstance(row, list):
            column = "conversations" if self.layout == "sharegpt" else "messages"
            record = {"text": suffix, "at": [write_pointer((column, *place)) for place in pointers]}
            return {column: row, RECORD_COLUMN: {**record, "bare": column}}
        return {**row, RECORD_COLUMN: {"text": suffix, "at": [write_pointer(place) for place in pointers]}}


def _read(row: Any, layout: str) -> tuple[list[dict[str, Any]], list[int]]:
    """A row's messages, and the indices of those that cleaning keeps; both are empty if it is malformed."""
    try:
        parsed = parse_row(row, layout).messages
        check_unicode(row if isinstance(row, Mapping) else {"turns": row}, "the row")
    except InputError:
        return [], []
    numbered = [{**message, _NUMBER: number} for number, message in enumerate(parsed)]
    return parsed, [message[_NUMBER] for message in clean_messages(numbered, Counter())]


def _own(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without what it carries for the whole conversation, or for its marks."""
    carried = (INDICATOR_KEY, TOOLS_KEY, TEMPLATE_ARGS_KEY)
    return {key: value for key, value in message.items() if key not in carried}


def _find(row: Any, content: str, expected: list[dict[str, Any]], layout: str, suffix: str) -> Place | None:
    """The path of the text that must be extended so that the row parses as expected."""
    for place, text in find_texts(row, ()):
        if text and content.endswith(text):
            messages, _ = _read(extend_text(row, place, suffix), layout)
            if messages == expected:
                return place
    return None


def _unmarked(row: Mapping[str, Any], record: Mapping[str, Any], number: int, path: str | Path) -> Any:
    suffix = record["text"]
    result: Any = _without_record(row)
    for pointer in reversed(record["at"]):
        try:
            result = shorten_text(result, read_pointer(result, pointer), suffix)
        except (KeyError, IndexError, TypeError, ValueError):
            raise InputError(
                f"row {number} of {path} does not end with {suffix.strip()!r} at {pointer}; the file was "
                "edited after it was marked, so it cannot be undone."
            ) from None
    return result[record["bare"]] if record.get("bare") else result


def _without_record(row: Any) -> Any:
    if not isinstance(row, Mapping):
        return row
    return {key: value for key, value in row.items() if key != RECORD_COLUMN}


def _write_lines(file: Path, rows: Iterable[Any], source: str) -> None:
    with file.open("wb") as lines:
        for number, row in enumerate(rows, start=1):
            try:
                line = json.dumps(row, ensure_ascii=False)
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"row {number} of {source} holds a value that JSON cannot represent ({error}); save the "
                    "data set as a Parquet file and use that."
                ) from error
            try:
                encoded = line.encode("utf-8")
            except UnicodeEncodeError:  # half a surrogate pair, which JSON can only hold as an escape
                encoded = json.dumps(row).encode("ascii")
            lines.write(encoded + b"\n")


def _is_parquet(source: Source) -> bool:
    if not isinstance(source, str | Path):
        return False
    path = Path(source).expanduser()
    return path.is_file() and open_file(path).head.startswith(b"PAR1")


def _edit_parquet(source: Path, file: Path, edit: Callable[[Any], Any], *, adds_record: bool) -> None:
    """Edit the rows of a Parquet file; columns of a batch in which nothing changes are copied as they are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(source.expanduser()) as table:
        old = table.schema_arrow
        record = pa.field(RECORD_COLUMN, pa.struct({"text": pa.string(), "at": pa.list_(pa.string())}))
        new = old.append(record) if adds_record else old.remove(old.get_field_index(RECORD_COLUMN))
        with pq.ParquetWriter(file, new) as writer:
            for batch in table.iter_batches(_BATCH_ROWS):
                before = batch.to_pylist()
                after = [edit(row) for row in before]
                columns = []
                for field in new:
                    if field.name == RECORD_COLUMN:
                        column = pa.array([row.get(RECORD_COLUMN) for row in after], record.type)
                    elif any(
                        a is not b and a[field.name] != b[field.name]
                        for a, b in zip(before, after, strict=True)
                    ):
                        column = pa.array([row[field.name] for row in after], field.type)
                    else:
                        column = batch.column(field.name)
                    columns.append(column)
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=new))


__all__ = [
    "RECORD_COLUMN",
    "Marks",
    "check_marked",
    "check_unmarked",
    "marked_suffix",
    "unmark_file",
    "write_marked",
]
