"""The samples that lm-eval logs for a task, as rows of an `Evaluation`."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ctxlens.evals.harness.adapter import CtxlensLM
from ctxlens.evals.harness.examples import find_text
from ctxlens.results import Evaluation

_SAYS_NOTHING = re.compile(r"\s*(?:(?:a|answer|response)\s*:)?\s*", re.IGNORECASE)
"""Matches an answer without text, or with nothing but a label such as `A:`."""


class Asked(NamedTuple):
    """What became of the requests of one example.

    Attributes:
        prompt: the first prompt, before truncation.
        truncated: whether any prompt was truncated.
        cut: whether any answer was cut off at its longest.
    """

    prompt: str
    truncated: bool
    cut: bool


def describe_requests(lm: CtxlensLM, task: Any) -> dict[int, Asked]:
    """What became of each example that this process asked."""
    found: dict[int, Asked] = {}
    for instance in task.instances:
        prompt, truncated = lm.describe(instance)
        before = found.get(instance.doc_id, Asked(prompt, False, False))
        cut = before.cut or lm.was_cut(instance)
        found[instance.doc_id] = Asked(before.prompt, before.truncated or truncated, cut)
    return found


def make_rows(
    task: Any,
    samples: Sequence[Mapping[str, Any]],
    asked: Mapping[int, Asked],
    labels: Mapping[str, str],
) -> list[dict[str, Any]]:
    """One row per logged sample, by filter and example; the labels are `model`, `condition` and `task`."""
    rows = []
    for sample in samples:
        request = asked[sample["doc_id"]]
        response = _response(task, sample)
        metrics = {_column(name): _number(sample[name]) for name in sample["metrics"]}
        rows.append(
            {
                **labels,
                "example": int(sample["doc_id"]),
                "filter": str(sample["filter"]),
                "context": _fingerprint(sample["doc"], labels["task"], sample["doc_id"]),
                "prompt": request.prompt,
                "response": response,
                "gold": _gold(task, sample),
                "truncated": request.truncated,
                "empty": task.OUTPUT_TYPE == "generate_until" and says_nothing(response),
                "cut": request.cut,
                **{name: value for name, value in metrics.items() if value is not None},
            }
        )
    return sorted(rows, key=lambda row: (row["filter"], row["example"]))


def says_nothing(response: str) -> bool:
    """Whether an answer is empty, or holds nothing but a label such as `A:` or `Answer:`."""
    return _SAYS_NOTHING.fullmatch(response) is not None


def find_metrics(task: Any, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, bool]]:
    """The metrics among the columns of rows, and for each of them whether more is better."""
    names = dict.fromkeys(name for row in rows for name in row if name not in Evaluation.KNOWN)
    better = {_column(name): bool(value) for name, value in task.higher_is_better().items()}
    return list(names), {name: better.get(name, True) for name in names}


def _column(metric: str) -> str:
    return f"{metric}_" if metric in Evaluation.KNOWN else metric


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
    text = find_text(doc) or f"{task}:{number}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


__all__ = ["Asked", "describe_requests", "find_metrics", "make_rows", "says_nothing"]
