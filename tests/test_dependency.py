"""The context-dependency measure: reductions by hand, and against the explicit pattern of a real model."""

import numpy as np
import pytest
import torch

from ctxlens.chat.roles import N_ROLES, Role
from ctxlens.scoring.measure import VALUES, reduce_turns, uniform_share


def shares_of(user):
    """Role shares `[1, head, query, role]` with these user shares; the rest is the template's."""
    user = torch.tensor(user)[None]
    shares = torch.zeros(*user.shape, N_ROLES)
    shares[..., Role.USER] = user
    shares[..., Role.TEMPLATE] = 1 - user
    return shares


def by_name(values):
    return {name: values[..., at].tolist() for at, name in enumerate(VALUES)}


def test_reductions_by_hand():
    # Two heads, two response tokens: means .5 and .45; best per token .7 and .8.
    values = reduce_turns(shares_of([[0.2, 0.8], [0.7, 0.2]]), torch.tensor([[0, 0]]), 1)
    found = {name: value[0][0] for name, value in by_name(values).items()}
    assert found["best_of_mean"] == pytest.approx(0.5)
    assert found["best_head"] == 0
    assert found["mean_of_best"] == pytest.approx(0.75)
    assert found["share_user"] == pytest.approx(0.475)
    assert found["share_template"] == pytest.approx(0.525)
    assert sum(found[name] for name in VALUES if name.startswith("share_")) == pytest.approx(1)


def test_turns_and_padding_are_kept_apart():
    # Tokens 0 and 1 are the first turn's, 2 the second's, 3 padding.
    user = [[0.2, 0.4, 0.9, 1.0], [0.6, 0.1, 0.3, 1.0]]
    values = reduce_turns(shares_of(user), torch.tensor([[0, 0, 1, -1]]), 3)
    found = by_name(values)
    assert found["best_of_mean"][0] == pytest.approx([0.35, 0.9, 0])
    assert found["mean_of_best"][0] == pytest.approx([0.5, 0.9, 0])
    assert found["best_head"][0][:2] == [1, 0]
    assert found["share_user"][0] == pytest.approx([0.325, 0.6, 0])


def test_attention_that_is_not_a_number_stays_in_its_turn():
    shares = shares_of([[0.2, 0.4, 0.9]])
    shares[0, 0, 2, Role.BOS] = torch.nan
    values = reduce_turns(shares, torch.tensor([[0, 0, 1]]), 2)
    assert values[0, 0].isfinite().all()
    assert values[0, 1].isnan().all()


def test_uniform_share_by_hand():
    # Tokens: bos user user template answer answer. Answers see 2 of 5 and 2 of 6.
    is_user = np.array([False, True, True, False, False, False])
    assert uniform_share(is_user, np.array([4, 5])) == pytest.approx((2 / 5 + 2 / 6) / 2)
