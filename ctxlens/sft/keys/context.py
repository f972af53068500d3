"""The keys of a recipe that say how context use is measured while the model is trained."""

from __future__ import annotations

from pydantic import Field, model_validator

from ctxlens.errors import InputError
from ctxlens.parsing import parse_numbers
from ctxlens.sft.context.rules import check_quantity
from ctxlens.sft.keys.base import RecipeKeys


class ContextKeys(RecipeKeys):
    """How often, how much and to what end a model is asked during its training.

    Raises:
        InputError: an unknown key, a value of the wrong kind or out of range, or a rule without readings.
    """

    context: bool = Field(
        default=False,
        description="Measure during the training how the model uses its context; see the class "
        "ContextCallback.",
    )
    context_every: int | None = Field(
        default=None, description="Steps between readings. Default: a twentieth of all steps."
    )
    context_share: float = Field(
        default=0.05, description="Share of the training's time that readings may take, above 0, at most 1."
    )
    context_texts: int = Field(default=8, description="Number of texts of each length.")
    context_lengths: str = Field(
        default="200,400", description="Lengths of the texts in tokens, separated by commas."
    )
    context_stop_below: float | None = Field(
        default=None,
        description="Stop when two readings in a row have a recall with the template that is lower than the "
        "first reading's by more than this. Default: never.",
    )
    context_keep_best: str | None = Field(
        default=None,
        description="Keep the model with the best reading in the folder context/best, by this quantity, such "
        "as recall_template. Default: none is kept.",
    )

    @model_validator(mode="after")
    def _check_context(self) -> ContextKeys:
        if not 0 < self.context_share <= 1:
            raise InputError(f"context_share must be above 0 and at most 1, got {self.context_share}.")
        for name in ("context_every", "context_texts"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")
        if min(parse_numbers(self.context_lengths, int, "context_lengths")) < 1:
            raise InputError(f"context_lengths must be numbers of tokens, got {self.context_lengths}.")
        if self.context_stop_below is not None and not 0 < self.context_stop_below < 1:
            raise InputError(
                f"context_stop_below must be above 0 and below 1, got {self.context_stop_below}."
            )
        if self.context_keep_best is not None:
            check_quantity(self.context_keep_best, "context_keep_best")
        for name in ("context_stop_below", "context_keep_best"):
            if getattr(self, name) is not None and not self.context:
                raise InputError(f"{name} has no effect without readings; give context: true too.")
        return self


__all__ = ["ContextKeys"]
