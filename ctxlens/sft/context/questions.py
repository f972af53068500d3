"""What a model is asked while it is trained, and its answers: a few short texts and general knowledge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ctxlens.chat.condition import Condition, parse_conditions
from ctxlens.chat.roles import Role
from ctxlens.errors import InputError, ModelFailureError
from ctxlens.evals.closed_book import AnsweredQuestion, run_closed_book
from ctxlens.evals.needle.answers import answer_jobs
from ctxlens.evals.needle.cells import SPARE_TOKENS
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.match import score_recall
from ctxlens.evals.needle.prompts import Cell, Window, render_cell
from ctxlens.evals.texts import Material, build_cells
from ctxlens.models import Model

FACTS = 4
"""Facts, and so questions, in every text."""
MAX_NEW_TOKENS = 24
"""Upper bound on an answer; its prefix leaves only the fact's words to write."""
_CONDITIONS = parse_conditions("plain+prefix,template+prefix")
_MARKED = Condition(prefix=True, indicator=True)
_ROLES = len(_CONDITIONS)
"""How many times the attention by role is read for one text."""
_QUESTION_TOKENS = 40
"""About as many tokens have a question and its markers."""


@dataclass(frozen=True)
class Texts:
    """What belongs to one text of the set: the smallest part of a reading.

    Attributes:
        cells: the questions about it, at every length.
        knowledge: questions that need no text.
    """

    cells: tuple[Cell, ...]
    knowledge: tuple[AnsweredQuestion, ...]


@dataclass(frozen=True)
class QuestionSet:
    """The fixed set that every reading asks, or as many of its texts as the time allows.

    Attributes:
        config: lengths, facts and conditions, for rendering.
        conditions: how every question is asked.
        texts: the texts with their questions.
    """

    config: NeedleConfig
    conditions: tuple[Condition, ...]
    texts: tuple[Texts, ...]

    @property
    def tokens(self) -> int:
        """About how many tokens a model reads and writes for one text, for a forecast before the first."""
        assert not isinstance(self.config.lengths, int)
        read = (len(self.conditions) + _ROLES) * sum(self.config.lengths)
        answers = len(self.conditions) * len(self.texts[0].cells) + len(self.texts[0].knowledge)
        return read + answers * (_QUESTION_TOKENS + MAX_NEW_TOKENS)

    @property
    def passes(self) -> int:
        """About how many times a model is called for one text."""
        assert not isinstance(self.config.lengths, int)
        return _ROLES + len(self.conditions) * len(self.config.lengths) + 2 * MAX_NEW_TOKENS

    def describe(self) -> dict[str, Any]:
        """What the answers depend on, as JSON values."""
        return {
            "lengths": self.config.as_dict()["lengths"],
            "conditions": [condition.name for condition in self.conditions],
            "questions": [
                [cell.needle.name for cell in one.cells] + [item.question for item in one.knowledge]
                for one in self.texts
            ],
            "seed": self.config.seed,
        }


def build_set(
    window: Window, material: Material, *, lengths: Sequence[int], n_texts: int, seed: int
) -> QuestionSet:
    """Build the texts and questions; no model is run.

    Args:
        window: the model's tokenizer, template and window.
        material: texts and facts.
        lengths: lengths of the texts in tokens.
        n_texts: texts of each length.
        seed: seed of texts and facts.

    Raises:
        InputError: the window is too short for the longest text with its question and answer.
    """
    config = NeedleConfig(
        lengths=tuple(lengths), depths=FACTS, needles=material.facts, conditions=_CONDITIONS,
        cases_per_cell=n_texts, max_new_tokens=MAX_NEW_TOKENS, seed=seed, score=("recall",),
    )  # fmt: skip
    _check_window(window, material, config)
    cells = build_cells(window, material, config, FACTS)
    conditions = _CONDITIONS if window.indicator is None else (*_CONDITIONS, _MARKED)
    texts = tuple(
        Texts(tuple(cell for cell in cells if cell.case == text), tuple(material.questions[text::n_texts]))
        for text in range(n_texts)
    )
    return QuestionSet(config, conditions, texts)


def _check_window(window: Window, material: Material, config: NeedleConfig) -> None:
    """Refuse a window into which the longest text does not fit with the longest question and its answer."""
    assert not isinstance(config.lengths, int)
    fact = max(material.facts, key=lambda fact: len(fact.question) + len(fact.prefix))
    messages = [
        {"role": "user", "content": f"\n{fact.question}"},
        {"role": "assistant", "content": fact.prefix},
    ]
    unbounded = Window(window.name, window.tokenizer, 2**31 - 1, window.indicator)
    beside = unbounded.render(messages, continue_final_message=True).n_tokens + MAX_NEW_TOKENS + SPARE_TOKENS
    longest = max(config.lengths)
    if longest + beside > window.n_ctx:
        fits = window.n_ctx - beside
        advice = f"lengths of at most {fits}" if fits >= 50 else "a model with a larger window"
        raise InputError(
            f"texts of {longest} tokens do not fit the model's window of {window.n_ctx} tokens together with "
            f"template, question and answer, which take {beside}; give {advice}."
        )


def ask(model: Model, asked: QuestionSet, number: int) -> dict[str, float]:
    """What a model answers about one text of the set.

    Returns:
        By quantity (see `rules.QUANTITIES`), the mean over the text's questions, 0 to 1; NaN where nothing
        could be measured.

    Raises:
        ModelFailureError: the model fails on every question.
    """
    texts = asked.texts[number]
    jobs = [(cell, condition) for condition in asked.conditions for cell in texts.cells]
    answers = answer_jobs(model, jobs, asked.config)
    if all(answer.error for answer in answers):
        raise ModelFailureError(answers[0].error)
    found: dict[str, float] = {}
    for condition in asked.conditions:
        recalls = [
            score_recall(cell.needle.keywords, answer.response)
            for (cell, one), answer in zip(jobs, answers, strict=True)
            if one == condition and answer.response is not None
        ]
        found[f"recall_{_name(condition)}"] = _mean(recalls)
    cell = texts.cells[number % len(texts.cells)]
    for condition in _CONDITIONS:
        chat = render_cell(model, cell, asked.config, condition)
        with torch.autocast(model.device.type, enabled=False):  # shares are read in the weights' own format
            read = model.read_roles(chat, sinks=True)
        shares = read.without_sinks().renormalised().share(Role.USER)
        found[f"user_share_{_name(condition)}"] = float(np.nanmean(shares))
    if texts.knowledge:
        table = run_closed_book(model, texts.knowledge, max_new_tokens=MAX_NEW_TOKENS)
        found["closed_book"] = _mean(table.frame["recall"].tolist())
    return found


def average(by_text: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every quantity over the texts; texts without a value are left out."""
    names = dict.fromkeys(name for one in by_text for name in one)
    return {name: _mean([one[name] for one in by_text if name in one]) for name in names}


def _name(condition: Condition) -> str:
    return "indicator" if condition.indicator else "template" if condition.template else "plain"


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


__all__ = ["FACTS", "MAX_NEW_TOKENS", "QuestionSet", "Texts", "ask", "average", "build_set"]
