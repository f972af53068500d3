"""The readings of a training, in a folder of their own beside its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctxlens.files import append_lines, plain_value, read_lines, write_lines
from ctxlens.runs import MANIFEST, Run

STUDY = "context"
FOLDER = "context"
READINGS = "readings.jsonl"


class Record:
    """The readings of one training: one JSON object per line, in the order of their steps.

    Attributes:
        folder: the folder, which holds the manifest too.
        lines: the readings.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, writes: bool) -> None:
        """Prepare the record without touching the folder.

        Args:
            folder: where it is kept.
            config: what the readings depend on, for the manifest.
            writes: whether this process writes files: the first one of several.
        """
        self.folder, self.config, self.writes = folder, dict(config), writes
        self.lines: list[dict[str, Any]] = []

    def open(self, step: int) -> None:
        """Begin a record, or go on with the one of an interrupted training.

        Readings of later steps than the checkpoint's are dropped, because these steps are trained again.

        Args:
            step: the step at which the training begins; 0 for a new training, whose folder may hold the
                record of another one, which is then renamed with the ending `.old`.

        Raises:
            RunExistsError: the training goes on, and its record was made with other questions; or the folder
                holds something else.
        """
        path = self.folder / READINGS
        if step == 0:
            self.lines = []
        else:
            self.lines = [line for line in read_lines(path) if line.get("step", 0) <= step]
        if not self.writes:
            return
        is_there = (self.folder / MANIFEST).is_file()
        Run.open(self.folder, study=STUDY, config=self.config, overwrite=step == 0 and is_there)
        if step and path.is_file():
            write_lines(path, self.lines)

    def add(self, line: Mapping[str, Any]) -> None:
        """Keep a reading."""
        kept = plain_value(dict(line))
        self.lines.append(kept)
        if self.writes:
            append_lines(self.folder / READINGS, [kept])

    def at(self, step: int) -> dict[str, Any] | None:
        """The reading of a step; None if none was taken."""
        return next((line for line in reversed(self.lines) if line["step"] == step), None)

    @property
    def times(self) -> tuple[float, float]:
        """Seconds of training and of readings up to the last reading."""
        last = self.lines[-1] if self.lines else {}
        return float(last.get("elapsed_seconds") or 0.0), float(last.get("spent_seconds") or 0.0)


__all__ = ["FOLDER", "READINGS", "STUDY", "Record"]
