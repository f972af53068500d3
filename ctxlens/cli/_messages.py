"""The options that name conversations: a file, a data set, standard input, or one user message."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ctxlens.cli import _screen
from ctxlens.errors import InputError

if TYPE_CHECKING:
    from ctxlens.chat.data import GivenMessages
    from ctxlens.runs import Run

_STDIN = "-"
_SHOWN_REASONS = 4


@dataclass(frozen=True)
class Asked:
    """The conversations of a verb.

    Attributes:
        conversations: the messages of each.
        config: what a run's configuration says about them.
        counts: rows read, kept and skipped, for the manifest.
    """

    conversations: list[list[dict[str, Any]]]
    config: Mapping[str, Any]
    counts: Mapping[str, Any]

    def record(self, run: Run) -> None:
        """Write the counts into the manifest of a run."""
        if run.manifest.get("rows") != self.counts:
            run.record("rows", self.counts)


@dataclass(frozen=True)
class MessagesOptions:
    """Where the conversations come from."""

    PANEL: ClassVar[str] = "Conversations"

    messages: Annotated[
        Path | None,
        typer.Option(
            "--messages",
            help="Conversations: a JSON or JSON-lines file of messages, any data set that score --dataset "
            "reads, or - for standard input.",
            metavar="DATA",
        ),
    ] = None
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="One user message, instead of --messages.", metavar="TEXT")
    ] = None
    row: Annotated[
        int | None, typer.Option("--row", min=0, help="Use only row N, counted from 0.", metavar="N")
    ] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first N conversations.", metavar="N")
    ] = None

    @property
    def given(self) -> bool:
        """Whether conversations were named.

        Raises:
            InputError: both or neither can be meant.
        """
        if self.messages is not None and self.prompt is not None:
            raise InputError("--messages and --prompt both name conversations; give only one of them.")
        if self.messages is None and self.row is not None:
            raise InputError("--row is for --messages; give --messages DATA, or leave out --row.")
        return self.messages is not None or self.prompt is not None

    def read(self) -> Asked:
        """Read the conversations, and print how many rows there are and which are used.

        Raises:
            InputError: none were named, or they cannot be read.
        """
        if not self.given:
            raise InputError(
                "give conversations as --messages DATA (- reads standard input), or one user message as "
                "--prompt TEXT."
            )
        if self.prompt is not None:
            return _ask_prompt(self.prompt)
        assert self.messages is not None
        found, config = _read(self.messages, self.row, self.limit)
        _note_rows("standard input" if str(self.messages) == _STDIN else str(self.messages), found, self.row)
        if self.row is not None:
            config["row"] = self.row
        return Asked(found.conversations, config, found.describe())


def _ask_prompt(text: str) -> Asked:
    if not text.strip():
        raise InputError("--prompt is empty; give the text of a user message.")
    counts = {"layout": "messages", "rows_read": 1, "rows_kept": 1, "rows_skipped": 0, "reasons": {}}
    return Asked([[{"role": "user", "content": text}]], {"prompt": text}, counts)


def _read(path: Path, row: int | None, limit: int | None) -> tuple[GivenMessages, dict[str, Any]]:
    """The conversations, and the source with its fingerprint."""
    from ctxlens.chat.data import read_messages
    from ctxlens.chat.data.messages import parse_messages
    from ctxlens.chat.data.reading import read_bytes_rows
    from ctxlens.runs import digest

    if str(path) == _STDIN or path.is_fifo():
        content = sys.stdin.buffer.read() if str(path) == _STDIN else path.read_bytes()
        name = "standard input" if str(path) == _STDIN else str(path)
        found = parse_messages(read_bytes_rows(content, name), name, row, limit)
        return found, {"messages": str(path), "sha256": _short(content)}
    found = read_messages(path, row=row, limit=limit)
    if path.expanduser().is_file():
        return found, {"messages": str(path), "sha256": _short(path.expanduser().read_bytes())}
    return found, {"messages": str(path), "sha256": digest(found.conversations)}


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _note_rows(name: str, found: GivenMessages, row: int | None) -> None:
    """Print how many rows a source of several has, which are used, and why others are not."""
    if found.n_rows == 1 and found.layout == "messages":
        return
    used = len(found.conversations)
    if used == found.n_rows and used > 1:
        which = "all are used; --row N takes one of them, --limit N the first ones"
    elif row is not None:
        which = f"row {row} is used"
    elif used == 1:
        which = f"row {found.rows[0]} is used"
    else:
        which = f"{used} of them are used"
    rows = f"{found.n_rows} row{'' if found.n_rows == 1 else 's'}"
    _screen.note(f"{name}: {rows} (layout {found.layout}); {which}")
    for number, reason in found.skipped[:_SHOWN_REASONS]:
        _screen.note(f"row {number} skipped: {reason}")
    if len(found.skipped) > _SHOWN_REASONS:
        _screen.note(f"and {len(found.skipped) - _SHOWN_REASONS} more rows skipped")
    if found.skipped and used > 1:
        _screen.note("conversations are numbered from 0 without the skipped rows")


__all__ = ["Asked", "MessagesOptions"]
