"""What can be done to heads: steer them, or switch them off."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, get_args

from ctxlens.heads.ablation import Ablation, AblationKind, check_ablation
from ctxlens.heads.answers import Answers
from ctxlens.heads.choose import Head
from ctxlens.models import Model
from ctxlens.models.attention.steering import Steering

ACTIONS = ("steer", *get_args(AblationKind))
"""Steering to the user's tokens, and the ablations."""


@dataclass
class Action:
    """One intervention on heads of a model.

    Attributes:
        model: the model.
        kind: one of `ACTIONS`.
        alpha: strength of steering.
        reference: for `mean`: the answers over which the heads' mean outputs are computed.

    Raises:
        InputError: the kind is unknown, or alpha is outside (0, 1].
    """

    model: Model
    kind: str
    alpha: float = 0.1
    reference: Answers | None = None
    _ablation: Ablation = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind == "steer":
            Steering(self.alpha)
        else:
            check_ablation((), self.kind, self.model)
        self._ablation = Ablation(self.model)

    def apply(self, heads: Iterable[Head]) -> AbstractContextManager[Any]:
        """Apply the action to these heads for the duration of a `with` block."""
        if self.kind == "steer":
            return self.model.steer(self.alpha, heads=tuple(heads))
        if self.kind == "mean" and self._ablation.means is None and self.reference is not None:
            self._ablation.read_means(
                self.reference.said(self.model), batch_tokens=self.reference.batch_tokens
            )
        return self._ablation.apply(heads, self.kind)

    def describe(self) -> dict[str, Any]:
        """Describe the action for a result's `meta`."""
        return {"action": self.kind, **({"alpha": self.alpha} if self.kind == "steer" else {})}


__all__ = ["ACTIONS", "Action"]
