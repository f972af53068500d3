"""Context-dependency scores of a data set: one forward pass per conversation.

`score_conversations` scores in memory or into a run folder, `score_to_run` into a folder without
holding the data set or the scores in memory, in one process or several; `merge_shards` merges what
independent jobs have scored; `ScoreBatch` does the same work inside Ray. Threshold, layer and
reduction are chosen afterwards, by `ctxlens.select_turns`.
"""

from ctxlens.scoring.batches import ScoreBatch
from ctxlens.scoring.shard import Scorer, Settings, Turn, check_layers
from ctxlens.scoring.store import merge_shards
from ctxlens.scoring.whole import SHARD_CONVERSATIONS, check_part, score_conversations, score_to_run

__all__ = [
    "SHARD_CONVERSATIONS", "ScoreBatch", "Scorer", "Settings", "Turn", "check_layers", "check_part",
    "merge_shards", "score_conversations", "score_to_run",
]  # fmt: skip
