"""lm-evaluation-harness (lm-eval) on models that ctxlens can read and steer.

`run_evaluation` measures models under several conditions; `CtxlensLM` is the model class for lm-eval. The
same from lm-eval's own command line: `python -m ctxlens.evals.harness run --model ctxlens --model_args
pretrained=...,template=true,alpha=0.5 --tasks ...`.
"""

from __future__ import annotations

import importlib
from typing import Any

from ctxlens.errors import require_package

_HOME = {
    "CtxlensLM": "adapter", "parse_conditions": "asking",
    "run_evaluation": "evaluate", "first_prompts": "evaluate",
    "check_names": "tasks", "load_tasks": "tasks",
}  # fmt: skip


def require() -> None:
    """Raise `MissingPackageError` if lm-evaluation-harness is not installed."""
    require_package("evaluation with lm-evaluation-harness", "lm_eval")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ctxlens.evals.harness' has no attribute {name!r}")
    require()
    return getattr(importlib.import_module(f"ctxlens.evals.harness.{_HOME[name]}"), name)


__all__ = sorted([*_HOME, "require"])  # pyright: ignore[reportUnsupportedDunderAll]
