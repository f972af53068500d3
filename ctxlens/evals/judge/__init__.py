"""A language model as judge: single answers graded from 1 to 10 through an OpenAI-compatible server.

Nothing is sent anywhere unless an endpoint is given. A judge's replies are data: they are stored unchanged,
and nothing in them is executed.
"""

from ctxlens.evals.judge.endpoint import Endpoint, Reply
from ctxlens.evals.judge.grading import judge_answers, judgments_path
from ctxlens.evals.judge.prompts import Prompt, make_prompt
from ctxlens.evals.judge.replies import parse_rating, parse_winner, remove_thinking

__all__ = [
    "Endpoint", "Prompt", "Reply", "judge_answers", "judgments_path", "make_prompt", "parse_rating",
    "parse_winner", "remove_thinking",
]  # fmt: skip
