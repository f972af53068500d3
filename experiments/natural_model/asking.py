"""What every model is asked, with and without template: needles, held-out passages, closed-book questions.

Every figure is a list of items (`Item`): one value per unit, with the cluster that the unit belongs to, so
that all conditions are compared in pairs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ctxlens.chat.condition import Condition
from ctxlens.chat.data import Conversation
from ctxlens.chat.roles import RenderedChat
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.needles import Needle
from ctxlens.evals.needle.prompts import Cell
from ctxlens.evals.needle.run import Setting, run_settings
from ctxlens.evals.needle.sentences import split_sentences
from ctxlens.evals.qa import score_contains
from ctxlens.models import Model
from ctxlens.results import NeedleGrid
from experiments.natural_model.presets import Preset
from experiments.natural_model.sources import Question, Sources, drop_question, squad_questions
from experiments.natural_text.__main__ import without_needle

Item = dict[str, Any]
"""`unit`, `cluster`, and one value by measure; with texts where there are any."""

WORDING = "{context}\nAnswer the question according to the above passage: {question}"
NEW_TOKENS = 32
_ROOM = 140  # for a response of 100 tokens, the template and the indicator
_PER_PASSAGE = 2

NEEDLES: tuple[str | Needle, ...] = (
    "sf",
    Needle(
        "soup", "The secret of my grandmother's soup is fresh pepper and a spoon of dark honey.",
        "What is the secret of my grandmother's soup?", ("fresh", "pepper", "spoon", "dark", "honey"),
        "The secret of my grandmother's soup is",
    ),
    Needle(
        "train", "The last train to the northern coast leaves from the old glass station at noon.",
        "Where does the last train to the northern coast leave from?", ("old", "glass", "station", "noon"),
        "The last train to the northern coast leaves from the",
    ),
    Needle(
        "garden", "The people of the small village planted white roses and yellow corn behind the church.",
        "What did the people of the small village plant?", ("white", "roses", "yellow", "corn", "church"),
        "The people of the small village planted",
    ),
)  # fmt: skip
"""The paper's needle and three others, so that no result depends on one sentence."""


@dataclass(frozen=True)
class Arm:
    """A model under a condition.

    Attributes:
        model: `base`, `vanilla`, `indicator` or `oracle`.
        template: Whether the chat template is applied.
        indicator: Whether the user's message carries the indicator.
    """

    model: str
    template: bool
    indicator: bool = False

    @property
    def condition(self) -> Condition:
        """How the model is asked."""
        return Condition(template=self.template, indicator=self.indicator)

    @property
    def name(self) -> str:
        """Model and condition."""
        return f"{self.model}, {self.condition}"


def arms_of(model: str) -> tuple[Arm, ...]:
    """The conditions that a model is asked in."""
    arms = (Arm(model, False), Arm(model, True))
    return arms if model in ("base", "vanilla") else (*arms, Arm(model, True, True))


def render_asked(model: Model, arm: Arm, asked: str, answer: str | None = None) -> RenderedChat:
    """A request in an arm's condition, open for an answer or with a given answer."""
    render = model.render if arm.template else model.render_plain
    user = {"role": "user", "content": asked, **({"indicator": True} if arm.indicator else {})}
    if answer is None:
        return render([user], add_generation_prompt=True)
    return render([user, {"role": "assistant", "content": answer}], continue_final_message=True)


def ask_needles(
    model: Model, arms: Sequence[Arm], essays: Mapping[str, str], preset: Preset, seed: int
) -> dict[str, Any]:
    """Needle recall, and what the needle adds to its own sentence's log-probability, by arm."""
    config = NeedleConfig(
        lengths=preset.needle_lengths, depths=preset.needle_depths, needles=NEEDLES,
        conditions=("plain+prefix", "template+prefix"), cases_per_cell=preset.needle_cases,
        max_new_tokens=24, seed=seed, score=("recall", "contains", "logprob"),
    )  # fmt: skip
    sentences = [sentence for essay in essays.values() for sentence in split_sentences(essay)]
    cells = build_cells(model, config, load_haystack(sentences, seed=seed))
    settings = [Setting("m", indicator=marked) for marked in sorted({arm.indicator for arm in arms})]
    grid = run_settings(model, cells, config, settings)
    bare = replace(config, score=("logprob",))
    control = run_settings(model, list(map(without_needle, cells)), bare, settings)
    return {arm.name: _needle_items(grid, control, cells, arm) for arm in arms}


