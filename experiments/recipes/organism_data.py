"""Writes the organism's fine-tuning data as files, for the recipe `organism.yaml`.

Run:  python -m experiments.recipes.organism_data --out runs/organism-data [--conversations N] [--seed S]
Writes conversations.jsonl, replay.jsonl (raw texts) and selection.parquet (the turns that are truly answered
from their document, an upper bound for every selection by scores).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ctxlens.files import write_atomic
from ctxlens.organism import load_world, recipe
from ctxlens.results import Selection


def main(argv: Sequence[str] | None = None) -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/organism-data"))
    parser.add_argument("--conversations", type=int, default=recipe.CONVERSATIONS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    world = load_world()
    talks = world.conversations(options.conversations, seed=options.seed, **recipe.SHARES)
    lines = [json.dumps({"id": talk.id, "messages": list(talk.messages)}) for talk in talks]
    write_atomic(options.out / "conversations.jsonl", "\n".join(lines) + "\n")
    n_raw = round(options.conversations * recipe.REPLAY_SHARE / (1 - recipe.REPLAY_SHARE))
    raw = world.raw_documents(n_raw, seed=options.seed, **recipe.REPLAY)
    write_atomic(options.out / "replay.jsonl", "\n".join(json.dumps({"text": text}) for text in raw) + "\n")
    rows = [
        (talk.id, 2 * turn + 1, float(kind == "document"), kind == "document")
        for talk in talks
        for turn, kind in enumerate(talk.kinds)
    ]
    frame = pd.DataFrame(rows, columns=list(Selection.COLUMNS))
    meta = {
        "threshold": 0.5,
        "rule": "true labels",
        "turns": len(frame),
        "selected": int(frame["selected"].sum()),
    }
    Selection(frame, meta).save(options.out / "selection.parquet")


if __name__ == "__main__":
    main()
