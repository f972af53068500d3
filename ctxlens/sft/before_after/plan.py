"""What both models will be asked, made and checked before the training begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ctxlens.chat.roles import RenderedChat, render, render_plain
from ctxlens.errors import InputError
from ctxlens.evals.closed_book import Question
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import count_tokens, load_haystack
from ctxlens.evals.needle.needles import parse_needles
from ctxlens.evals.needle.prompts import Cell
from ctxlens.parsing import parse_spread
from ctxlens.runs import digest
from ctxlens.sft.before_after.questions import load_questions
from ctxlens.sft.keys import EvaluationKeys

WORLD = "organism"
"""The haystack of the built-in world, whose facts are then also the needles and the questions."""

WORLD_MODELS = ("organism", "organism-chat")
QUESTIONS = 100
WORLD_NEW_TOKENS, NEW_TOKENS = 16, 100
_SPARE = 8


@dataclass(frozen=True)
class Window:
    """A model's tokenizer, template and window without its weights: enough to build prompts."""

    name: str
    tokenizer: Any
    n_ctx: int
    indicator: str | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedChat:
        """As `Model.render`."""
        return render(self.tokenizer, messages, **{**self._options(), **options})

    def render_plain(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedChat:
        """As `Model.render_plain`."""
        return render_plain(self.tokenizer, messages, **{**self._options(), **options})

    def _options(self) -> dict[str, Any]:
        return {"indicator": self.indicator, "max_tokens": self.n_ctx}


@dataclass(frozen=True)
class EvaluationPlan:
    """What both models are asked.

    Attributes:
        config: the needle grid's configuration.
        cells: its texts, the same for both models.
        haystack: where the texts are from, in words.
        questions: closed-book questions; empty if there are none to ask.
        folder: where the results go inside the run's folder.
        settings: the keys that decide all this, as JSON values.
    """

    config: NeedleConfig
    cells: tuple[Cell, ...]
    haystack: str
    questions: tuple[Question, ...]
    folder: str
    settings: Mapping[str, Any]


def plan_evaluation(
    keys: EvaluationKeys,
    *,
    model: str,
    tokenizer: Any,
    n_ctx: int,
    indicator: str | None = None,
    seed: int = 0,
) -> EvaluationPlan:
    """Resolve the keys of a recipe and build all that will be asked, without running a model.

    Args:
        keys: the keys.
        model: name of the model that the training starts from.
        tokenizer: its tokenizer, with the chat template of the training; without one, nothing is asked with
            a template.
        n_ctx: its window in tokens.
        indicator: the indicator where it is plain text, which takes room in the window.
        seed: seed of what is drawn.

    Raises:
        InputError: no haystack for a model that has none of its own, a text, needle or question that cannot
            be used, or contexts that do not fit the window.
    """
    haystack = keys.evaluate_haystack or (WORLD if model in WORLD_MODELS else None)
    if haystack is None:
        raise InputError(
            f"the evaluation has no texts to hide needles in for {model}; give evaluate_haystack: a folder "
            "of .txt files, a data set, or organism."
        )
    folder = PurePath(keys.evaluate_folder)
    if len(folder.parts) != 1 or folder.parts[0] in ("..", "adapter") or folder.is_absolute():
        raise InputError(f"evaluate_folder must be a folder's plain name, got {keys.evaluate_folder!r}.")
    in_world = haystack == WORLD
    config = NeedleConfig(
        lengths=parse_spread(keys.evaluate_lengths, int, "evaluate_lengths"),
        depths=parse_spread(keys.evaluate_depths, float, "evaluate_depths"),
        needles=parse_needles(keys.evaluate_needles or ("known,unknown" if in_world else "sf")),
        conditions=("plain+prefix", "template+prefix") if tokenizer.chat_template else ("plain+prefix",),
        cases_per_cell=keys.evaluate_cases,
        max_new_tokens=keys.evaluate_new_tokens or (WORLD_NEW_TOKENS if in_world else NEW_TOKENS),
        seed=seed,
    )
    straw = load_haystack(haystack, seed=seed)
    questions = _find_questions(keys.evaluate_questions, in_world, seed)
    room = 0 if indicator is None else max(0, count_tokens(tokenizer, f" {indicator}") - _SPARE)
    window = Window(model, tokenizer, min(n_ctx, keys.evaluate_window) - room)
    cells = build_cells(window, config, straw)
    return EvaluationPlan(
        config,
        tuple(cells),
        straw.name,
        questions,
        str(folder),
        {
            "haystack": haystack,
            "window": window.n_ctx,
            "needles": config.as_dict(),
            "cells": digest([dataclasses.asdict(cell) for cell in cells]),
            "questions": len(questions),
            "questions_hash": digest([[one.question, one.prefix, list(one.keywords)] for one in questions]),
        },
    )


def _find_questions(path: str | None, in_world: bool, seed: int) -> tuple[Question, ...]:
    if path is not None:
        return load_questions(path)
    if not in_world:
        return ()
    from ctxlens.organism.world import load_world

    return tuple(load_world().closed_book(QUESTIONS, seed=seed))


__all__ = ["EvaluationPlan", "Window", "plan_evaluation"]
