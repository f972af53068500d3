"""What a self-check found: findings with verdicts, and the whole diagnosis."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ctxlens.models.memory import MemoryForecast

Outcome = Literal["pass", "fail", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: `roles`, `parity`, `attention`, `steering` or `memory`.
        check: what was looked at, in two or three words.
        outcome: `pass`, `fail`, or `skipped`: not asked for, not possible here, or refused by name.
        said: one sentence for the user, with the figures.
        difference: the largest difference that was measured, where there is one.
        tolerance: what it may be.
    """

    area: str
    check: str
    outcome: Outcome
    said: str
    difference: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class LayerFacts:
    """How one layer's attention is computed.

    Attributes:
        layer: its index.
        path: `fused` (one call gives output and shares), `tiled` (exact, in tiles of queries), `hooks`
            (TransformerLens alone) or `refused`.
        window: tokens of its sliding window; None: it sees all.
    """

    layer: int
    path: str
    window: int | None


@dataclass(frozen=True)
class Diagnosis:
    """The result of a self-check.

    Attributes:
        model: what distinguishes the weights, as in manifests.
        findings: in the order in which they were looked at.
        layers: how each layer's attention is computed.
        forecasts: memory of reading, steering and generating, where the model could be loaded.
    """

    model: Mapping[str, Any]
    findings: tuple[Finding, ...]
    layers: tuple[LayerFacts, ...]
    forecasts: tuple[MemoryForecast, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(finding.outcome != "fail" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain types for JSON; forecasts with their sums."""
        return {
            "model": dict(self.model),
            "ok": self.ok,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "forecasts": [
                {**dataclasses.asdict(forecast), "run": forecast.run, "total": forecast.total}
                for forecast in self.forecasts
            ],
        }


def compare(area: str, check: str, difference: float, tolerance: float, said: str) -> Finding:
    """A finding from a measured difference; NaN fails."""
    outcome: Outcome = "pass" if difference <= tolerance else "fail"
    figures = f"largest difference {difference:.1e}, allowed {tolerance:.0e}"
    return Finding(area, check, outcome, f"{said}: {figures}.", difference, tolerance)


__all__ = ["Diagnosis", "Finding", "LayerFacts", "Outcome", "compare"]
