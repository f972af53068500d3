"""QuAC's F1 and human equivalence (Choi et al., 2018), with its mark for questions without an answer."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ctxlens.evals.qa.metrics import best_of, check_answers, normalize_answer, word_f1

CANNOT_ANSWER = "CANNOTANSWER"
"""The mark at the end of QuAC's texts; it is the answer to questions that the text does not answer."""


def choose_references(answers: Sequence[str]) -> list[str]:
    """The answers that count: the mark if at least half of the annotators gave it, otherwise the others."""
    found = [answer for answer in answers if answer != CANNOT_ANSWER]
    return found if 2 * len(found) > len(answers) else [CANNOT_ANSWER]


def score_quac_f1(prediction: str, answers: Sequence[str]) -> float:
    """QuAC's F1, 0 to 1: SQuAD's word F1, averaged over leaving out each gold answer in turn.

    A model is thus compared with as many answers as a human annotator is. If the answer is `CANNOT_ANSWER`,
    only exactly this word scores 1, so the prompt must explain it.

    Args:
        prediction: the answer to be scored.
        answers: the gold answers of all annotators, `CANNOT_ANSWER` among them where one found none.

    Raises:
        InputError: there is no gold answer.
    """
    check_answers(answers)
    return _leave_one_out(prediction, choose_references(answers))


def score_human_f1(answers: Sequence[str]) -> float:
    """How well annotators agree, 0 to 1: the mean F1 of each against the others; 1 for a single annotator.

    The official script leaves out questions below 0.4.
    """
    golds = choose_references(answers)
    if len(golds) == 1:
        return 1.0
    others = [golds[:i] + golds[i + 1 :] for i in range(len(golds))]
    return fmean(_best(gold, rest) for gold, rest in zip(golds, others, strict=True))


def score_heq(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction's F1 is at least the annotators' own (human equivalence, by question), else 0."""
    return float(score_quac_f1(prediction, answers) >= score_human_f1(answers))


def _leave_one_out(prediction: str, golds: list[str]) -> float:
    if len(golds) == 1:
        return _best(prediction, golds)
    return fmean(_best(prediction, golds[:i] + golds[i + 1 :]) for i in range(len(golds)))


def _best(prediction: str, golds: list[str]) -> float:
    if golds == [CANNOT_ANSWER]:
        return float(normalize_answer(prediction) == CANNOT_ANSWER.lower())
    return best_of(lambda gold: word_f1(prediction, gold), golds)


__all__ = [
    "CANNOT_ANSWER", "choose_references", "score_heq", "score_human_f1", "score_quac_f1",
]  # fmt: skip
