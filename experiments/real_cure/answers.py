"""What was measured, from the folders of a run or from the answers that are kept in this repository.

Run:  python -m experiments.real_cure.answers runs/real_cure
It puts the answers of every finished model into one file of JSON Lines, and the selections and the readings
of the training that was watched beside them. They can be judged again; a run goes on from them with `--kept`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from ctxlens.files import write_atomic
from ctxlens.results import Selection

KEPT = Path(__file__).with_name("answers")
QUALITY = "selections.json"
READINGS = "readings.jsonl"


def main() -> None:
    """Keep what is finished."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, default=KEPT)
    given = parser.parse_args()
    for path in keep(given.folder, given.to):
        print(path)


def keep(folder: Path, to: Path) -> list[Path]:
    """Write the answers of a run's finished models, one file each; returns the files."""
    written = []
    for path in sorted(folder.glob("*/measured.json")):
        lines = [json.dumps(row, ensure_ascii=False) for row in _read(path)]
        written.append(write_atomic(to / f"{path.parent.name}.jsonl", "\n".join(lines) + "\n"))
    for path in sorted(folder.glob("scores-*/selection.parquet")):
        written.append(keep_selection(path, int(path.parent.name.rpartition("-")[2]), to))
    found = read_quality(folder)
    if found:
        known = read_quality(to)
        written.append(write_atomic(to / QUALITY, json.dumps(known | found, indent=1) + "\n"))
    for path in sorted(folder.glob("*/trained/context/" + READINGS)):
        written.append(to / f"{path.parents[2].name}.{READINGS}")
        shutil.copyfile(path, written[-1])
    return written


def keep_selection(path: Path, seed: int, to: Path) -> Path:
    """Write a seed's selection without the place of the model on this machine."""
    found = Selection.load(path)
    model = {**(found.meta.get("model") or {}), "name": f"vanilla-{seed}", "path": None}
    return Selection(found.frame, {**found.meta, "model": model}).save(to / selection_file(seed))


def is_kept(folder: Path | None, name: str) -> bool:
    """Whether a model's answers are kept."""
    return folder is not None and (folder / f"{name}.jsonl").is_file()


def selection_file(seed: int) -> str:
    """The file's name of a seed's kept selection."""
    return f"selection-{seed}.parquet"


def read_quality(folder: Path) -> dict[str, Any]:
    """Precision and recall of the selections by seed, from a run or kept."""
    kept = folder / QUALITY
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    for path in sorted([*folder.glob("scores-*/quality.json"), *folder.glob("narrowed-*/quality.json")]):
        found[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def read_answers(folder: Path) -> pd.DataFrame:
    """All answers, with `model` (the name without its seed) and `seed` (-1 for the base)."""
    answers = {path.stem: path for path in folder.glob("*.jsonl") if not path.name.endswith(READINGS)}
    answers |= {path.parent.name: path for path in folder.glob("*/measured.json")}
    frames = []
    for whole, path in sorted(answers.items()):
        name, _, seed = whole.rpartition("-")
        frames.append(pd.DataFrame(_read(path)).assign(model=name or whole, seed=int(seed) if name else -1))
    return pd.concat(frames, ignore_index=True)


def _read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    # Not `splitlines`: an item may hold a character that Python takes for the end of a line.
    return [json.loads(line) for line in text.split("\n") if line]


__all__ = ["is_kept", "keep", "read_answers", "read_quality", "selection_file"]

if __name__ == "__main__":
    main()
