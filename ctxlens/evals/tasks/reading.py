"""Tasks on SQuAD, QuAC and DROP: documents, prompts in the paper's wordings, and scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ctxlens.evals.qa import (
    QAExample,
    choose_references,
    first_sentence,
    load_drop,
    load_quac,
    load_squad,
    normalize_drop,
    render_question,
    score_contains,
    score_contains_released,
    score_drop,
    score_exact_match,
    score_f1,
    score_heq,
    score_quac_f1,
)
from ctxlens.evals.tasks.options import make_split, take_options

Doc = Mapping[str, Any]


def squad_docs(**metadata: Any) -> dict[str, Any]:
    """Documents of `ctxlens_squad`; options: `squad_data_dir` or `data_dir`, `squad_split` or `split`."""
    options = _source("squad", metadata, {})
    return _make_docs(load_squad(options["data_dir"], split=options["split"]))


def quac_docs(**metadata: Any) -> dict[str, Any]:
    """Documents of `ctxlens_quac`; options: those of SQuAD, and those of `load_quac` after `quac_`."""
    more = {"turns": "first", "history": 0, "background": False, "unanswerable": True, "min_agreement": 0.0}
    options = _source("quac", metadata, more)
    return _make_docs(load_quac(options.pop("data_dir"), **options))


def drop_docs(**metadata: Any) -> dict[str, Any]:
    """Documents of `ctxlens_drop`; options: those of SQuAD."""
    options = _source("drop", metadata, {})
    return _make_docs(load_drop(options["data_dir"], split=options["split"]))


def _source(name: str, metadata: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    common = {"data_dir": metadata.get("data_dir"), "split": metadata.get("split", "validation")}
    options = take_options(metadata, name, {**common, **more})
    return {**options, "data_dir": options["data_dir"] and str(options["data_dir"])}


def _make_docs(examples: Iterable[QAExample]) -> dict[str, Any]:
    return make_split(
        [
            {
                "id": example.id,
                "title": example.title,
                "context": example.context,
                "question": example.question,
                "answers": example.answers,
                "references": [list(spans) for spans in example.references],
            }
            for example in examples
        ]
    )


def ask_passage(doc: Doc) -> str:
    """The paper's prompt for SQuAD and DROP."""
    return render_question(doc["context"], doc["question"], "passage")


def ask_pieces(doc: Doc) -> str:
    """The paper's prompt for QuAC."""
    return render_question(doc["context"], doc["question"], "pieces")


def ask_joined(doc: Doc) -> str:
    """The paper's prompt for models tuned on UltraChat."""
    return render_question(doc["context"], doc["question"], "joined")


def score_squad_response(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Containment, and SQuAD's exact match and F1 of the response's first sentence."""
    prediction = first_sentence(results[0])
    return {
        "contains": score_contains(results[0], doc["references"]),
        "exact_match": score_exact_match(prediction, doc["answers"]),
        "f1": score_f1(prediction, doc["answers"]),
        "contains_released": score_contains_released(results[0], doc["references"]),
    }


def score_quac_response(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Containment, and QuAC's F1 and human equivalence of the response's first sentence.

    Exact match and containment use the gold answers that QuAC's F1 counts; the released code's containment
    uses all of them.
    """
    prediction = first_sentence(results[0])
    golds = choose_references(doc["answers"])
    return {
        "contains": score_contains(results[0], golds),
        "exact_match": score_exact_match(prediction, golds),
        "f1": score_quac_f1(prediction, doc["answers"]),
        "heq": score_heq(prediction, doc["answers"]),
        "contains_released": score_contains_released(results[0], doc["answers"]),
    }


def score_drop_response(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Containment in DROP's normal form, and DROP's exact match and F1 of the response's first sentence."""
    scores = score_drop(first_sentence(results[0]), doc["references"])
    return {
        "contains": score_contains(results[0], doc["references"], normalize=normalize_drop),
        "exact_match": scores.exact_match,
        "f1": scores.f1,
        "contains_released": score_contains_released(results[0], doc["references"][:1]),
    }


__all__ = [
    "ask_joined", "ask_passage", "ask_pieces", "drop_docs", "quac_docs",
    "score_drop_response", "score_quac_response", "score_squad_response", "squad_docs",
]  # fmt: skip
