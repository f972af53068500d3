"""Finished pieces of a result, kept in a run folder so that a run that was stopped goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctxlens.runs import Run


@dataclass(frozen=True)
class KeptUnits:
    """Pieces of one result, each in a JSON file of its own; without a run folder nothing is kept.

    Attributes:
        out: the run folder.
        folder: where in it.
    """

    out: Run | None
    folder: str

    @classmethod
    def of(cls, out: Run | None, name: str, *made_of: Any) -> KeptUnits:
        """The pieces of a result that depends on these JSON values: others are never taken for them."""
        content = json.dumps([made_of, out.manifest.get("created") if out else None], default=str)
        return cls(out, f"parts/{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}")

    def get_json(self, unit: str, compute: Callable[[], Any]) -> Any:
        """A piece as JSON values: from its file, or computed and kept."""
        if self.out is None:
            return compute()
        name = f"{self.folder}/{unit}.json"
        if not self.out.has(name):
            self.out.write_json(name, compute())
        return self.out.read_json(name)

    def get(self, unit: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """A piece as an array."""
        return np.array(self.get_json(unit, lambda: compute().tolist()), dtype=float)


__all__ = ["KeptUnits"]
