"""The audit of a chat model: loss, controls, bias, cause and cost within a time that the user names."""

from ctxlens.auditing.run import Audit
from ctxlens.auditing.several import Audits, audit

__all__ = ["Audit", "Audits", "audit"]
