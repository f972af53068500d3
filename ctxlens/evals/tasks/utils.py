"""The functions that the task files name by `!function utils.…`, which lm-eval looks up in this file."""

from ctxlens.evals.tasks.facts import ask_document, closed_book_docs, organism_docs, score_fact_response
from ctxlens.evals.tasks.needles import needle_docs
from ctxlens.evals.tasks.reading import (
    ask_joined,
    ask_passage,
    ask_pieces,
    drop_docs,
    quac_docs,
    score_drop_response,
    score_quac_response,
    score_squad_response,
    squad_docs,
)

__all__ = [
    "ask_document", "ask_joined", "ask_passage", "ask_pieces", "closed_book_docs", "drop_docs",
    "needle_docs", "organism_docs", "quac_docs", "score_drop_response", "score_fact_response",
    "score_quac_response", "score_squad_response", "squad_docs",
]  # fmt: skip
