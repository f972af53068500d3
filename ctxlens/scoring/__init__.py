"""Context-dependency scores of a data set: one truncated forward pass, every choice left open.

`score_conversations` scores in memory or into a run folder, `score_to_run` into a folder without ever
holding the data set or the scores, alone or as one of several processes; `merge_shards` puts together
what independent jobs have scored; `ScoreBatch` does the same work inside Ray. Threshold, layer and
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