def _needle_items(grid: NeedleGrid, control: NeedleGrid, cells: Sequence[Cell], arm: Arm) -> list[Item]:
    asked = replace(arm.condition, prefix=True).asking
    chosen = {"condition": asked.name, "indicator": arm.indicator}
    rows = grid.where(**chosen).frame.set_index("cell")
    without = control.where(**chosen).frame.set_index("cell")["needle_logprob"]
    return [
        {
            "unit": cell.number, "cluster": f"{cell.context_tokens}-{cell.case}", "needle": cell.needle.name,
            "response": rows["response"][cell.number],
            "needle recall": float(rows["recall"][cell.number]),
            "needle log-probability": float(rows["needle_logprob"][cell.number]),
            "what the needle adds": float(rows["needle_logprob"][cell.number] - without[cell.number]),
        }
        for cell in cells
    ]  # fmt: skip


def choose_questions(sources: Sources, name: str, model: Model, preset: Preset, seed: int) -> list[Question]:
    """Held-out questions of a set: a few per passage, and only those that fit the window."""
    if name == "squad":
        paragraphs = [p for article in sources.squad["data"] for p in article["paragraphs"]]
        pool = [one for paragraph in paragraphs for one in squad_questions(paragraph)]
    else:
        pool = [drop_question(row, f"drop-{number}") for number, row in enumerate(sources.drop)]
    random.Random(f"{seed}-{name}").shuffle(pool)
    chosen: list[Question] = []
    taken: dict[str, int] = {}
    for one in pool:
        if len(chosen) == preset.questions:
            break
        asked = WORDING.format(context=one.passage, question=one.question)
        fits = len(model.tokenizer(asked)["input_ids"]) + _ROOM <= model.n_ctx
        if fits and taken.get(one.passage, 0) < _PER_PASSAGE:
            taken[one.passage] = taken.get(one.passage, 0) + 1
            chosen.append(one)
    return chosen


def ask_questions(model: Model, arms: Sequence[Arm], questions: Sequence[Question]) -> dict[str, list[Item]]:
    """Log-probability of the gold answer with its own passage, with another question's, and without any."""
    asked = [WORDING.format(context=one.passage, question=one.question) for one in questions]
    others = other_passages(questions)
    false = [WORDING.format(context=p, question=q.question) for p, q in zip(others, questions, strict=True)]
    answers = [one.answers[0] for one in questions]
    found = {}
    for arm in arms:
        own, other, none = (
            answer_logprobs(model, arm, texts, answers)
            for texts in (asked, false, [one.question for one in questions])
        )
        found[arm.name] = [
            {
                "unit": one.key, "cluster": one.passage[:80], "log-probability": own[i],
                "gain over another passage": own[i] - other[i], "gain over no passage": own[i] - none[i],
            }
            for i, one in enumerate(questions)
        ]  # fmt: skip
    return found


def other_passages(questions: Sequence[Question]) -> list[str]:
    """For every question, the passage closest in length that is not its own."""
    passages = sorted({one.passage for one in questions}, key=lambda text: (len(text), text))
    places = {passage: at for at, passage in enumerate(passages)}
    if len(passages) < 2:
        return [""] * len(questions)
    return [passages[at - 1] if (at := places[one.passage]) else passages[1] for one in questions]


def answer_logprobs(model: Model, arm: Arm, asked: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Mean log-probability of each answer's tokens, in nats."""
    chats = [render_asked(model, arm, text, answer) for text, answer in zip(asked, answers, strict=True)]
    return [float(values.mean()) for values in model.logprobs(chats, batch_tokens=4096)]


def ask_closed_book(
    model: Model, arms: Sequence[Arm], held_out: Sequence[Conversation]
) -> dict[str, list[Item]]:
    """Questions without passage, held out of everything: log-probability of the answer, containment."""
    asked = [str(one.messages[0]["content"]) for one in held_out]
    answers = [str(one.messages[1]["content"]).strip() for one in held_out]
    found = {}
    for arm in arms:
        known = answer_logprobs(model, arm, asked, answers)
        said = model.generate([render_asked(model, arm, text) for text in asked], max_new_tokens=NEW_TOKENS)
        found[arm.name] = [
            {
                "unit": one.id, "cluster": one.id, "response": text,
                "contains": score_contains(text, (answer,)), "log-probability": value,
            }
            for one, answer, text, value in zip(held_out, answers, said, known, strict=True)
        ]  # fmt: skip
    return found
