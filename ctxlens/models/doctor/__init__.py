"""A self-check on any model: role spans, parity of three ways, causality, steering, memory.

`diagnose` returns a `Diagnosis`, which the command line prints (`ctxlens doctor`).
"""

from ctxlens.models.doctor.diagnosis import DEFAULT_LENGTH, diagnose
from ctxlens.models.doctor.findings import Diagnosis, Finding

__all__ = ["DEFAULT_LENGTH", "Diagnosis", "Finding", "diagnose"]
