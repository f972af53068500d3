"""Compares a trained checkpoint with the model before it: needles, closed-book questions, attention.

`plan_evaluation` builds and checks everything that will be asked before the training starts;
`evaluate_checkpoint` measures both models, and writes table, figures and the model card's section.
"""

from ctxlens.sft.before_after.comparison import BASE, TRAINED, Row, models_rows, treatments_rows
from ctxlens.sft.before_after.evaluate import RESULT, STUDY, evaluate_checkpoint
from ctxlens.sft.before_after.measure import STAGES
from ctxlens.sft.before_after.plan import EvaluationPlan, plan_evaluation
from ctxlens.sft.before_after.questions import ClosedBookQuestion, load_questions
from ctxlens.sft.before_after.section import insert_section
from ctxlens.sft.keys import EvaluationKeys

__all__ = [
    "BASE", "RESULT", "STAGES", "STUDY", "TRAINED", "ClosedBookQuestion", "EvaluationKeys", "EvaluationPlan",
    "Row", "evaluate_checkpoint", "insert_section", "load_questions", "models_rows",
    "plan_evaluation", "treatments_rows",
]  # fmt: skip
