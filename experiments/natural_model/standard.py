"""SQuAD, DROP and IFEval through lm-eval, by `ctxlens.evals.harness`, on held-out questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctxlens.evals.harness.evaluate import run_evaluation
from ctxlens.evals.tasks import folder
from ctxlens.files import write_atomic
from ctxlens.models import Model
from ctxlens.results import Evaluation
from experiments.natural_model.asking import Arm, Item
from experiments.natural_model.sources import IFEVAL, Question

READING = {"squad": "ctxlens_squad", "drop": "ctxlens_drop"}
READING_METRICS = ("contains", "exact_match", "f1")
IFEVAL_METRICS = (
    "prompt_level_strict_acc", "inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc",
)  # fmt: skip
IFEVAL_TOKENS = 160
"""New tokens of an IFEval response: the task's own 1,280 are more than a small window holds."""


def ask_reading(
    model: Model, arms: Sequence[Arm], part: str, questions: Sequence[Question], out: Path
) -> dict[str, Any]:
    """Answers to held-out questions of SQuAD or DROP, by arm."""
    write_questions(part, questions, out / part)
    found = run_evaluation([model], [READING[part]], _conditions(arms), data_dir=out / part)
    return _by_arm(found, READING[part], READING_METRICS, arms)


def ask_ifeval(model: Model, arms: Sequence[Arm], data: Path, limit: int, out: Path) -> dict[str, Any]:
    """IFEval under the template, by arm; `ctxlens_ifeval` with fewer new tokens."""
    task = {
        "include": str(folder() / "ifeval.yaml"), "task": "natural_ifeval",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": IFEVAL_TOKENS},
    }  # fmt: skip
    write_atomic(out / "tasks" / "natural_ifeval.yaml", json.dumps(task))
    asked = [arm for arm in arms if arm.template]
    found = run_evaluation(
        [model], ["natural_ifeval"], _conditions(asked), limit=limit, data_dir=(data / IFEVAL).parent,
        include_path=out / "tasks",
    )  # fmt: skip
    return _by_arm(found, "natural_ifeval", IFEVAL_METRICS, asked)


def write_questions(part: str, questions: Sequence[Question], out: Path) -> None:
    """Held-out questions as a file in the data set's layout."""
    if part == "squad":
        paragraphs = [
            {
                "context": one.passage,
                "qas": [{
                    "id": one.key, "question": one.question,
                    "answers": [
                        {"text": text, "answer_start": one.passage.find(text)} for text in one.answers
                    ],
                }],
            }
            for one in questions
        ]  # fmt: skip
        articles = {"version": "1.1", "data": [{"title": "held out", "paragraphs": paragraphs}]}
        write_atomic(out / "dev-v1.1.json", json.dumps(articles))
        return
    rows = [
        {
            "id": one.key, "context": f"Passage: {one.passage}\nQuestion: {one.question}\nAnswer:",
            "completion": f" {one.answers[0]}", "ref_text": "|".join(one.answers),
        }
        for one in questions
    ]  # fmt: skip
    write_atomic(out / "drop_dev.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))


def _conditions(arms: Sequence[Arm]) -> list[str]:
    return [arm.condition.name for arm in arms]


def _by_arm(
    found: Evaluation, task: str, metrics: Sequence[str], arms: Sequence[Arm]
) -> dict[str, list[Item]]:
    frame = found.frame[found.frame["task"] == task]
    by_arm = {}
    for arm in arms:
        rows = frame[frame["condition"] == arm.condition.name]
        by_arm[arm.name] = [
            {
                "unit": int(row["example"]), "cluster": row["context"], "response": row["response"],
                "gold": row["gold"], "truncated": bool(row["truncated"]),
                **{metric: float(row[metric]) for metric in metrics},
            }
            for row in rows.to_dict("records")
        ]  # fmt: skip
    return by_arm
