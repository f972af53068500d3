"""Needle in a haystack: does a model use a fact that its context contains?

```python
config = NeedleConfig(lengths=(200, 1000), depths=(0, 50, 100), needles=("sf",))
grid = run_needle(model, config, haystack=load_haystack("essays/"))
grid.recall(condition="template+prefix").mean()
```

`needles`, `haystack`, `neutral` and `chats` hold the texts, and `defaults` chooses among them. `sentences`
says where texts may be divided, `contexts` hides a needle, `config` and `cells` hold the grid, `prompts` the
wording under each condition, `answers` and `run` the model's answers, `match` their scores.
"""

from ctxlens.evals.needle.answers import Answer, answer_jobs
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.chats import neutral_chats
from ctxlens.evals.needle.config import SCORES, WORDINGS, NeedleConfig
from ctxlens.evals.needle.contexts import Context
from ctxlens.evals.needle.defaults import Texts, choose_texts
from ctxlens.evals.needle.haystack import Haystack, load_haystack
from ctxlens.evals.needle.match import score_containment, score_recall
from ctxlens.evals.needle.needles import DRAWN_NEEDLES, NEEDLES, Needle, load_needles, neutral_needles
from ctxlens.evals.needle.neutral import neutral_texts
from ctxlens.evals.needle.prompts import Cell, NeedleModel, Renderer, Window, describe_cell, render_cell
from ctxlens.evals.needle.run import Setting, plan_parts, run_needle, run_settings, save_cells

__all__ = [
    "DRAWN_NEEDLES", "NEEDLES", "SCORES", "WORDINGS", "Answer", "Cell", "Context", "Haystack", "Needle",
    "NeedleConfig", "NeedleModel", "Renderer", "Setting", "Texts", "Window", "answer_jobs", "build_cells",
    "choose_texts", "describe_cell", "load_haystack", "load_needles", "neutral_chats", "neutral_needles",
    "neutral_texts", "plan_parts", "render_cell", "run_needle", "run_settings", "save_cells",
    "score_containment", "score_recall",
]  # fmt: skip
