"""What a verb found, on stdout: text for people, one JSON document, or one CSV table. See docs/cli.md."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, ClassVar

import typer

import ctxlens
from ctxlens.errors import InputError
from ctxlens.files import plain_value
from ctxlens.results.shown import count

if TYPE_CHECKING:
    from ctxlens.stats import Interval

SCHEMA = 1
"""Version of the JSON document. A new column or key does not change it."""
LEAST_UNITS = 10
"""The fewest texts over which a table shows an interval: over fewer, a bootstrap interval is too narrow."""
STDOUT = "-"
INTERVAL = ("low", "high", "n")
_STDOUT: ContextVar[IO[str] | None] = ContextVar("stdout", default=None)


@dataclass(frozen=True)
class Table:
    """A tidy table: named columns, and rows of texts, numbers and truth values; None and NaN: no value."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]

    def as_dict(self) -> dict[str, Any]:
        """The table as JSON values."""
        return {
            "columns": list(self.columns),
            "rows": [[plain_value(cell) for cell in row] for row in self.rows],
        }

    def as_csv(self) -> str:
        """The table as CSV with a header; cells without a value are empty."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(self.columns)
        for row in self.rows:
            values = map(plain_value, row)
            writer.writerow(["" if value is None else value for value in values])
        return file.getvalue()


@dataclass(frozen=True)
class Outcome:
    """What a verb found.

    Attributes:
        verb: the verb.
        summary: one sentence that says what the table shows.
        table: the main table, which `--csv` prints.
        model: the model or models; None if none was used.
        folder: the run folder, if there is one.
        tables: further tables by name, in the JSON document only.
        more: further entries of the JSON document.
    """

    verb: str
    summary: str
    table: Table
    model: str | None = None
    folder: Path | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "schema": SCHEMA,
            "verb": self.verb,
            "version": ctxlens.__version__,
            "model": self.model,
            "summary": self.summary,
            "folder": None if self.folder is None else str(self.folder),
            **self.more,
            "table": self.table.as_dict(),
            **({"tables": {k: one.as_dict() for k, one in self.tables.items()}} if self.tables else {}),
        }


@dataclass(frozen=True)
class OutputOptions:
    """How results and progress are printed."""

    PANEL: ClassVar[str] = "Output"

    json_out: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON document on stdout.")
    ] = False
    csv_out: Annotated[bool, typer.Option("--csv", help="Print the table as CSV on stdout.")] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print no plan, progress or remarks; only errors.")
    ] = False

    def __post_init__(self) -> None:
        if self.json_out and self.csv_out:
            raise InputError("--json and --csv both print to stdout; give only one of them.")

    @property
    def prints_json(self) -> bool:
        """Whether the JSON document is printed."""
        return self.json_out

    @property
    def for_machines(self) -> bool:
        """Whether stdout is for JSON or CSV alone."""
        return self.prints_json or self.csv_out

    @contextmanager
    def reserve(self) -> Iterator[None]:
        """Keep stdout for the result: with `--json` or `--csv`, what else is printed goes to stderr."""
        if not self.for_machines:
            yield
            return
        token = _STDOUT.set(sys.stdout)
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            _STDOUT.reset(token)

    def show(self, found: Callable[[], Outcome], text: Callable[[], object]) -> None:
        """Print the result as it was asked for.

        Args:
            found: makes the tables and the sentence.
            text: prints the result for people; not called with `--json` or `--csv`.
        """
        if self.prints_json:
            print_json(found().as_dict())
        elif self.csv_out:
            print(found().table.as_csv(), end="", file=_STDOUT.get() or sys.stdout)
        else:
            text()


def print_json(document: Any) -> None:
    """Print a JSON document to the stdout that was kept for it; what is not a number becomes null."""
    out = _STDOUT.get() or sys.stdout
    print(json.dumps(plain_value(document), indent=2, ensure_ascii=False, allow_nan=False), file=out)


def interval_cells(one: Interval | None) -> list[Any]:
    """Estimate, lower and upper bound, and number of units, as cells of a table."""
    return [None] * 4 if one is None else [one.estimate, one.low, one.high, one.n]


def show_interval(one: Interval, digits: int = 2, unit: str = "text", *, signed: bool = False) -> str:
    """An estimate with its interval, or with the number of units behind it where there is none to trust.

    `0.41 [0.33, 0.49]`; `0.41 (3 texts)` for fewer than `LEAST_UNITS`; `0.00 (12 texts alike)` where all
    units have the same value, which says nothing about other texts.
    """
    estimate = f"{one.estimate:{'+' if signed else ''}z.{digits}f}"
    if one.estimate != one.estimate:
        return "–"
    if one.n < LEAST_UNITS or one.low != one.low:
        return f"{estimate} ({count(one.n, unit)})"
    if one.low == one.high:
        return f"{estimate} ({count(one.n, unit)} alike)"
    return f"{estimate} [{one.low:z.{digits}f}, {one.high:z.{digits}f}]"


def say_interval(one: Interval, digits: int = 2, unit: str = "text") -> str:
    """The same for a sentence, which says why there is no interval."""
    shown = show_interval(one, digits, unit)
    if shown.endswith("alike)"):
        return shown
    return shown[:-1] + ": too few for an interval)" if shown.endswith(")") else shown


def few_note(intervals: Sequence[Interval], unit: str = "text") -> str | None:
    """A remark for a table in which some intervals are left out; None if none are."""
    if any(one.n < LEAST_UNITS and one.estimate == one.estimate for one in intervals):
        return f"fewer than {LEAST_UNITS} {unit}s are too few for an interval; their number stands instead"
    return None


__all__ = [
    "INTERVAL",
    "LEAST_UNITS",
    "STDOUT",
    "Outcome",
    "OutputOptions",
    "Table",
    "count",
    "few_note",
    "interval_cells",
    "print_json",
    "say_interval",
    "show_interval",
]  # fmt: skip
