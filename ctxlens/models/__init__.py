"""Language models whose attention can be read and steered: `load_model` and the `Model` that it returns.

Names are loaded when they are first used, so that the pure parts of this package (`attention.steering`,
`attention.shares`, `queries`) can be imported without transformers or TransformerLens.

`README.md` in this folder explains how the parts work together.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxlens.models.checkpoint import PACKAGED as PACKAGED
    from ctxlens.models.checkpoint import read_chat_template as read_chat_template
    from ctxlens.models.factory import load_model as load_model
    from ctxlens.models.model import Model as Model

_HOME = {
    "Model": "model",
    "load_model": "factory",
    "PACKAGED": "checkpoint",
    "read_chat_template": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ctxlens.models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ctxlens.models.{_HOME[name]}"), name)


__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]
