"""The configuration of a needle grid: lengths, depths, needles, conditions, wording and scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial, wraps
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import ConfigDict, PlainValidator, ValidationError
from pydantic.dataclasses import dataclass

from ctxlens.chat.condition import Condition, parse_conditions
from ctxlens.errors import InputError
from ctxlens.evals.needle.needles import DRAWN_NEEDLES, NEEDLES, Needle, neutral_needles
from ctxlens.parsing import explain_refusal

WORDINGS: Mapping[str, str] = {
    "bare": "{context}\n{question}",
    "document": "Answer the question from the document that follows.\n{context}\n\nQuestion: {question}",
    "passage": "{context}\n\nAnswer this question from the passage above: {question}",
    "only": "Here is a text:\n{context}\n\nUse nothing but this text to answer. {question}",
}
"""Ways to ask a question about a context (after the idea of the paper's Table 8, in our own words)."""

SCORES = ("recall", "contains", "logprob")
"""`recall`: the share of the keywords that the response contains. `contains`: whether the response contains
the answer word for word. `logprob`: the mean log-probability of the answer, in nats per token; it needs no
response, so it also works for models that are too weak to answer."""

_Class = TypeVar("_Class", bound=type)


def _refuse_in_one_sentence(cls: _Class) -> _Class:
    """Make a pydantic dataclass raise `InputError` in place of pydantic's `ValidationError`."""
    build = cls.__init__

    @wraps(build)
    def init(self: Any, *args: Any, **values: Any) -> None:
        try:
            build(self, *args, **values)
        except ValidationError as error:
            raise InputError(f"{explain_refusal(error, known=cls.__dataclass_fields__)}.") from None

    cls.__init__ = init
    return cls


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_count(key: str, value: Any) -> int:
    """A whole number of at least 1."""
    if not _is_whole(value) or value < 1:
        raise InputError(f"{key} must be a whole number of at least 1, got {value!r}.")
    return int(value)


def _check_lengths(value: Any) -> tuple[int, ...] | int:
    """A count, or distinct lengths of at least one token."""
    if _is_single(value):
        return _check_count("lengths", value)
    lengths = tuple(value)
    if not lengths or not all(_is_whole(length) and length >= 1 for length in lengths):
        raise InputError(f"lengths must be whole numbers of tokens of at least 1, got {value!r}.")
    _check_distinct("lengths", lengths)
    return tuple(int(length) for length in lengths)


def _check_depths(value: Any) -> tuple[float | int, ...] | int:
    """A count, or distinct percentages."""
    if _is_single(value):
        return _check_count("depths", value)
    depths = tuple(value)
    if not depths or not all(isinstance(depth, int | float) and 0 <= depth <= 100 for depth in depths):
        raise InputError(f"depths must be percentages from 0 to 100, got {value!r}.")
    _check_distinct("depths", depths)
    return depths


def _check_needles(value: Any) -> tuple[str | Needle, ...]:
    """Needles with distinct names; a bare name must be a built-in one."""
    needles = _as_tuple("needles", value, str | Needle)
    known = (*NEEDLES, *DRAWN_NEEDLES)
    named = [one for one in needles if not isinstance(one, Needle) and one not in known]
    if wrong := [str(one) for one in named if one not in neutral_needles()]:
        raise InputError(
            f"unknown needle {', '.join(wrong)}; choose from {', '.join(known)}, or give your own."
        )
    names = [one if isinstance(one, str) else one.name for one in needles]
    if not names or len(set(names)) < len(names):
        raise InputError(f"needles must have distinct names, got {', '.join(names) or 'no needle'}.")
    return needles


def _check_conditions(value: Any) -> tuple[Condition, ...]:
    """Distinct conditions, without indicator and steering."""
    conditions = parse_conditions(
        value if isinstance(value, str) else _as_tuple("conditions", value, Condition)
    )
    for condition in conditions:
        if condition != condition.asking:
            raise InputError(
                f"condition {condition} of a needle grid must be without indicator and steering, which apply "
                "to all its conditions; give them as indicator and steering (--indicator, --alpha)."
            )
    return conditions


def _check_score(value: Any) -> tuple[str, ...]:
    """Distinct names of scores."""
    scores = _as_tuple("score", value, str)
    unknown = [str(score) for score in scores if score not in SCORES]
    if unknown or not scores:
        raise InputError(f"unknown score {', '.join(unknown) or '(none)'}; choose from {', '.join(SCORES)}.")
    _check_distinct("score", scores)
    return scores


def _check_wording(value: Any) -> str:
    """The name of a wording, or a text with the places of context and question."""
    text = WORDINGS.get(value, value) if isinstance(value, str) else ""
    if any(f"{{{part}}}" not in text for part in ("context", "question")):
        raise InputError(
            f"unknown wording {value!r}; choose from {', '.join(WORDINGS)}, or give a text that contains "
            "{context} and {question}."
        )
    return value


def _is_single(value: Any) -> bool:
    return not isinstance(value, Iterable) or isinstance(value, str)


def _as_tuple(key: str, value: Any, single: Any) -> tuple[Any, ...]:
    """Several values, or a single one of the given type, as a tuple."""
    if isinstance(value, single):
        return (value,)
    if not isinstance(value, Iterable):
        raise InputError(f"{key} must be a list, got {value!r}.")
    return tuple(value)


def _check_distinct(key: str, values: Sequence[Any]) -> None:
    for number, value in enumerate(values):
        if value in values[:number]:
            shown = f"{value:g}" if isinstance(value, int | float) else value
            raise InputError(f"{key} contains {shown} twice; give each value once.")


@_refuse_in_one_sentence
@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class NeedleConfig:
    """The configuration of a needle grid.

    ```python
    >>> config = NeedleConfig(lengths=(200, 1000), depths=3, conditions="template+prefix,plain+prefix")
    >>> [condition.name for condition in config.conditions]
    ['template+prefix', 'plain+prefix']

    ```

    Attributes:
        lengths: context lengths in the model's tokens, needle included; or how many of them to spread evenly
            from 200 (fewer in a small window) to the longest that fits the window.
        depths: positions of the needle in percent of the haystack; or how many to spread from 0 to 100.
        needles: needles, or names of built-in ones (`sf`, `pizza`, `pizza-short`; `known` and `unknown` draw
            a fact of the organism's world for every cell, `neutral` an invented fact; `neutral-ferry` and
            the other names of `neutral_needles` are single facts).
        conditions: conditions or their spellings, without indicator and steering.
        cases_per_cell: contexts for each needle, length and depth, each with different haystack text.
        wording: how the question is asked: a name from `WORDINGS`, or a text with {context} and {question}.
        max_new_tokens: upper bound on the response, in tokens.
        seed: seed of drawn needles.
        score: names from `SCORES`; with `logprob` alone no response is generated.

    Raises:
        InputError: a value cannot be used, or a key is unknown; the message names the key.
    """

    lengths: Annotated[tuple[int, ...] | int, PlainValidator(_check_lengths)] = 20
    depths: Annotated[tuple[float | int, ...] | int, PlainValidator(_check_depths)] = 20
    needles: Annotated[tuple[str | Needle, ...], PlainValidator(_check_needles)] = ("sf",)
    conditions: Annotated[tuple[Condition, ...], PlainValidator(_check_conditions)] = parse_conditions(
        "plain+prefix,template+prefix"
    )
    cases_per_cell: Annotated[int, PlainValidator(partial(_check_count, "cases_per_cell"))] = 1
    wording: Annotated[str, PlainValidator(_check_wording)] = "bare"
    max_new_tokens: Annotated[int, PlainValidator(partial(_check_count, "max_new_tokens"))] = 100
    seed: int = 0
    score: Annotated[tuple[str, ...], PlainValidator(_check_score)] = ("recall", "contains")

    @property
    def generates(self) -> bool:
        """Whether scoring needs a response."""
        return any(score != "logprob" for score in self.score)

    @property
    def template(self) -> str:
        """The text of the wording, with {context} and {question}."""
        return WORDINGS.get(self.wording, self.wording)

    def as_dict(self) -> dict[str, Any]:
        """The configuration as JSON values, for manifests; conditions are given by their names."""
        values = {**asdict(self), "conditions": [condition.name for condition in self.conditions]}
        return json.loads(json.dumps(values))


__all__ = ["SCORES", "WORDINGS", "NeedleConfig"]
