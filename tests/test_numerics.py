"""The tests' own tolerances: they leave room for rounding and catch planted errors."""

import math

import pytest
import torch
from numerics import FAULT, MODEL_TERMS, ROOM, assert_close, near, tolerance


def test_by_hand():
    # float32: eps = 2^-23; ten times eps, times 3, times the root of 16.
    assert tolerance(torch.float32, 3.0, 16) == 10 * 2**-23 * 3 * 4
    assert tolerance(torch.bfloat16, room=2) == 2 * 2**-7
    assert ROOM == 10


@pytest.mark.parametrize("dtype", FAULT)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 9.0, 1e4])
def test_rounding_passes_and_a_planted_error_is_caught(dtype, magnitude):
    want = (magnitude * torch.linspace(-1, 1, 9, dtype=torch.float64)).to(dtype)
    rounded = (want.double() * (1 + torch.finfo(dtype).eps)).to(dtype)
    options = {"n_terms": MODEL_TERMS, "room": ROOM if torch.finfo(dtype).eps < 1e-4 else 0.5}
    assert_close(rounded, want, **options)
    planted = want.double().clone()
    planted[4] += 1.01 * FAULT[dtype] * magnitude
    with pytest.raises(AssertionError, match="largest difference"):
        assert_close(planted, want, **options)


def test_what_is_no_number_or_has_another_shape_is_caught():
    with pytest.raises(AssertionError, match="largest difference inf"):
        assert_close(torch.tensor([math.nan]), torch.ones(1))
    with pytest.raises(AssertionError, match=r"shape \(2,\), expected \(1,\)"):
        assert_close(torch.ones(2), torch.ones(1))


def test_a_tolerance_that_hides_faults_is_refused():
    with pytest.raises(AssertionError, match="would hide a real fault"):
        assert_close(torch.ones(1), torch.ones(1), n_terms=10**9)


def test_hand_computed_numbers():
    assert torch.tensor([0.1, 0.7]).tolist() == near([0.1, 0.7])
    assert near(0.7) != 0.70001
    assert near([0.1, 0.7]) != [0.1, 0.70001]
