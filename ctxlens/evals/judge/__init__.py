"""A language model as judge: single answers graded from 1 to 10 over an OpenAI-compatible interface.

Nothing is sent anywhere unless an endpoint is given. What a judge returns is data: it is kept as it came, and
nothing in it is run.
"""

from ctxlens.evals.judge.endpoint import Endpoint, Reply
from ctxlens.evals.judge.grading import judge_answers, judgments_path
from ctxlens.evals.judge.prompts import Prompt, make_prompt, parse_rating

__all__ = ["Endpoint", "Prompt", "Reply", "judge_answers", "judgments_path", "make_prompt", "parse_rating"]
