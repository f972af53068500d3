"""Scores of a file of predictions for SQuAD, as the official script computes them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from ctxlens.errors import InputError
from ctxlens.evals.qa.examples import QAExample
from ctxlens.evals.qa.metrics import score_exact_match, score_f1


def score_squad_file(
    predictions: str | Path | Mapping[str, str], dataset: str | Path | Iterable[QAExample]
) -> dict[str, float]:
    """Exact match and F1 of a file of predictions, in percent, as SQuAD's own script computes them.

    Args:
        predictions: a JSON file that maps question ids to answers, or such a mapping.
        dataset: a file in one of the layouts of `load_squad`, or its examples. Questions without a prediction
            count as wrong, with a warning.

    Returns:
        `exact_match` and `f1`, means over the questions, 0 to 100.

    Raises:
        InputError: a file cannot be read, or holds no predictions.
    """
    from ctxlens.evals.qa.loading import load_squad

    examples = load_squad(str(dataset)) if isinstance(dataset, str | Path) else list(dataset)
    texts = predictions if isinstance(predictions, Mapping) else _read_predictions(Path(predictions))
    if not examples:
        raise InputError("the data set holds no questions; give at least one.")
    if missing := [example.id for example in examples if example.id not in texts]:
        warnings.warn(
            f"{len(missing)} of {len(examples)} questions have no prediction and count as wrong, the first "
            f"is {missing[0]}",
            stacklevel=2,
        )
    totals = {"exact_match": 0.0, "f1": 0.0}
    for example in examples:
        if example.id in texts:
            totals["exact_match"] += score_exact_match(texts[example.id], example.answers)
            totals["f1"] += score_f1(texts[example.id], example.answers)
    return {name: 100 * total / len(examples) for name, total in totals.items()}


def _read_predictions(path: Path) -> dict[str, str]:
    from ctxlens.chat.data.reading import read_json_rows

    rows = list(read_json_rows(path))
    found = rows[0] if len(rows) == 1 and isinstance(rows[0], dict) else None
    if not found or not all(isinstance(text, str) for text in found.values()):
        raise InputError(f"{path} holds no predictions; expected one JSON object of question ids and texts.")
    return found


__all__ = ["score_squad_file"]
