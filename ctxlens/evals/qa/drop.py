"""DROP's exact match and F1 (Dua et al., 2019): numbers by value, several spans matched one to one."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ctxlens.evals.qa.metrics import as_spans, best_of

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class DropScore(NamedTuple):
    """Scores of one prediction, 0 to 1."""

    exact_match: float
    f1: float


def normalize_drop(text: str) -> str:
    """DROP's normal form: split at spaces and hyphens, numbers by value, no punctuation, no articles.

    `1,000` and `1000.0` both become `1000.0`; `two` stays a word. A number keeps its sign and decimal point
    only if nothing is attached to it: `$1.5` becomes `15.0`, as in the official script.
    """
    return " ".join(part for word in re.split(" |-", text) if (part := _normalize_word(word)))


def _normalize_word(word: str) -> str:
    word = word.lower()
    if not _is_number(word):
        word = word.translate(_PUNCTUATION)
    if _is_number(word):
        word = str(float(word))
    return " ".join(_ARTICLES.sub(" ", word).split())


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def score_drop(prediction: str | Sequence[str], references: Sequence[str | Sequence[str]]) -> DropScore:
    """DROP's exact match and F1 of a prediction, the best of each over the gold answers.

    The spans of prediction and gold answer are matched one to one so that the sum of their F1 is largest; a
    span without partner counts 0. F1 compares sets of words. It is 0 if the gold span holds numbers and the
    predicted span holds none of them, and is rounded to two places. Gold answers whose first span is empty
    are left out.

    Args:
        prediction: one span or several. A response of a model is one span, so figures for answers of several
            spans are not comparable with official figures of systems that predict lists.
        references: the gold answers, each of one span or several. Dates are one span: `8 May 1945`.

    Raises:
        InputError: there is no gold answer.
    """
    predicted = [normalize_drop(span) for span in as_spans(prediction) or ("",)]
    golds = [as_spans(reference) for reference in references]
    pairs = [
        (predicted, [normalize_drop(span) for span in gold]) for gold in golds if gold and gold[0].strip()
    ]
    if not pairs and golds:
        return DropScore(0.0, 0.0)
    return DropScore(best_of(_exact, pairs), best_of(_f1, pairs))


def _exact(pair: tuple[list[str], list[str]]) -> float:
    predicted, gold = pair
    return float(set(predicted) == set(gold) and len(predicted) == len(gold))


def _f1(pair: tuple[list[str], list[str]]) -> float:
    from scipy.optimize import linear_sum_assignment

    predicted, gold = ([set(span.split()) for span in spans] for spans in pair)
    scores = np.array([[_bag_f1(p, g) for p in predicted] for g in gold])
    matched = linear_sum_assignment(scores, maximize=True)
    return float(np.round(scores[matched].sum() / max(scores.shape), 2))


def _bag_f1(predicted: set[str], gold: set[str]) -> float:
    numbers = {word for word in gold if _is_number(word)}
    if numbers and not numbers & predicted:
        return 0.0
    shared = len(predicted & gold)
    precision = shared / len(predicted) if predicted else 1.0
    recall = shared / len(gold) if gold else 1.0
    return 2 * precision * recall / (precision + recall) if shared or not (predicted or gold) else 0.0


__all__ = ["DropScore", "normalize_drop", "score_drop"]
