"""Reading comprehension: questions about a text, from SQuAD, QuAC and DROP, and how right an answer is.

```python
examples = load_squad("dev-v1.1.json")
prompt = render_question(examples[0].context, examples[0].question, "passage")
score_contains("It began in October 1973. Then", examples[0].references)
```
"""

from ctxlens.evals.qa.drop import DropScore, normalize_drop, score_drop
from ctxlens.evals.qa.examples import QAExample
from ctxlens.evals.qa.loading import FILE_NAMES, HUB_IDS, find_file, load_drop, load_quac, load_squad
from ctxlens.evals.qa.metrics import (
    first_sentence,
    normalize_answer,
    score_contains,
    score_contains_released,
    score_exact_match,
    score_f1,
)
from ctxlens.evals.qa.prompts import PAPER_WORDING, WORDINGS, render_question
from ctxlens.evals.qa.quac import CANNOT_ANSWER, choose_references, score_heq, score_human_f1, score_quac_f1
from ctxlens.evals.qa.squad_file import score_squad_file

__all__ = [
    "CANNOT_ANSWER", "FILE_NAMES", "HUB_IDS", "PAPER_WORDING", "WORDINGS", "DropScore", "QAExample",
    "choose_references", "find_file", "first_sentence", "load_drop", "load_quac", "load_squad",
    "normalize_answer", "normalize_drop", "render_question", "score_contains", "score_contains_released",
    "score_drop", "score_exact_match", "score_f1", "score_heq", "score_human_f1", "score_quac_f1",
    "score_squad_file",
]  # fmt: skip
