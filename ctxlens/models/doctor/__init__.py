"""A self-check on any model: role spans, parity of three ways, causality, steering, memory.

`diagnose` returns a `Diagnosis`; the command line prints it (`ctxlens doctor`).
"""

from ctxlens.models.doctor.diagnosis import DEFAULT_LENGTH, diagnose
from ctxlens.models.doctor.findings import Diagnosis, Finding, LayerFacts

__all__ = ["DEFAULT_LENGTH", "Diagnosis", "Finding", "LayerFacts", "diagnose"]
