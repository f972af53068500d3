"""Claims with their verdicts: a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ctxlens.results.files import check_record, make_record, read_file
from ctxlens.stats import Interval


@dataclass(frozen=True)
class Verdict:
    """One claim, tested on its measurement by a rule that was fixed in advance.

    Attributes:
        claim: short name (`loss`, `role bias`, `cause`, `source`, `cure`).
        sentence: the result in one sentence for the reader, with its figure.
        figure: the measured quantity with its interval.
        quantity: what the figure measures, with its unit.
        rule: the rule that decides.
        verdict: `supported`, `not supported` or `inconclusive`.
        notes: further figures as pairs of description and interval.
    """

    claim: str
    sentence: str
    figure: Interval
    quantity: str
    rule: str
    verdict: str
    notes: tuple[tuple[str, Interval], ...] = ()

    @property
    def word(self) -> str:
        """The verdict as a reader should see it: `yes`, `no` or `undecided` where the rule says "Yes if"."""
        answers = {"supported": "yes", "not supported": "no", "inconclusive": "undecided"}
        return answers.get(self.verdict, self.verdict) if "Yes if" in self.rule else self.verdict


@dataclass(frozen=True)
class Verdicts:
    """The verdicts of one run."""

    verdicts: tuple[Verdict, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        record = make_record(self, verdicts=[asdict(verdict) for verdict in self.verdicts])
        Path(path).write_text(record, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Verdicts:
        """Read what `save` has written; raises `InputError` on anything else."""
        record = check_record(path, read_file(path, Path.read_bytes), cls.__name__)
        verdicts = tuple(
            Verdict(
                **{
                    **row,
                    "figure": Interval(**row["figure"]),
                    "notes": tuple((what, Interval(**interval)) for what, interval in row["notes"]),
                }
            )
            for row in record["verdicts"]
        )
        return cls(verdicts, record["meta"])
