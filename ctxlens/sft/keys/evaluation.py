"""The keys of a recipe that say whether and how the delivered checkpoint is evaluated."""

from __future__ import annotations

from pydantic import Field

from ctxlens.sft.keys.base import RecipeKeys


class EvaluationKeys(RecipeKeys):
    """What the trained checkpoint and the model before the training are asked.

    Raises:
        InputError: an unknown key, or a value of the wrong kind.
    """

    evaluate: bool = Field(
        default=False,
        description="Compare the checkpoint with the model before the training, and add the result to the "
        "model card.",
    )
    evaluate_haystack: str | None = Field(
        default=None,
        description="Texts in which needles are hidden, as for `ctxlens needle --haystack`. Default: "
        "organism for a packaged model or one trained from it, else neutral.",
    )
    evaluate_needles: str | None = Field(
        default=None,
        description="Needles, as for `ctxlens needle --needle`. Default: neutral, or known,unknown for the "
        "organism or in its haystack.",
    )
    evaluate_lengths: str = Field(
        default="x5",
        description="Context lengths in tokens, such as 200,1000. x5 spreads five lengths over the window.",
    )
    evaluate_depths: str = Field(
        default="x5",
        description="Depths of the needle in percent, such as 0,50,100. x5 spreads five depths evenly.",
    )
    evaluate_cases: int = Field(default=2, description="Number of contexts for each length and depth.")
    evaluate_new_tokens: int | None = Field(
        default=None,
        description="Maximum length of an answer in tokens. Default: 100, or 16 in the organism's haystack.",
    )
    evaluate_window: int = Field(
        default=8192,
        description="Maximum length of a prompt and its answer in tokens, if the model's window is longer.",
    )
    evaluate_questions: str | None = Field(
        default=None,
        description="YAML or JSON file of closed-book questions, each with question, keywords and an "
        "optional prefix.",
    )
    evaluate_folder: str = Field(
        default="evaluation", description="Folder for the results, inside the run's folder."
    )


EVALUATION_KEYS = frozenset(EvaluationKeys.model_fields)
"""The names of these keys."""

__all__ = ["EVALUATION_KEYS", "EvaluationKeys"]
