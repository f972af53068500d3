"""Language models that ctxlens can look into: `load_model` and the `Model` it gives.

Both are loaded when they are first used, so that the pure parts of this package (`attention.steering`,
`attention.shares`, `queries`) can be imported without transformers or TransformerLens.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxlens.models.loading import PACKAGED as PACKAGED
    from ctxlens.models.loading import read_chat_template as read_chat_template
    from ctxlens.models.model import Model as Model
    from ctxlens.models.model import load_model as load_model

_HOME = {"Model": "model", "load_model": "model", "PACKAGED": "loading", "read_chat_template": "loading"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ctxlens.models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ctxlens.models.{_HOME[name]}"), name)


__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]
