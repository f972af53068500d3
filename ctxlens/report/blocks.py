"""The building blocks of a report page, and figures as plain JSON values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

from ctxlens.results import Verdict
from ctxlens.stats import Interval

_MOST_OPEN = 2
"""Runs whose parts stand open below each other; with more runs, each is folded under its name."""


@dataclass(frozen=True)
class Figure:
    """A plotly figure.

    Attributes:
        figure: the figure as JSON values.
        label: description for readers who cannot see the figure.
        title: heading above the figure.
        group: the switch that the figure belongs to, if any; the page shows one variant of a group.
        variant: the choice of the switch for which the figure is shown.
    """

    figure: dict[str, Any]
    label: str
    title: str = ""
    group: str = ""
    variant: str = ""


@dataclass(frozen=True)
class Figures:
    """Figures side by side under one caption."""

    figures: Sequence[Figure]
    caption: str
    title: str = ""
    scale: str = ""
    conclusion: str = ""
    kind: str = "figures"

    @property
    def columns(self) -> int:
        """Number of figures in one row where the page is wide enough."""
        first = self.figures[0] if self.figures else None
        n = sum(one.variant == first.variant for one in self.figures) if first else 1
        return 4 if n in (4, 7, 8) else min(n, 3)


@dataclass(frozen=True)
class Explorer:
    """The layer × head heatmap with its switches, drawn by the page's script from `data`."""

    data: dict[str, Any]
    caption: str
    by_layer: Figures
    title: str = ""
    conclusion: str = ""
    kind: str = "explorer"


@dataclass(frozen=True)
class Tokens:
    """The token view with its switches."""

    markup: Markup
    data: dict[str, Any]
    caption: str
    facts: Sequence[tuple[str, str]] = ()
    title: str = ""
    kind: str = "tokens"


@dataclass(frozen=True)
class Cell:
    """A table cell: text, and an interval or a remark in small print below it.

    `link` is a relative address that the text leads to; only the first cell of a row has one.
    """

    text: str
    small: str = ""
    link: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is the row's header. A folded table is closed at first."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str
    title: str = ""
    conclusion: str = ""
    folded: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Answers:
    """An evaluation: a table with filters, and answers side by side, drawn by the page's script from `data`.

    Each of `rows` holds `cells` and the values that the filters use: `task`, `model`, `condition`, `metric`.
    """

    rows: Sequence[dict[str, Any]]
    data: dict[str, Any]
    caption: str
    title: str = ""
    conclusion: str = ""
    kind: str = "answers"

    def values(self, name: str) -> list[str]:
        """The values of `task`, `model`, `condition` or `metric`, each once."""
        return list(dict.fromkeys(row[name] for row in self.rows))


@dataclass(frozen=True)
class Judged:
    """A judgment of an answer: the rating, or the reason why there is none, and the judge's words."""

    rating: str
    words: str = ""


@dataclass(frozen=True)
class Said:
    """One model's answer, with remarks and judgments."""

    model: str
    text: str
    remarks: str = ""
    judged: Sequence[Judged] = ()


@dataclass(frozen=True)
class Turn:
    """One turn: the user's message and every model's answer."""

    asked: str
    said: Sequence[Said]


@dataclass(frozen=True)
class Dialogue:
    """A question of one or several turns, folded under its title."""

    title: str
    remark: str
    turns: Sequence[Turn]


@dataclass(frozen=True)
class SideBySide:
    """Questions with the answers of several models side by side."""

    dialogues: Sequence[Dialogue]
    caption: str
    title: str = ""
    kind: str = "side by side"


@dataclass(frozen=True)
class Note:
    """One line of text."""

    text: str
    kind: str = "note"


Block = Figures | Explorer | Tokens | Table | Answers | SideBySide | Note


@dataclass(frozen=True)
class Part:
    """What one run contributes to a section."""

    run: str
    blocks: Sequence[Block]
    verdicts: Sequence[Verdict] = ()


@dataclass(frozen=True)
class Section:
    """One section of the page; `kicker` names the claim that it supports, if any."""

    id: str
    title: str
    lead: str
    parts: Sequence[Part] = field(default_factory=tuple)
    kicker: str = ""

    @property
    def is_long(self) -> bool:
        """Whether the runs' parts are folded, so that the section stays short."""
        return len(self.parts) > _MOST_OPEN


def figure_json(figure: go.Figure) -> dict[str, Any]:
    """A figure as plain JSON values: NaN becomes null, numbers are rounded to five digits."""
    return _plain(json.loads(str(figure.to_json())))


def embed(value: Any) -> Markup:
    """JSON for a script element, escaped so that it can neither end the element nor open a comment."""
    text = json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def interval_cell(interval: Interval, *, signed: bool = False) -> Cell:
    """An estimate with its interval below."""
    if math.isnan(interval.estimate):
        return Cell("–")
    return Cell(number(interval.estimate, signed=signed), bounds(interval))


def number(value: float, *, signed: bool = False, digits: int = 2) -> str:
    """A number as text with a few digits and a true minus sign."""
    if math.isnan(value):
        return "–"
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text[1:] if float(text) == 0 and text[0] in "+-" else text.replace("-", "−")


def bounds(interval: Interval) -> str:
    """The interval alone, for instance `[0.33, 0.49]`; `READING_INTERVALS` explains the two words."""
    if math.isnan(interval.low) or math.isnan(interval.high):
        return "too few"
    if interval.low == interval.high:
        return "all alike"
    return f"[{number(interval.low)}, {number(interval.high)}]"


READING_INTERVALS = (
    "Numbers in brackets are 95 % intervals. “Too few” stands where there are fewer than two texts (or "
    "questions, or conversations), so that there is no interval. “All alike” stands where all of them gave "
    "the same value: the interval has no width, which says nothing about other texts."
)
"""What stands in place of an interval, in words for the page."""


def in_text(interval: Interval, *, signed: bool = False) -> str:
    """Estimate and interval for running text."""
    ends = bounds(interval)
    return f"{number(interval.estimate, signed=signed)} {ends if ends.startswith('[') else f'({ends})'}"


def chance(p_value: float) -> str:
    """A p value as text."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    return value
