"""The audit of a chat model: loss, controls, bias, cause and cost within a time that the user names."""

from ctxlens.auditing.run import Audit, audit

__all__ = ["Audit", "audit"]
