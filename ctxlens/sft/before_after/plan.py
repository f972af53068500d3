"""What both models will be asked: built and checked before the training starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ctxlens.chat.condition import parse_conditions
from ctxlens.errors import InputError
from ctxlens.evals.closed_book import Question
from ctxlens.evals.needle.cells import SPARE_TOKENS, build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.contexts import count_tokens
from ctxlens.evals.needle.defaults import choose_texts
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.needles import parse_needles
from ctxlens.evals.needle.prompts import Cell, Window
from ctxlens.parsing import parse_spread
from ctxlens.runs import digest
from ctxlens.sft.before_after.questions import load_questions
from ctxlens.sft.keys import EvaluationKeys

QUESTIONS = 100
WORLD_NEW_TOKENS, NEW_TOKENS = 16, 100


@dataclass(frozen=True)
class EvaluationPlan:
    """What both models are asked.

    Attributes:
        config: the needle grid's configuration.
        cells: its texts, which are the same for both models.
        haystack: source of the texts, in words.
        questions: closed-book questions; may be empty.
        folder: folder for the results, inside the run's folder.
        settings: everything that determines the questions, as JSON values.
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
    """Resolve the keys of a recipe and build everything that will be asked, without running a model.

    Args:
        keys: the keys.
        model: name of the model that the training starts from.
        tokenizer: its tokenizer, with the chat template of the training; if it has no template, nothing is
            asked with one.
        n_ctx: its window in tokens.
        indicator: the indicator if it is ordinary text, which occupies part of the window; otherwise None.
        seed: seed of all random draws.

    Raises:
        InputError: a text, needle or question cannot be used, or the contexts do not fit into the window.
    """
    texts = choose_texts(model, keys.evaluate_haystack, keys.evaluate_needles, world_needles="known,unknown")
    haystack, in_world = texts.haystack, texts.in_world
    folder = PurePath(keys.evaluate_folder)
    if len(folder.parts) != 1 or folder.parts[0] in ("..", "adapter") or folder.is_absolute():
        raise InputError(
            f"evaluate_folder must be the name of a folder, without a path, got {keys.evaluate_folder!r}."
        )
    config = NeedleConfig(
        lengths=parse_spread(keys.evaluate_lengths, int, "evaluate_lengths"),
        depths=parse_spread(keys.evaluate_depths, float, "evaluate_depths"),
        needles=parse_needles(texts.needles),
        conditions=parse_conditions(
            "plain+prefix,template+prefix" if tokenizer.chat_template else "plain+prefix"
        ),
        cases_per_cell=keys.evaluate_cases,
        max_new_tokens=keys.evaluate_new_tokens or (WORLD_NEW_TOKENS if in_world else NEW_TOKENS),
        seed=seed,
    )
    straw = load_haystack(haystack, seed=seed)
    questions = _find_questions(keys.evaluate_questions, in_world, seed)
    room = 0 if indicator is None else max(0, count_tokens(tokenizer, f" {indicator}") - SPARE_TOKENS)
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


__all__ = ["EvaluationPlan", "plan_evaluation"]
