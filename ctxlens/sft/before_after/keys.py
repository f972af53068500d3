"""The keys of a recipe that say whether and how the delivered checkpoint is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _key(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass
class EvaluationKeys:
    """Keys of a recipe: what the trained checkpoint and the model it started from are asked."""

    evaluate: bool = _key(False, "Measure the checkpoint against the model it started from, for its card.")
    evaluate_haystack: str | None = _key(
        None, "Texts to hide needles in, as `ctxlens needle` takes; a packaged model has its own."
    )
    evaluate_needles: str | None = _key(
        None, "Needles as `ctxlens needle` takes; sf, or known,unknown in the organism's haystack."
    )
    evaluate_lengths: str = _key("x5", "Context lengths in tokens, such as 200,1000; x5: five, spread.")
    evaluate_depths: str = _key("x5", "Depths of the needle in percent, such as 0,50,100; x5: five.")
    evaluate_cases: int = _key(2, "Contexts of each length and depth.")
    evaluate_new_tokens: int | None = _key(None, "Longest answer in tokens; 100, or 16 for the organism.")
    evaluate_window: int = _key(8192, "Longest prompt with its answer in tokens, if the model holds more.")
    evaluate_questions: str | None = _key(
        None, "YAML or JSON file of closed-book questions (question, keywords, perhaps prefix)."
    )
    evaluate_folder: str = _key("evaluation", "Where it goes inside the run's folder.")


__all__ = ["EvaluationKeys"]
