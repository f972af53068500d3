"""Experiments on heads: which heads carry the needle, and what steering them or switching them off does.

```python
answers = Answers(cells, config)
copying = copying_map(model, answers)                     # Wu et al. 2024
blind = act_on_each_head(model, answers, "blind")         # one head at a time
fast = gradient_map(model, answers)                       # all heads in one backward pass
cumulative_curves(model, answers, {"copying": rank_heads(copying)}, "blind")
```
"""

from ctxlens.heads.acting import ACTIONS, Action
from ctxlens.heads.answers import MEASURES, Answers
from ctxlens.heads.choose import Head, HeadModel, draw_random_heads, find_retrieval_heads
from ctxlens.heads.copying import copying_map, user_share_map
from ctxlens.heads.cumulative import cumulative_curves
from ctxlens.heads.ends import act_after_the_text
from ctxlens.heads.gradient import estimate_steering, gradient_map
from ctxlens.heads.maps import act_on_each_head, opposite, rank_heads
from ctxlens.heads.probe import NeedleLayers, find_needle_layers, needle_layer
from ctxlens.heads.sweep import HEAD_SETS, describe_sweep, steering_sweep, sweep_settings
from ctxlens.heads.tradeoff import answer_nats, side_effects

__all__ = [
    "ACTIONS",
    "HEAD_SETS",
    "MEASURES",
    "Action",
    "Answers",
    "Head",
    "HeadModel",
    "NeedleLayers",
    "act_after_the_text",
    "act_on_each_head",
    "answer_nats",
    "copying_map",
    "cumulative_curves",
    "describe_sweep",
    "draw_random_heads",
    "estimate_steering",
    "find_needle_layers",
    "find_retrieval_heads",
    "gradient_map",
    "needle_layer",
    "opposite",
    "rank_heads",
    "side_effects",
    "steering_sweep",
    "sweep_settings",
    "user_share_map",
]  # fmt: skip
