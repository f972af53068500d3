"""Scores of answers to questions about a text: exact match, word F1, containment.

Exact match and F1 are those of SQuAD v1.1 (Rajpurkar et al., 2016). Containment is the paper's: the first
sentence of the response contains the gold answer. None of these scores sees meaning: `1,000` and `a thousand`
differ.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ctxlens.errors import InputError
from ctxlens.evals.needle.match import words_occur
from ctxlens.evals.needle.sentences import split_sentences

_PUNCTUATION = str.maketrans("", "", string.punctuation)

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """SQuAD's normal form: lower case, without ASCII punctuation and articles, white space as single spaces.

    Accents stay, and so do dashes and quotes that are not ASCII; a non-breaking space counts as a space.
    Punctuation is removed, not replaced: `well-known` becomes `wellknown`.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def first_sentence(response: str) -> str:
    """The response up to the end of its first sentence, where the paper truncates it.

    A sentence ends as in `split_sentences`, which knows no abbreviations: `Dr. Smith` ends after `Dr.`
    """
    return next(iter(split_sentences(response)), "")


def score_exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the gold answers in SQuAD's normal form, else 0.

    Raises:
        InputError: there is no gold answer.
    """
    return best_of(lambda answer: float(normalize_answer(prediction) == normalize_answer(answer)), answers)


def score_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the words that prediction and gold answer share, 0 to 1; the best over the gold answers.

    A word counts as often as it occurs in both. As in SQuAD v1.1, a prediction without words scores 0, even
    against a gold answer without words.

    Raises:
        InputError: there is no gold answer.
    """
    return best_of(lambda answer: word_f1(prediction, answer), answers)


def word_f1(prediction: str, answer: str) -> float:
    """SQuAD's F1 against one gold answer."""
    predicted, gold = (normalize_answer(text).split() for text in (prediction, answer))
    shared = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * shared / (len(predicted) + len(gold)) if shared else 0.0


def score_contains(
    response: str,
    references: Sequence[str | Sequence[str]],
    *,
    normalize: Callable[[str], str] = normalize_answer,
) -> float:
    """1 if the response's first sentence contains a gold answer word for word, else 0.

    Both are compared in their normal form. A gold answer without words in that form (`The`) is searched for
    unchanged, as in `score_contains_released`. `2012` does not contain the gold answer `2`.

    Args:
        response: the model's response.
        references: the gold answers; if one consists of several spans, all of them must occur.
        normalize: the normal form.

    Raises:
        InputError: there is no gold answer.
    """
    sentence = first_sentence(response)
    words = normalize(sentence).split()

    def holds(span: str) -> bool:
        wanted = normalize(span).split()
        return words_occur(wanted, words) if wanted else _stands_in(span, sentence)

    return best_of(lambda reference: float(all(map(holds, as_spans(reference)))), references)


def score_contains_released(response: str, references: Sequence[str | Sequence[str]]) -> float:
    """Containment as the paper's released code counts it: 1 or 0.

    The response ends at the first period that a space follows, and only the case is normalised: `2012`
    contains the gold answer `2`. If a gold answer consists of several spans, one of them is enough.

    Args:
        response: the model's response.
        references: the gold answers.

    Raises:
        InputError: there is no gold answer.
    """
    said = response.split(". ", 1)[0]
    return best_of(
        lambda reference: float(any(_stands_in(span, said) for span in as_spans(reference))), references
    )


def as_spans(reference: str | Sequence[str]) -> Sequence[str]:
    """The spans of a gold answer; a text is a single span."""
    return (reference,) if isinstance(reference, str) else reference


def best_of(score: Callable[[Any], float], answers: Sequence[Any]) -> float:
    """The largest score over the gold answers.

    Raises:
        InputError: there is no gold answer.
    """
    check_answers(answers)
    return max(score(answer) for answer in answers)


def check_answers(answers: Sequence[Any]) -> None:
    """Raise `InputError` if there is no gold answer, or only a text where a list of them is expected."""
    if isinstance(answers, str) or not answers:
        raise InputError(f"gold answers must be a list of at least one, got {answers!r}.")


def _stands_in(span: str, text: str) -> bool:
    return span.lower() in text.lower()


__all__ = [
    "as_spans",
    "best_of",
    "check_answers",
    "first_sentence",
    "normalize_answer",
    "score_contains",
    "score_contains_released",
    "score_exact_match",
    "score_f1",
    "word_f1",
]
