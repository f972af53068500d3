"""The samples that lm-eval logs for a task, as rows of an `Evaluation`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ctxlens.evals.harness.adapter import CtxlensLM
from ctxlens.results import Evaluation

_TEXTS = ("context", "passage", "article", "story", "paragraph")
"""Fields of a document that may hold the text that is asked about, in the order in which they are tried."""


def describe_requests(lm: CtxlensLM, task: Any) -> dict[int, tuple[str, bool]]:
    """For each example that this process asked: its first prompt, and whether any prompt was truncated."""
    found: dict[int, tuple[str, bool]] = {}
    for instance in task.instances:
        text, cut = lm.describe(instance)
        first, before = found.get(instance.doc_id, (text, False))
        found[instance.doc_id] = (first, before or cut)
    return found


def make_rows(
    task: Any,
    samples: Sequence[Mapping[str, Any]],
    asked: Mapping[int, tuple[str, bool]],
    labels: Mapping[str, str],
) -> list[dict[str, Any]]:
    """One row per logged sample, by filter and example; the labels are `model`, `condition` and `task`."""
    rows = []
    for sample in samples:
        prompt, truncated = asked[sample["doc_id"]]
        response = _response(task, sample)
        metrics = {_column(name): _number(sample[name]) for name in sample["metrics"]}
        rows.append(
            {
                **labels,
                "example": int(sample["doc_id"]),
                "filter": str(sample["filter"]),
                "context": _fingerprint(sample["doc"], labels["task"], sample["doc_id"]),
                "prompt": prompt,
                "response": response,
                "gold": _gold(task, sample),
                "truncated": truncated,
                "empty": task.OUTPUT_TYPE == "generate_until" and not response.strip(),
                **{name: value for name, value in metrics.items() if value is not None},
            }
        )
    return sorted(rows, key=lambda row: (row["filter"], row["example"]))


def find_metrics(task: Any, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, bool]]:
    """The metrics among the columns of rows, and for each of them whether more is better."""
    names = dict.fromkeys(name for row in rows for name in row if name not in Evaluation.COLUMNS)
    better = {_column(name): bool(value) for name, value in task.higher_is_better().items()}
    return list(names), {name: better.get(name, True) for name in names}


def _column(metric: str) -> str:
    return f"{metric}_" if metric in Evaluation.COLUMNS else metric


def _number(value: Any) -> float | None:
    """A metric's value for one example: a number, or the mean of a list of numbers; else None."""
    number: Any = value
    if isinstance(value, list) and value and all(isinstance(one, bool | int | float) for one in value):
        number = math.fsum(value) / len(value)
    try:
        return float(number)
    except (TypeError, ValueError):
        return None


def _response(task: Any, sample: Mapping[str, Any]) -> str:
    answers = sample["filtered_resps"]
    if task.OUTPUT_TYPE == "multiple_choice":
        likelihoods = [answer[0] for answer in answers]
        return str(sample["arguments"][likelihoods.index(max(likelihoods))][1]).strip()
    first = answers[0]
    return "\n".join(map(str, first)) if isinstance(first, list) else str(first)


def _gold(task: Any, sample: Mapping[str, Any]) -> str:
    target = sample["target"]
    if task.OUTPUT_TYPE == "multiple_choice" and isinstance(target, int):
        choices = task.doc_to_choice(sample["doc"])
        return str(choices[target]) if 0 <= target < len(choices) else str(target)
    if isinstance(target, list | tuple):
        return " | ".join(dict.fromkeys(map(str, target)))
    return "" if target is None else str(target)


def _fingerprint(doc: Any, task: str, number: int) -> str:
    """Identifies the text that is asked about, so that examples about one text form one unit.

    It hashes a text, not JSON values, and stays as it is: answers are paired over it, also with those of
    files that were written before.
    """
    texts = (doc.get(name) for name in _TEXTS) if isinstance(doc, Mapping) else ()
    text = next((one for one in texts if isinstance(one, str) and one.strip()), f"{task}:{number}")
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


__all__ = ["describe_requests", "find_metrics", "make_rows"]
