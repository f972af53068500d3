"""The cure as one call: score, select, train with the indicator, and audit before and after.

Names are loaded when they are first used, so that a request can be refused without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxlens.curing.request import METHODS as METHODS
    from ctxlens.curing.run import Cure as Cure
    from ctxlens.curing.run import cure as cure

_HOME = {"METHODS": "request", "Cure": "run", "cure": "run"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ctxlens.curing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ctxlens.curing.{_HOME[name]}"), name)


__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]
