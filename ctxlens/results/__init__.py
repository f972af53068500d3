"""What the studies return: frozen results with labelled axes, each saved to one file and loaded from it.

Tables (`NeedleGrid`, `Ability`, `Evaluation`, `Ratings`, `Scores`, `Selection`, `HeadCurves`) are Parquet
files, arrays (`RoleAllocation`, `TokenView`, `HeadMap`, `Drift`) are safetensors files, claims (`Verdicts`)
are JSON; every file carries its `meta` (model, condition, seed, settings) inside. Figures and reports
are drawn from these files, and from answers and judgments in FastChat's layout (`Dialogues`), alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from ctxlens.errors import InputError
from ctxlens.results.arrays import RoleAllocation, TokenView
from ctxlens.results.checkpoints import Checkpoints
from ctxlens.results.drift import VIEWS, Drift
from ctxlens.results.evaluation import Evaluation
from ctxlens.results.fastchat import Dialogues
from ctxlens.results.files import check_record, read_file, read_parquet_record, read_safetensors_record
from ctxlens.results.heads import HeadCurves, HeadMap, correlate_maps
from ctxlens.results.ratings import Ratings
from ctxlens.results.scores import Scores
from ctxlens.results.tables import Ability, NeedleGrid, Selection
from ctxlens.results.verdicts import Verdict, Verdicts

Result = (
    NeedleGrid
    | Ability
    | Scores
    | Selection
    | RoleAllocation
    | TokenView
    | Verdicts
    | HeadMap
    | HeadCurves
    | Drift
    | Ratings
    | Evaluation
    | Checkpoints
)
_TYPES = {cls.__name__: cls for cls in get_args(Result)}


def load_result(path: str | Path) -> Result:
    """Read any result file; the file itself says which type of result it holds.

    Raises:
        InputError: the file does not exist or is not a ctxlens result.
    """
    suffix = Path(path).suffix
    if suffix == ".parquet":
        raw = read_parquet_record(path)
    elif suffix == ".safetensors":
        raw = read_safetensors_record(path)
    else:
        raw = read_file(path, Path.read_bytes)
    name = check_record(path, raw)["type"]
    if name not in _TYPES:
        raise InputError(f"{path} has the type {name}, which is not a type of ctxlens results.")
    return _TYPES[name].load(path)


__all__ = [
    "VIEWS", "Ability", "Checkpoints", "Dialogues", "Drift", "Evaluation", "HeadCurves", "HeadMap",
    "NeedleGrid", "Ratings", "Result", "RoleAllocation", "Scores", "Selection", "TokenView", "Verdict",
    "Verdicts", "correlate_maps", "load_result",
]  # fmt: skip
