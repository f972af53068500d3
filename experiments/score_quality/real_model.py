"""Is the score any good on a real instruction-tuned model? Scores, probes of the layer, and their verdicts.

What is asked and how it is decided was written before the first run: PLAN_REAL_MODEL.md.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from data import Labelled, family_of, t0_world

from ctxlens.chat.data import Conversation
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.heads import needle_layer
from ctxlens.models import Model, load_model
from ctxlens.results import Scores
from ctxlens.runs import Run
from ctxlens.scoring import score_conversations
from ctxlens.scoring.lp_gap import add_lp_gap

SEED = 11
MOST_TOKENS = 1000
PER_KIND = {"document": 960, "closed": 720, "options": 360}
GAP_PART = 140
"""Conversations whose `lp_gap` is saved together."""
PROBES = {"short": (250, 24), "long": (2000, 12)}
"""Length in tokens and number of the neutral texts in which the layer is looked for."""


def main() -> None:
    """Score the rows and probe the layers; finished work is not done again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("t0", type=Path, help="T0's training data: source, prompt, completion")
    parser.add_argument("model", help="SmolLM2-135M-Instruct: folder or Hub id")
    parser.add_argument("--out", type=Path, default=Path("runs/score_quality_real"))
    given = parser.parse_args()
    model = load_model(given.model, backend="native", dtype="float32")
    config = {"model": dict(model.identity), "seed": SEED}
    run = Run.open(given.out, study="score_quality", config=config)
    world = draw_rows(given.t0, model)
    held_out = sorted(hold_out(world))
    run.write_json("held_out.json", held_out)
    if not run.has("gap.parquet"):
        scores = score_conversations(
            model, world.conversations, layers="all", kinds=world.kinds, out=run, sinks=True, progress=_tell
        )
        run.save("gap.parquet", add_gap(model, world.conversations, scores, run))
    for name in PROBES:
        if not run.has(f"probe-{name}.json"):
            run.write_json(f"probe-{name}.json", probe(model, name))
    scores = Scores.load(run.path("gap.parquet"))
    print(f"{len(scores.frame)} rows of turns and layers in {run.folder}")


def draw_rows(path: Path, model: Model) -> Labelled:
    """The rows of the plan, development and held out."""

    def fits(one: Conversation) -> bool:
        return model.render(one.messages, max_tokens=100_000).n_tokens <= MOST_TOKENS

    return t0_world(path, fits, per_kind=PER_KIND, seed=SEED)


def hold_out(world: Labelled) -> set[str]:
    """The ids of the held-out rows: every second one of each family."""
    by_family: dict[str | None, list[str]] = defaultdict(list)
    for one in world.conversations:
        by_family[family_of(str(one.labels["source"]))].append(one.id)
    return {name for names in by_family.values() for name in names[1::2]}


def add_gap(model: Model, conversations: Sequence[Conversation], scores: Scores, run: Run) -> Scores:
    """The scores with `lp_gap`; every part is saved, so that a run that is killed loses one part at most."""
    parts = []
    for start in range(0, len(conversations), GAP_PART):
        name = f"gap-{start}.parquet"
        if not run.has(name):
            part = conversations[start : start + GAP_PART]
            rows = scores.frame[scores.frame["conversation"].isin([one.id for one in part])]
            run.save(name, add_lp_gap(model, part, Scores(rows, scores.meta)))
            _tell(start + len(part), len(conversations))
        parts.append(Scores.load(run.path(name)))
    return Scores(pd.concat([part.frame for part in parts], ignore_index=True), parts[0].meta)


def probe(model: Model, name: str) -> dict[str, list]:
    """Attention from the right answer to the hidden fact, by layer and head."""
    length, texts = PROBES[name]
    return read_needles(model, length, texts, needle="neutral", haystack="neutral")


def read_needles(model: Model, length: int, texts: int, *, needle: str, haystack: str) -> dict[str, list]:
    """Attention from the right answer to a hidden fact, in texts of one length and at four depths."""
    config = NeedleConfig(
        lengths=(length,), depths=(10, 40, 60, 90), needles=(needle,), cases_per_cell=texts // 4, seed=SEED
    )
    cells = build_cells(model, config, load_haystack(haystack, seed=SEED))
    found = needle_layer(model, cells, config)
    return {"shares": found.shares.tolist(), "table": json.loads(found.table.to_json(orient="records"))}


def _tell(done: int, total: int) -> None:
    if done % 100 < 8 or done == total:
        print(f"{done} of {total}", flush=True)


if __name__ == "__main__":
    main()
