"""The condition under which a model is asked: one value, with one spelling for every study.

A condition is written as words joined by `+`, in this order:

| word | meaning |
|---|---|
| `plain`, `template` or `assistant` | without the chat template; with it; with it, and the context in the assistant's turn |
| `matched`, `bos`, `nobos` or `nosystem` | a control, see `CONTROLS` |
| `prefix` | the answer starts with given words: the first ones of the expected answer (needles), or `Answer:` (tasks of lm-eval) |
| `indicator` | the question carries the model's indicator |
| `steered:DOSE` | attention is steered to the user's tokens: `steered:0.5` multiplies the attention to all other tokens by 0.5 and renormalises it, `steered:share=0.6` gives the user's tokens 0.6 of the attention, and `steered:0.5:1.2/3.0` steers only head 2 of layer 1 and head 0 of layer 3 |

```python
>>> Condition.parse("template+prefix").name
'template+prefix'
>>> Condition.parse("vanilla") == Condition()  # the spelling of earlier versions
True
>>> str(Condition(template=False, alpha=0.5))
'plain+steered:0.5'

```
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ctxlens.errors import InputError

SPELLING = (
    "plain (no chat template), template, or assistant (template, context in the assistant's turn), followed "
    "as needed by a control (+matched, +bos, +nobos, +nosystem), +prefix, +indicator and +steered:ALPHA, "
    "+steered:share=SHARE or +steered:ALPHA:LAYER.HEAD/LAYER.HEAD"
)
"""The grammar in one sentence, for help texts and error messages."""

CONTROLS: Mapping[str, str] = {
    "matched": "plain, after neutral text with as many tokens as the chat template would add",
    "bos": "plain, after the tokenizer's BOS token",
    "nobos": "plain, without a BOS token",
    "nosystem": "template, with an empty system message instead of the template's default one",
}
"""Variations of a prompt beside its content. `nosystem` needs the template, the others are for `plain`."""

_BASES = ("plain", "template", "assistant")
_EARLIER = {"vanilla": "template"}
"""Words of earlier versions. A condition without any of `_BASES` uses the template, as it did then."""


@dataclass(frozen=True)
class Condition:
    """How a model is asked.

    Attributes:
        template: whether the chat template is applied.
        prefix: whether the answer starts with given words: in needle studies the first words of the expected
            answer, in evaluations the same words for every question.
        context_in: whose turn holds the context. `assistant` requires the template.
        indicator: whether the last user message carries the model's indicator.
        alpha: factor on the attention to all tokens except the user's, in (0, 1]; None if not steered by a
            factor.
        target_share: the share of every query's attention that the user's tokens get, in (0, 1), instead
            of `alpha`.
        heads: the heads that are steered: `all`, `retrieval`, or `LAYER.HEAD` pairs separated by `/`.
        control: the name of one of `CONTROLS`, or empty.

    Raises:
        InputError: parts exclude each other, or a dose is out of range.
    """

    template: bool = True
    prefix: bool = False
    context_in: Literal["user", "assistant"] = "user"
    indicator: bool = False
    alpha: float | None = None
    target_share: float | None = None
    heads: str = "all"
    control: str = ""

    def __post_init__(self) -> None:
        if self.context_in == "assistant" and not self.template:
            raise InputError("the context cannot be in the assistant's turn without a chat template.")
        if self.control and (self.control == "nosystem") != self.template:
            raise InputError(f"the control {self.control} is {CONTROLS[self.control]}.")
        if self.steered:
            check_strength(self.alpha, self.target_share)

    @property
    def name(self) -> str:
        """The condition in its one spelling."""
        base = "assistant" if self.context_in == "assistant" else "template" if self.template else "plain"
        words = [base, *([self.control] if self.control else [])]
        words += [word for word in ("prefix", "indicator") if getattr(self, word)]
        if self.steered:
            dose = f"share={self.target_share:g}" if self.alpha is None else f"{self.alpha:g}"
            words.append(f"steered:{dose}" + ("" if self.heads == "all" else f":{self.heads}"))
        return "+".join(words)

    @property
    def steered(self) -> bool:
        """Whether attention is steered."""
        return self.alpha is not None or self.target_share is not None

    @property
    def asking(self) -> Condition:
        """The same condition without indicator and steering: the part that determines the prompt's words.

        Tables with separate columns for indicator, alpha and heads hold the name of this part.
        """
        return replace(self, indicator=False, alpha=None, target_share=None, heads="all")

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, words: str | Condition) -> Condition:
        """Read a condition from its spelling; spellings of earlier versions are accepted.

        Raises:
            InputError: a word is unknown, words exclude each other, or a word occurs twice.
        """
        if isinstance(words, Condition):
            return words
        parts = [part.strip() for part in words.strip().split("+")]
        parts = [_EARLIER.get(part, part) for part in parts]
        kinds = [part.partition(":")[0] for part in parts]
        _check_words(words, parts, kinds)
        steering = _parse_dose(parts[kinds.index("steered")]) if "steered" in kinds else cls()
        return replace(
            steering,
            template="plain" not in kinds,
            prefix="prefix" in kinds,
            context_in="assistant" if "assistant" in kinds else "user",
            indicator="indicator" in kinds,
            control=next((kind for kind in kinds if kind in CONTROLS), ""),
        )


def _check_words(words: str, parts: Sequence[str], kinds: Sequence[str]) -> None:
    """Raise `InputError` if a word is unknown, or words exclude each other or occur twice."""
    for kind, part in zip(kinds, parts, strict=True):
        known = kind in (*_BASES, *CONTROLS, "prefix", "indicator") and kind == part
        if not known and (kind != "steered" or part == "steered"):
            raise InputError(f"unknown word {part!r} in the condition {words!r}; conditions are {SPELLING}.")
    several = any(len(set(kinds).intersection(group)) > 1 for group in (_BASES, CONTROLS))
    if several or len(set(kinds)) < len(kinds):
        raise InputError(f"condition {words!r} contradicts itself or repeats a word.")


def check_strength(alpha: Any, target_share: Any) -> None:
    """Check that steering has one strength, within its range.

    Raises:
        InputError: there is not exactly one of `alpha` and `target_share`, or it is out of range.
    """
    if (alpha is None) == (target_share is None):
        given = "neither" if alpha is None else "both"
        raise InputError(f"give either alpha or a target share, not {given}.")
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if alpha is not None and not (is_number and 0 < alpha <= 1):
        raise InputError(f"alpha must be in (0, 1], got {alpha!r}; 1 changes nothing, smaller steers more.")
    if target_share is not None and not (isinstance(target_share, float) and 0 < target_share < 1):
        raise InputError(
            f"the target share must be in (0, 1), got {target_share!r}; 0.6 means 60 % of the attention."
        )


def parse_conditions(words: str | Sequence[str | Condition]) -> tuple[Condition, ...]:
    """Read conditions from their spellings, or from one comma-separated text.

    Raises:
        InputError: none is given, one cannot be read, or one occurs twice.
    """
    each = words.split(",") if isinstance(words, str) else words
    found = tuple(Condition.parse(one) for one in each if isinstance(one, Condition) or one.strip())
    if not found:
        raise InputError(f"no condition is given; conditions are {SPELLING}.")
    if len(set(found)) < len(found):
        raise InputError(f"a condition is given twice: {', '.join(map(str, found))}.")
    return found


def _parse_dose(part: str) -> Condition:
    """The condition that `steered:DOSE[:HEADS]` describes."""
    dose, _, heads = part.removeprefix("steered:").partition(":")
    kind, equals, number = dose.rpartition("=")
    try:
        strength = float(number)
    except ValueError:
        strength = float("nan")
    if strength != strength or kind not in ("", "share") or (equals and not kind):
        raise InputError(f"{part} needs a number after the colon, as in steered:0.95 or steered:share=0.6.")
    heads = heads.replace(",", "/") or "all"
    if kind == "share":
        return Condition(target_share=strength, heads=heads)
    return Condition(alpha=strength, heads=heads)


__all__ = ["CONTROLS", "SPELLING", "Condition", "check_strength", "parse_conditions"]
