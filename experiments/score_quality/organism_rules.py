"""The layer rules on the organism: its scores, and the attention of its heads to hidden facts.

Its window holds 576 tokens and it knows the words of its own world only, so the long texts have 440 tokens,
and texts and facts are drawn from its world. This was decided before the first run with SmolLM2.
"""

from __future__ import annotations

import numpy as np
from data import Labelled, organism_world
from real_model import read_needles

from ctxlens.models import load_model
from ctxlens.results import Scores
from ctxlens.scoring import score_conversations
from ctxlens.scoring.lp_gap import add_lp_gap

CONVERSATIONS, SEED = 900, 7
PROBES = {"short": (250, 24), "long": (440, 12)}
"""Length in tokens and number of the texts in which the layer is looked for."""


def score_organism() -> tuple[Scores, Labelled, dict[str, np.ndarray]]:
    """The scores of the organism's world, the world, and the shares of every head by length of text."""
    model = load_model("organism-chat", backend="native")
    world = organism_world(CONVERSATIONS, SEED)
    scores = score_conversations(model, world.conversations, layers="all", kinds=world.kinds, sinks=True)
    scores = add_lp_gap(model, world.conversations, scores)
    probes = {
        name: np.array(
            read_needles(model, length, texts, needle="unknown", haystack="organism")["shares"], dtype=float
        )
        for name, (length, texts) in PROBES.items()
    }
    return scores, world, probes
