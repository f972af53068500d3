"""MT-Bench: a model's answers to questions of several turns, in FastChat's layout.

FastChat samples, with a temperature for each category. ctxlens answers greedily, so that runs can be repeated
and conditions compared question by question. Its figures are therefore not comparable with a leaderboard's.
"""

from ctxlens.evals.mt_bench.answers import (
    Answerer,
    answer_questions,
    answers_path,
    check_label,
    count_answers,
    make_label,
    read_all_answers,
    read_answers,
    record_settings,
)
from ctxlens.evals.mt_bench.questions import (
    MTQuestion,
    fingerprint_questions,
    load_questions,
    load_references,
    write_questions,
)

__all__ = [
    "Answerer", "MTQuestion", "answer_questions", "answers_path", "check_label", "count_answers",
    "fingerprint_questions", "load_questions", "load_references", "make_label", "read_all_answers",
    "read_answers", "record_settings", "write_questions",
]  # fmt: skip
