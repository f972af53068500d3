"""Claims with their verdicts: a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ctxlens.results.files import check_record, make_record, read_file
from ctxlens.results.shown import Shown, count
from ctxlens.stats import Interval

if TYPE_CHECKING:
    import pandas as pd


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


@dataclass(frozen=True, repr=False)
class Verdicts(Shown):
    """The verdicts of one run."""

    NATIVE: ClassVar[str] = ".json"
    verdicts: tuple[Verdict, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """One row per claim.

        Columns: `claim`; `verdict` (`supported`, `not supported` or `inconclusive`); `answer` (the verdict as
        a reader should see it, see `Verdict.word`); `estimate`, `low`, `high` (the measured quantity with its
        95 % interval) and `n` (its independent units); `quantity` (what was measured); `sentence`; `rule`.
        """
        import pandas as pd

        columns = (
            "claim", "verdict", "answer", "estimate", "low", "high", "n", "quantity", "sentence", "rule",
        )  # fmt: skip
        rows = [
            {
                "claim": one.claim, "verdict": one.verdict, "answer": one.word, **one.figure.as_dict(),
                "quantity": one.quantity, "sentence": one.sentence, "rule": one.rule,
            }
            for one in self.verdicts
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=list(columns))

    def overview(self) -> pd.DataFrame:
        """Claim, answer and figure."""
        return self.to_frame()[["claim", "answer", "estimate", "low", "high", "n", "sentence"]].round(3)

    def describe(self) -> str:
        """The number of verdicts, and each in a word."""
        words = ", ".join(f"{one.claim}: {one.verdict}" for one in self.verdicts)
        return count(len(self.verdicts), "verdict") + (f"; {words}" if words else "")

    def write(self, path: str | Path) -> None:
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
