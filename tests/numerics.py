"""How far two computations of the same numbers may differ, from dtype, magnitude and number of terms.

A result of size `magnitude` that sums `n_terms` rounded terms differs between CPUs by about
`eps * magnitude * sqrt(n_terms)`. Tests allow `ROOM` times as much. A tolerance that would hide an error of
`FAULT` of the magnitude is refused, so that every comparison made here can fail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

ROOM = 10
"""Room for other CPUs: other kernels, other orders of summation."""
FAULT = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""By dtype, the error relative to the magnitude that every comparison must catch."""

ATTENTION_TERMS = 64
"""One attention call on small tensors: about as many products go into one output."""
MODEL_TERMS = 400
"""A tiny model of three layers: widths of hidden states and feed-forward, and keys, layer by layer."""


def tolerance(dtype: torch.dtype, magnitude: float = 1.0, n_terms: int = 1, *, room: float = ROOM) -> float:
    """The largest difference that rounding may cause."""
    return room * torch.finfo(dtype).eps * magnitude * math.sqrt(n_terms)


def assert_close(
    got: Any,
    want: Any,
    *,
    n_terms: int = ATTENTION_TERMS,
    magnitude: float | None = None,
    dtype: torch.dtype | None = None,
    room: float = ROOM,
) -> None:
    """Fail unless two tensors or arrays are equal up to rounding.

    Args:
        got: what was computed.
        want: what it must be; a float stands for all numbers.
        n_terms: how many terms one number sums up.
        magnitude: the size of the numbers; by default the largest of `want`.
        dtype: the dtype of the computation; by default the coarser of both.
        room: how many times the expected rounding error is allowed.
    """
    got = torch.as_tensor(got).detach().cpu()
    want = torch.full_like(got, want) if isinstance(want, float) else torch.as_tensor(want).detach().cpu()
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if dtype is None:
        dtype = max((x.dtype for x in (got, want)), key=lambda d: torch.finfo(d).eps)
    if magnitude is None:
        magnitude = float(want.abs().max()) if want.numel() else 1.0
    allowed = tolerance(dtype, magnitude, n_terms, room=room)
    assert allowed <= FAULT[dtype] * magnitude, f"a tolerance of {allowed:.1e} would hide a real fault"
    difference = (got.double() - want.double()).abs()
    worst = float(difference.nan_to_num(math.inf).max()) if want.numel() else 0.0
    assert worst <= allowed, f"largest difference {worst:.2e}, allowed {allowed:.2e}"


def near(expected: float | Sequence[float], n_terms: int = 4) -> Any:
    """What hand-computed float32 numbers are compared with by `==`."""
    largest = float(np.abs(np.asarray(expected, dtype=np.float64)).max())
    return pytest.approx(expected, rel=0, abs=tolerance(torch.float32, largest, n_terms))
