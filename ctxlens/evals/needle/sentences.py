"""Where a text may be divided: at the ends of sentences, of lines, of words and of characters.

Sentences end at the characters of Unicode's property Sentence_Terminal, in every script that has any. A
character is what Unicode calls an extended grapheme cluster: a letter with its marks, or a whole emoji.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import regex
from jaxtyping import Int

LONG_SENTENCE = 2000
"""Characters from which a sentence is rather a text without sentence ends."""

_PARAGRAPH = regex.compile(r"\n\s*\n")
_SENTENCE_END = regex.compile(
    r"""(?V1x)
    [.!?…]["'”’“»«›‹)\]]?+\s+  # before a blank
    | [\p{Sentence_Terminal}--[.!?․﹒．]][\p{Pe}\p{Pf}]*+(?![\p{Sentence_Terminal}\p{Pe}\p{Pf}\p{M}])\s*
    | [․﹒．][\p{Pe}\p{Pf}]*+(?![\p{Sentence_Terminal}\p{Pe}\p{Pf}\p{M}\p{Nd}])\s*  # not in 1．5
    """
)
_WORD_END = regex.compile(r"[^\s\p{Grapheme_Cluster_Break=Prepend}](?=\s|$)")
_CHARACTER = regex.compile(r"\X")


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences without surrounding blanks; line breaks inside become single spaces.

    A sentence ends at `.`, `!`, `?` or `…` (together with a closing quote or bracket) before a blank, at the
    sentence ends of other scripts (`。`, `।`, `؟`, …) with or without a blank, and at an empty line.
    """
    return [sentence.replace("\n", " ") for sentence in split_keeping_lines(text)]


def split_keeping_lines(text: str) -> list[str]:
    """As `split_sentences`, but a line break inside a sentence stays a single `\\n`."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return tidy_sentences(piece for part in _PARAGRAPH.split(text) for piece in _split_paragraph(part))


def _split_paragraph(text: str) -> list[str]:
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def tidy_sentences(sentences: Iterable[str]) -> list[str]:
    """Remove empty sentences and lines and surrounding blanks; other white space becomes single spaces."""
    return [tidy for sentence in sentences if (tidy := "\n".join(_tidy_lines(sentence)))]


def _tidy_lines(text: str) -> list[str]:
    return [tidy for line in text.splitlines() if (tidy := " ".join(line.split()))]


def find_word_ends(text: str) -> Int[np.ndarray, " word"]:
    """The ends of all words that blanks separate, in characters of the text."""
    return np.fromiter((match.end() for match in _WORD_END.finditer(text)), dtype=np.int64)


def find_character_ends(text: str) -> Int[np.ndarray, " character"]:
    """The ends of all grapheme clusters that do not end with a blank, in characters of the text."""
    ends = (match.end() for match in _CHARACTER.finditer(text))
    return np.fromiter((end for end in ends if not text[end - 1].isspace()), dtype=np.int64)


def find_start(text: str, near: int) -> int:
    """A place in a long sentence where a text may start: where a line starts, or a word, or a character.

    Args:
        text: the sentence.
        near: the start is the first line within `LONG_SENTENCE` characters from here on, or else the first
            word, or else the first character.

    Returns:
        The place in characters; 0 if there is no start between `near` and the end.
    """
    following = text[near : near + LONG_SENTENCE]
    for blank in ("\n", " "):
        if blank in following:
            return near + following.index(blank) + 1
    origin = max(text.rfind(blank, 0, near) for blank in ("\n", " ")) + 1
    ends = (match.end() for match in _CHARACTER.finditer(text, origin))
    return next((end for end in ends if near <= end < len(text)), 0)


__all__ = [
    "LONG_SENTENCE", "find_character_ends", "find_start", "find_word_ends", "split_keeping_lines",
    "split_sentences", "tidy_sentences",
]  # fmt: skip
