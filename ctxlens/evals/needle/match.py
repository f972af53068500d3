"""How much of a needle a response contains: keyword recall (paper section 2.1) and containment."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

# Scripts written without spaces between words: every character counts as a word, so that a keyword is found
# inside a run of text.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
)


def split_words(text: str) -> list[str]:
    """Split a text into words: letters, digits and their combining marks, in one case.

    Compatibility forms are unified (NFKC) and punctuation separates words, so `Dolores-Park!` has the words
    `dolores` and `park`.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    spaced = "".join(
        f" {char} " if _UNSPACED.match(char) else char if unicodedata.category(char)[0] in "LMN" else " "
        for char in folded
    )
    return spaced.split()


def score_recall(keywords: Iterable[str], response: str) -> float:
    """Share of the keywords that occur in the response as words, from 0 to 1.

    A keyword of several words occurs where they follow one another. How often a keyword occurs does not
    matter, and a keyword that is given twice counts once. Without keywords the recall is NaN.

    ```python
    >>> score_recall(("goat cheese", "figs"), "Soft goat-cheese, please!")
    0.5

    ```

    Args:
        keywords: the words or phrases to find.
        response: the model's response.
    """
    wanted = {tuple(split_words(keyword)) for keyword in keywords} - {()}
    if not wanted:
        return float("nan")
    words = split_words(response)
    return sum(words_occur(phrase, words) for phrase in wanted) / len(wanted)


def score_containment(answer: str, response: str) -> float:
    """1 if the response contains the answer word for word, otherwise 0; NaN for an answer without words.

    Case, punctuation and spaces are ignored, see `split_words`.

    Args:
        answer: the expected answer, for instance `Needle.answer`.
        response: the model's response.
    """
    wanted = tuple(split_words(answer))
    return float(words_occur(wanted, split_words(response))) if wanted else float("nan")


def find_missing(keywords: Iterable[str], text: str) -> list[str]:
    """The keywords that do not occur in a text."""
    words = split_words(text)
    return [keyword for keyword in keywords if not words_occur(tuple(split_words(keyword)), words)]


def words_occur(phrase: Sequence[str], words: Sequence[str]) -> bool:
    """Whether the words of a phrase follow one another in a list of words; False for an empty phrase."""
    size, wanted = len(phrase), list(phrase)
    return bool(wanted) and any(
        words[at] == wanted[0] and list(words[at : at + size]) == wanted
        for at in range(len(words) - size + 1)
    )


__all__ = ["find_missing", "score_containment", "score_recall", "split_words", "words_occur"]
