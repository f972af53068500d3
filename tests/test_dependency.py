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


def test_the_released_codes_score_is_never_below_the_papers_text():
    drawn = torch.rand(3, 4, 7, generator=torch.Generator().manual_seed(0))
    shares = torch.zeros(*drawn.shape, N_ROLES)
    shares[..., Role.USER], shares[..., Role.TEMPLATE] = drawn, 1 - drawn
    found = reduce_turns(shares, torch.tensor([[0, 0, 0, 1, 1, -1, 2]] * 3), 3)
    best_of_mean, mean_of_best = found[..., 0], found[..., 1]
    assert (mean_of_best >= best_of_mean - 7 * torch.finfo(torch.float32).eps).all()
    assert torch.equal(mean_of_best[:, 2], best_of_mean[:, 2]), "a turn of one token has one score"


def test_conversations_of_a_batch_have_turns_of_their_own():
    user = torch.tensor([[[0.25, 0.75]], [[0.5, 1.0]]])
    shares = torch.zeros(2, 1, 2, N_ROLES)
    shares[..., Role.USER] = user
    found = by_name(reduce_turns(shares, torch.tensor([[0, 1], [1, 1]]), 2))
    assert found["mean_of_best"] == [[0.25, 0.75], [0.0, 0.75]]
    assert found["share_user"] == [[0.25, 0.75], [0.0, 0.75]]


def test_infinite_attention_and_a_single_broken_head_spoil_the_turn():
    for bad in (torch.inf, -torch.inf, torch.nan):
        shares = shares_of([[0.25, 0.5], [0.5, 0.25]])
        shares[0, 1, 0, Role.USER] = bad  # one of two heads, one of two roles
        found = reduce_turns(shares, torch.tensor([[0, 1]]), 2)
        assert found[0, 0].isnan().all()
        assert found[0, 1].tolist()[:3] == [0.5, 0.5, 0.0]


def test_broken_padding_spoils_nothing():
    shares = shares_of([[0.25, 0.5]])
    shares[0, 0, 1] = torch.nan
    assert reduce_turns(shares, torch.tensor([[0, -1]]), 1)[0, 0, :2].tolist() == [0.25, 0.25]


def test_of_heads_with_equal_means_the_first_is_best():
    assert by_name(reduce_turns(shares_of([[0.5], [0.5]]), torch.tensor([[0]]), 1))["best_head"] == [[0.0]]


def test_the_token_itself_counts_in_the_uniform_share():
    assert uniform_share(np.array([True]), np.array([0])) == 1.0
    assert uniform_share(np.array([True, False]), np.array([1])) == 0.5
