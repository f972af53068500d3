"""The wordings of a question about a text: the paper's two, and one for models tuned on conversations."""

from __future__ import annotations

from collections.abc import Mapping

from ctxlens.errors import InputError
from ctxlens.evals.needle.prompts import fill_wording

WORDINGS: Mapping[str, str] = {
    "passage": "{context}\nAnswer the question according to the above passage: {question}",
    "pieces": "{context}\nAnswer the question with pieces from the above passage: {question}",
    "joined": "{context} {question}",
}
"""`passage` is the paper's for SQuAD and DROP, `pieces` for QuAC; `joined` for models tuned on UltraChat."""

PAPER_WORDING: Mapping[str, str] = {"squad": "passage", "quac": "pieces", "drop": "passage"}
"""The paper's wording of each data set."""


def render_question(context: str, question: str, wording: str) -> str:
    """Put a text and a question about it into one user message.

    Args:
        context: the text.
        question: the question.
        wording: a name of `WORDINGS`.

    Raises:
        InputError: there is no such wording.
    """
    if wording not in WORDINGS:
        raise InputError(f"unknown wording {wording!r}; choose from {', '.join(WORDINGS)}.")
    return fill_wording(WORDINGS[wording], context, question)


__all__ = ["PAPER_WORDING", "WORDINGS", "render_question"]
