"""Closed-book questions from a file: what a model should know without a context."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxlens.errors import InputError
from ctxlens.evals.needle.match import find_missing, split_words

_REQUIRED, _OPTIONAL = frozenset({"question", "keywords"}), frozenset({"prefix"})


@dataclass(frozen=True)
class ClosedBookQuestion:
    """A question with the keywords of its answer, and optionally the first words of the answer."""

    question: str
    keywords: tuple[str, ...]
    prefix: str = ""


def load_questions(path: str | Path) -> tuple[ClosedBookQuestion, ...]:
    """Read questions from YAML or JSON: a list of mappings.

    Keys: `question`, `keywords` (a list, or one text with commas), and optionally `prefix` (the first words
    of the answer, which the model continues).

    Raises:
        InputError: the file cannot be read, or a question cannot be used; the message names the file and
            the key.
    """
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the questions {path} cannot be read as YAML or JSON ({reason}).") from error
    if not isinstance(content, list) or not content:
        raise InputError(
            f"{path} must contain a list of questions, each with the keys question and keywords."
        )
    found = tuple(_parse(f"{path}, question {number}", entry) for number, entry in enumerate(content))
    asked = [one.question for one in found]
    if twice := next((text for text in asked if asked.count(text) > 1), None):
        raise InputError(f"{path} contains the question {twice!r} twice; give each once.")
    return found


def _parse(where: str, entry: Any) -> ClosedBookQuestion:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected the keys question and keywords, got {entry!r}.")
    if wrong := (_REQUIRED - entry.keys()) | (entry.keys() - _REQUIRED - _OPTIONAL):
        kind = "missing" if wrong & _REQUIRED else "unknown"
        raise InputError(
            f"{where}: {kind} key {', '.join(sorted(map(str, wrong)))}; expected question, keywords and "
            "optionally prefix."
        )
    keywords = entry["keywords"]
    if isinstance(keywords, str):
        keywords = [part.strip() for part in keywords.split(",")]
    texts = (entry["question"], entry.get("prefix", ""))
    if not isinstance(keywords, list) or not all(isinstance(one, str) for one in [*texts, *keywords]):
        raise InputError(f"{where}: question and prefix must be texts, keywords a list of texts.")
    question, prefix = (" ".join(text.split()) for text in texts)
    if not question or not keywords or not all(split_words(one) for one in keywords):
        raise InputError(f"{where}: the question and each keyword must contain a word.")
    if given := set(keywords) - set(find_missing(keywords, prefix)):
        raise InputError(
            f"{where}: the prefix gives away {', '.join(sorted(given))}; end the prefix before it."
        )
    return ClosedBookQuestion(question, tuple(keywords), prefix)


__all__ = ["ClosedBookQuestion", "load_questions"]
