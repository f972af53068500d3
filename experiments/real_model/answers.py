"""What was measured, from the files of a run or from the answers that are kept in this repository.

A run has one file for every block and wording. `python -m experiments.real_model keep` puts a measurement
into one file of JSON Lines, which holds every answer and can be judged again. Attention is left out:
its files are large.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctxlens.files import write_atomic
from ctxlens.results import Ability, HeadMap, NeedleGrid
from experiments.real_model import design

COLUMNS = (
    "block", "wording", "heads", "alpha", "draw", "condition", "context_tokens", "case", "cell", "needle",
    "depth_percent", "prompt_tokens", "recall", "contains", "needle_logprob", "response", "error",
)  # fmt: skip
"""The columns of a grid that are kept: the others are the same in every row, or follow from `design`."""


SAME = {"model": "model", "indicator": False, "memory_recall": np.nan, "recall": np.nan, "response": np.nan}
"""Columns that are the same in every row of some grid, and are not kept there."""


def is_measured(folder: Path) -> bool:
    """Whether anything of a measurement is there, in a run or kept."""
    return _kept(folder).exists() or any(folder.glob("*.[ps]a*"))


def collect(folder: Path) -> NeedleGrid:
    """All grids of a measurement that are finished, with wording, haystack and prefix of every row."""
    if _kept(folder).exists():
        rows = [{**SAME, **row} for row in _read(_kept(folder))]
        frame = pd.DataFrame(rows).replace({None: np.nan})
    else:
        frame = _concatenate(folder)
    frame["haystack"] = [design.haystack_of(case) for case in frame["case"]]
    frame["length_of_prefix"] = frame["needle"].str.partition("/")[2]
    frame["needle"] = frame["needle"].str.partition("/")[0]
    return NeedleGrid(frame, {})


def collect_maps(folder: Path, kind: str) -> list[HeadMap]:
    """The maps of single heads, one of every text."""
    if not _kept(folder).exists():
        return [HeadMap.load(path) for path in sorted(folder.glob(f"*-{kind}.safetensors"))]
    rows = [row for row in _read(_kept(folder)) if row["kind"] == kind]
    return [HeadMap(np.array([row["effects"]]), np.zeros(1, dtype=int), kind) for row in rows]


def collect_abilities(folder: Path) -> dict[str, pd.DataFrame]:
    """The answers to questions of general knowledge by the heads that were steered."""
    if not _kept(folder).exists():
        return {path.stem: Ability.load(path).frame for path in sorted(folder.glob("*.parquet"))}
    frame = pd.DataFrame(_read(_kept(folder)))
    return {str(heads): rows.reset_index(drop=True) for heads, rows in frame.groupby("heads")}


def keep(folder: Path, to: Path, names: Iterable[str]) -> list[Path]:
    """Write the measurements of a run that are there, one file each; returns the files."""
    rows = {"maps": _rows_of_maps, "cost": _rows_of_abilities}
    written = []
    for name in names:
        if name == "attention" or not is_measured(folder / name):
            continue
        lines = [json.dumps(row, ensure_ascii=False) for row in rows.get(name, _rows_of_grid)(folder / name)]
        written.append(_kept(to / name))
        write_atomic(written[-1], "\n".join(lines) + "\n")
    return written


def _kept(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.jsonl")


def _read(path: Path) -> list[dict[str, Any]]:
    # Not `splitlines`: an answer may hold a character that Python takes for the end of a line.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _concatenate(folder: Path) -> pd.DataFrame:
    frames = [
        NeedleGrid.load(path).frame.assign(wording=path.stem.partition("-")[2], block=int(path.stem[0]))
        for path in sorted(folder.glob("*-*.parquet"))
    ]
    return pd.concat(frames, ignore_index=True)


def _rows_of_grid(folder: Path) -> Iterator[Mapping[str, Any]]:
    frame = _concatenate(folder)
    columns = [name for name in COLUMNS if name in frame and frame[name].notna().any()]
    for row in frame[columns].to_dict("records"):
        yield {str(name): _plain(value) for name, value in row.items()}


def _rows_of_maps(folder: Path) -> Iterator[Mapping[str, Any]]:
    for path in sorted(folder.glob("*.safetensors")):
        found = HeadMap.load(path)
        for effects in found.effects:
            yield {"text": path.stem, "kind": found.kind, "effects": np.round(effects, 8).tolist()}


def _rows_of_abilities(folder: Path) -> Iterator[Mapping[str, Any]]:
    for heads, frame in collect_abilities(folder).items():
        for row in frame[["question", "response", "recall"]].to_dict("records"):
            yield {"heads": heads, **{str(name): _plain(value) for name, value in row.items()}}


def _plain(value: Any) -> Any:
    """A value of a table for JSON: NaN as null, numbers short."""
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 5)
    return value
