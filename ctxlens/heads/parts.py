"""Arrays stored as finished parts of a head experiment."""

from __future__ import annotations

import json

import numpy as np

from ctxlens.runs import PartFormat

ARRAY_PARTS = PartFormat(
    ".json",
    lambda array, path: path.write_text(json.dumps(array.tolist()), encoding="utf-8"),
    lambda path: np.array(json.loads(path.read_text(encoding="utf-8")), dtype=float),
)
"""Parts that are arrays of floats, as nested lists in JSON (NaN stays NaN)."""


__all__ = ["ARRAY_PARTS"]
