"""The result of a self-check: findings with outcomes, and the whole diagnosis."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ctxlens.models.backends.protocol import LayerFacts
from ctxlens.models.memory import MemoryForecast

Outcome = Literal["pass", "fail", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        area: `roles`, `parity`, `attention`, `steering` or `memory`.
        check: what was checked, in two or three words.
        outcome: `pass`, `fail`, or `skipped` (not requested, not possible here, or refused with a reason).
        said: one sentence for the user, with the numbers.
        difference: the largest difference measured, if one was measured.
        tolerance: the largest difference allowed.
    """

    area: str
    check: str
    outcome: Outcome
    said: str
    difference: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Diagnosis:
    """The result of a self-check.

    Attributes:
        model: what distinguishes the weights, as in manifests.
        findings: the findings, in the order of the checks.
        layers: how each layer's attention is computed.
        forecasts: memory of reading, steering and generating, if the model could be loaded.
        summary: what the check comes to, in one or two sentences; none if no backend can read the model.
    """

    model: Mapping[str, Any]
    findings: tuple[Finding, ...]
    layers: tuple[LayerFacts, ...]
    forecasts: tuple[MemoryForecast, ...]
    summary: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(finding.outcome != "fail" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The diagnosis in plain types for JSON; forecasts include their sums."""
        return {
            "model": dict(self.model),
            "ok": self.ok,
            "summary": list(self.summary),
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


__all__ = ["Diagnosis", "Finding", "Outcome", "compare"]
