"""Needle answers for head experiments: their tokens, their log-probability, the needle in the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ctxlens.chat.condition import Condition
from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.errors import InputError
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.match import score_recall
from ctxlens.evals.needle.prompts import Cell, render_cell
from ctxlens.evals.needle.run import cell_record
from ctxlens.models import Model
from ctxlens.models.indicator_token import require_indicator

MEASURES = ("logprob", "recall")
"""Log-probability of the needle's words after its prefix (nats per token), or recall of its keywords in
the model's own answer (0 to 1)."""


@dataclass(frozen=True)
class Answers:
    """Needle cells under one condition, and the measure that is applied to them.

    Attributes:
        cells: the cells.
        config: their configuration.
        condition: the spelling of a `ctxlens.chat.condition.Condition` without the indicator and without
            steering.
        indicator: whether the question carries the model's indicator.
        measure: one of `MEASURES`.
        batch_tokens: padded tokens per batch.

    Raises:
        InputError: there are no cells, or the measure is unknown.
    """

    cells: Sequence[Cell]
    config: NeedleConfig
    condition: str = "template+prefix"
    indicator: bool = False
    measure: str = "logprob"
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        if not self.cells:
            raise InputError("no needle cells were given; head experiments need at least one.")
        if self.measure not in MEASURES:
            raise InputError(f"unknown measure {self.measure!r}; choose from {', '.join(MEASURES)}.")

    @property
    def quantity(self) -> str:
        """The measured quantity, with its unit."""
        if self.measure == "recall":
            return "needle recall"
        return "log-probability of the needle, nats per token"

    def split(self) -> tuple[Answers, Answers]:
        """Split the cells into two halves with disjoint contexts, one for ranking and one for evaluation.

        Raises:
            InputError: all cells have the same context.
        """
        contexts = self.contexts
        if contexts.max() < 1:
            raise InputError(
                "all cells share one text, so heads cannot be ranked on one text and evaluated on another; "
                "give several lengths or cases."
            )
        halves = ([c for c, at in zip(self.cells, contexts % 2, strict=True) if at == odd] for odd in (0, 1))
        first, second = (replace(self, cells=half) for half in halves)
        return first, second

    def as_dict(self) -> dict[str, Any]:
        """Everything that the numbers depend on besides the model, as JSON values."""
        return {
            "cells": [cell_record(cell) for cell in self.cells],
            "config": self.config.as_dict(),
            "condition": self.condition,
            "indicator": self.indicator,
            "measure": self.measure,
        }

    def describe(self, model: Model) -> dict[str, Any]:
        """Describe model and cells for a result's `meta`."""
        return {
            "model": model.name,
            "identity": dict(model.identity),
            "condition": self.condition,
            "indicator": self.indicator,
            "measure": self.measure,
            "cells": len(self.cells),
            "config": self.config.as_dict(),
        }

    @property
    def contexts(self) -> Int[np.ndarray, " cell"]:
        """A number for the text around each cell's needle; cells of one length and case share it."""
        keys = [(cell.context_tokens, cell.case) for cell in self.cells]
        known = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return np.array([known[key] for key in keys], dtype=np.int64)

    def given(self, cell: Cell) -> str:
        """The first words of a cell's answer that the prompt already contains."""
        needle = cell.needle
        prefixed = self.condition.endswith("+prefix") and needle.sentence.startswith(needle.prefix)
        return needle.prefix if prefixed else ""

    def prompts(self, model: Model) -> list[RenderedChat]:
        """Render the cells as prompts that end where the model's own answer begins.

        Raises:
            InputError: the indicator is requested but the model has none.
        """
        return [self._render(model, cell, self.condition, None) for cell in self.cells]

    def said(self, model: Model, answers: Sequence[str] | None = None) -> list[RenderedChat]:
        """Render the cells with complete answers, by default the needles' own sentences."""
        texts = [cell.needle.sentence for cell in self.cells] if answers is None else answers
        # With a complete answer, `template` and `template+prefix` render the same text.
        condition = "template+prefix" if self.condition == "template" else self.condition
        return [
            self._render(model, cell, condition, text) for cell, text in zip(self.cells, texts, strict=True)
        ]

    def _render(self, model: Model, cell: Cell, condition: str, answer: str | None) -> RenderedChat:
        if self.indicator:
            require_indicator(model)
        asked = replace(Condition.parse(condition), indicator=self.indicator)
        return render_cell(model, cell, self.config, asked, answer=answer)

    def generate(self, model: Model) -> list[str]:
        """The model's own answers by cell, without the words that the prompt contains."""
        return self._continue(model, self.prompts(model))

    def _continue(self, model: Model, prompts: Sequence[RenderedChat]) -> list[str]:
        return model.generate(
            prompts, max_new_tokens=self.config.max_new_tokens, batch_tokens=self.batch_tokens
        )

    def scorer(self, model: Model) -> Callable[[], Float[np.ndarray, " cell"]]:
        """Return a function that measures every cell with the model's state at the time of the call.

        The cells are rendered only once."""
        if self.measure == "recall":
            prompts = self.prompts(model)

            def recall() -> np.ndarray:
                texts = self._continue(model, prompts)
                found = [score_recall(c.needle.keywords, t) for c, t in zip(self.cells, texts, strict=True)]
                return np.array(found, dtype=float)

            return recall
        chats = self.said(model)
        counted = [
            np.isin(chat.response_positions(), self.positions(chat, cell))
            for chat, cell in zip(chats, self.cells, strict=True)
        ]

        def logprob() -> np.ndarray:
            by_token = model.logprobs(chats, batch_tokens=self.batch_tokens)
            return np.array(
                [found[at].mean() for found, at in zip(by_token, counted, strict=True)], dtype=float
            )

        return logprob

    def positions(
        self, chat: RenderedChat, cell: Cell, answer: str | None = None
    ) -> Int[np.ndarray, " answer_pos"]:
        """The tokens of the answer that were not given.

        Args:
            chat: the cell with its answer, from `said`.
            cell: the cell.
            answer: the answer; the needle's own sentence by default.

        Raises:
            InputError: there are none.
        """
        words = cell.needle.sentence if answer is None else answer
        said = chat.response_positions()
        at = said[chat.spans[said, 1] > chat.text.rindex(words) + len(self.given(cell))]
        if not len(at):
            raise InputError(f"the answer of cell {cell.number} has no words after its prefix.")
        return at.astype(np.int64)


def needle_tokens(chat: RenderedChat, cell: Cell) -> Bool[np.ndarray, " pos"]:
    """The tokens of the needle in the context."""
    start, end = (chat.text.index(cell.context.text) + at for at in cell.context.needle_span)
    inside = (chat.spans[:, 0] < end) & (chat.spans[:, 1] > start)
    return inside & np.isin(chat.role, (Role.USER, Role.ASSISTANT))


__all__ = ["MEASURES", "Answers", "needle_tokens"]
