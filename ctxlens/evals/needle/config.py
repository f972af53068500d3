"""What a needle grid is made of: lengths, depths, needles, conditions, wording, scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ctxlens.errors import InputError
from ctxlens.evals.needle.needles import DRAWN_NEEDLES, NEEDLES, Needle

CONDITIONS = ("plain+prefix", "template+prefix", "template", "assistant+prefix")
"""No template, with the needle's first words as the answer's beginning; template with them; template
without them; template, with them and with the context in the assistant's turn."""

WORDINGS: Mapping[str, str] = {
    "bare": "{context}\n{question}",
    "document": "Answer the question from the document that follows.\n{context}\n\nQuestion: {question}",
    "passage": "{context}\n\nAnswer this question from the passage above: {question}",
    "only": "Here is a text:\n{context}\n\nUse nothing but this text to answer. {question}",
}
"""How a question is put (after the idea of the paper's Table 8; the words are ours)."""

SCORES = ("recall", "contains", "logprob")
"""Share of the keywords in the response; whether the response holds the answer word for word; how likely the
model finds the needle, in nats per token. The last needs no response, so it also works for models that are
too weak to answer."""


@dataclass(frozen=True)
class NeedleConfig:
    """What a needle grid is made of.

    Attributes:
        lengths: context lengths in the model's tokens, needle included; or how many, spread evenly from
            200 (less in a small window) to the longest that the window holds.
        depths: where the needle stands, in percent of the haystack; or how many, from 0 to 100.
        needles: needles, or names of built-in ones (`sf`, `pizza`; `known` and `unknown` draw a fact of
            the organism's world for every cell).
        conditions: of `CONDITIONS`.
        cases_per_cell: how many contexts of each needle, length and depth, each with other haystack text.
        wording: how the question is put: a name of `WORDINGS`, or a text with {context} and {question}.
        max_new_tokens: the longest response, in tokens.
        seed: seed of drawn needles.
        score: of `SCORES`; where only `logprob` is asked for, nothing is generated.

    Raises:
        InputError: a value that cannot be used, by name.
    """

    lengths: tuple[int, ...] | int = 20
    depths: tuple[float | int, ...] | int = 20
    needles: tuple[str | Needle, ...] = ("sf",)
    conditions: tuple[str, ...] = ("plain+prefix", "template+prefix")
    cases_per_cell: int = 1
    wording: str = "bare"
    max_new_tokens: int = 100
    seed: int = 0
    score: tuple[str, ...] = ("recall", "contains")

    def __post_init__(self) -> None:
        for key in ("lengths", "depths", "needles", "conditions", "score"):
            value = getattr(self, key)
            if not isinstance(value, int):
                object.__setattr__(self, key, (value,) if isinstance(value, str | Needle) else tuple(value))
        counts = ("cases_per_cell", "max_new_tokens", *(k for k in ("lengths", "depths") if _is_int(self, k)))
        for key in counts:
            if not _is_int(self, key) or getattr(self, key) < 1:
                raise InputError(f"{key} must be a whole number of at least 1, got {getattr(self, key)!r}.")
        if not isinstance(self.lengths, int) and not (
            self.lengths and all(isinstance(n, int | np.integer) and n >= 1 for n in self.lengths)
        ):
            raise InputError(f"lengths must be whole numbers of tokens of at least 1, got {self.lengths!r}.")
        if not isinstance(self.depths, int) and not (
            self.depths and all(isinstance(d, int | float) and 0 <= d <= 100 for d in self.depths)
        ):
            raise InputError(f"depths must be percentages from 0 to 100, got {self.depths!r}.")
        for key in ("lengths", "depths"):
            values = getattr(self, key)
            if not isinstance(values, int) and (twice := _first_twice(values)) is not None:
                raise InputError(f"{key} hold {twice:g} twice; give each value once.")
        for key, known in (("conditions", CONDITIONS), ("score", SCORES)):
            values = getattr(self, key)
            unknown = [value for value in values if value not in known]
            if unknown or not values:
                raise InputError(
                    f"unknown {key.removesuffix('s')} {', '.join(unknown) or '(none)'}; choose of "
                    f"{', '.join(known)}."
                )
            if (twice := _first_twice(values)) is not None:
                raise InputError(f"{key} holds {twice} twice; give each once.")
        names = [needle if isinstance(needle, str) else needle.name for needle in self.needles]
        known = (*NEEDLES, *DRAWN_NEEDLES)
        if wrong := [n for n in self.needles if isinstance(n, str) and n not in known]:
            raise InputError(
                f"unknown needle {', '.join(wrong)}; choose of {', '.join(known)}, or give your own."
            )
        if not names or len(set(names)) < len(names):
            raise InputError(f"needles must have names of their own, got {', '.join(names) or 'none'}.")
        if any(f"{{{part}}}" not in self.template for part in ("context", "question")):
            raise InputError(
                f"unknown wording {self.wording!r}; choose of {', '.join(WORDINGS)}, or give a text "
                "that holds {context} and {question}."
            )

    @property
    def generates(self) -> bool:
        """Whether a response is needed for what is scored."""
        return any(score != "logprob" for score in self.score)

    @property
    def template(self) -> str:
        """The wording's text, with {context} and {question}."""
        return WORDINGS.get(self.wording, self.wording)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, for manifests."""
        return json.loads(json.dumps(asdict(self)))


def _first_twice(values: Sequence[Any]) -> Any:
    return next((value for i, value in enumerate(values) if value in values[:i]), None)


def _is_int(config: NeedleConfig, key: str) -> bool:
    value = getattr(config, key)
    return isinstance(value, int) and not isinstance(value, bool)


__all__ = ["CONDITIONS", "SCORES", "WORDINGS", "NeedleConfig"]
