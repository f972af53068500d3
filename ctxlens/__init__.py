"""ctxlens: see, prove, trace and cure the loss of context awareness in instruction-tuned models.

Public names are loaded when they are first used, so that `import ctxlens` loads neither torch nor
any other heavy package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "chat.roles": ("RenderedChat", "Role", "render", "render_plain"),
    "errors": ("CtxlensError", "InputError", "RenderError", "RunExistsError", "UnsupportedModelError"),
    "chat.data": ("load_conversations", "read_messages_file"),
    "results": (
        "Ability", "Drift", "Evaluation", "HeadCurves", "HeadMap", "NeedleGrid", "RoleAllocation", "Scores",
        "Selection", "TokenView", "Verdict", "Verdicts", "load_result",
    ),
    "models.attention.fused": ("augmented_attention",),
    "models.attention.steering": ("Steering", "emphasise"),
    "models": ("Model", "load_model"),
    "models.allocate": ("allocate",),
    "evals.needle": ("NEEDLES", "Needle", "NeedleConfig", "run_needle"),
    "evals.needle.study": ("needle",),
    "heads.drift": ("compare", "drift"),
    "scoring.dataset": ("score",),
    "scoring": ("score_conversations",),
    "scoring.selection": ("choose_layer", "select_turns"),
    "models.indicator_token": ("add_indicator",),
    "chat.data.annotate": ("annotate_messages",),
    "evals.harness": ("run_evaluation",),
    "sft": ("ContextCallback", "TrainConfig", "train"),
    "auditing": ("Audit", "audit"),
    "curing": ("Cure", "cure"),
    "demo": ("run_demo",),
}  # fmt: skip
_MODULES = {
    "ablation": "heads.ablation",
    "allocation": "models.attention.shares",
    "augment": "models.attention.fused",
    "data": "chat.data",
    "harness": "evals.harness",
    "indicator": "models.indicator_token",
    "lens": "models.backends.lens",
    "native": "models.backends.native",
    "plots": "report.plots",
    "roles": "chat.roles",
    "selection": "scoring.selection",
    "steering": "models.attention.steering",
    **{
        name: name
        for name in (
            "auditing",
            "chat",
            "curing",
            "demo",
            "errors",
            "evals",
            "heads",
            "models",
            "report",
            "results",
            "runs",
            "scoring",
            "sft",
            "stats",
        )
    },
}
"""Modules that are reached as attributes of the package, under their own or their former name."""
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

if TYPE_CHECKING:
    from ctxlens.auditing import Audit as Audit
    from ctxlens.auditing import audit as audit
    from ctxlens.chat.data import load_conversations as load_conversations
    from ctxlens.chat.data import read_messages_file as read_messages_file
    from ctxlens.chat.data.annotate import annotate_messages as annotate_messages
    from ctxlens.chat.roles import RenderedChat as RenderedChat
    from ctxlens.chat.roles import Role as Role
    from ctxlens.chat.roles import render as render
    from ctxlens.chat.roles import render_plain as render_plain
    from ctxlens.curing import Cure as Cure
    from ctxlens.curing import cure as cure
    from ctxlens.demo import run_demo as run_demo
    from ctxlens.errors import CtxlensError as CtxlensError
    from ctxlens.errors import InputError as InputError
    from ctxlens.errors import RenderError as RenderError
    from ctxlens.errors import RunExistsError as RunExistsError
    from ctxlens.errors import UnsupportedModelError as UnsupportedModelError
    from ctxlens.evals.harness import run_evaluation as run_evaluation
    from ctxlens.evals.needle import NEEDLES as NEEDLES
    from ctxlens.evals.needle import Needle as Needle
    from ctxlens.evals.needle import NeedleConfig as NeedleConfig
    from ctxlens.evals.needle import run_needle as run_needle
    from ctxlens.evals.needle.study import needle as needle
    from ctxlens.heads.drift import compare as compare
    from ctxlens.heads.drift import drift as drift
    from ctxlens.models import Model as Model
    from ctxlens.models import load_model as load_model
    from ctxlens.models.allocate import allocate as allocate
    from ctxlens.models.attention.fused import augmented_attention as augmented_attention
    from ctxlens.models.attention.steering import Steering as Steering
    from ctxlens.models.attention.steering import emphasise as emphasise
    from ctxlens.models.indicator_token import add_indicator as add_indicator
    from ctxlens.results import Ability as Ability
    from ctxlens.results import Drift as Drift
    from ctxlens.results import Evaluation as Evaluation
    from ctxlens.results import HeadCurves as HeadCurves
    from ctxlens.results import HeadMap as HeadMap
    from ctxlens.results import NeedleGrid as NeedleGrid
    from ctxlens.results import RoleAllocation as RoleAllocation
    from ctxlens.results import Scores as Scores
    from ctxlens.results import Selection as Selection
    from ctxlens.results import TokenView as TokenView
    from ctxlens.results import Verdict as Verdict
    from ctxlens.results import Verdicts as Verdicts
    from ctxlens.results import load_result as load_result
    from ctxlens.scoring import score_conversations as score_conversations
    from ctxlens.scoring.dataset import score as score
    from ctxlens.scoring.selection import choose_layer as choose_layer
    from ctxlens.scoring.selection import select_turns as select_turns
    from ctxlens.sft import ContextCallback as ContextCallback
    from ctxlens.sft import TrainConfig as TrainConfig
    from ctxlens.sft import train as train

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"ctxlens.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"ctxlens.{_MODULES[name]}")
    raise AttributeError(f"module 'ctxlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
