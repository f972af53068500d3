"""Steering and role shares as plain arithmetic."""

import inspect
import math

import numpy as np
import pytest
import torch

from ctxlens.allocation import compute_role_shares, find_queries, renormalise_shares, retrieval_heads
from ctxlens.errors import InputError
from ctxlens.roles import Role
from ctxlens.steering import Steering, as_heads, parse_heads, parse_roles

BOS, USER, ASSISTANT, TEMPLATE, INDICATOR = 0, 2, 3, 5, 6


class TestKeyBias:
    # Two rows of five keys, the second left-padded; three prompt keys in the first, four in the second.
    roles = torch.tensor([[BOS, USER, TEMPLATE, ASSISTANT, ASSISTANT], [-1, BOS, INDICATOR, USER, ASSISTANT]])
    prompt = torch.tensor([3, 4])

    @pytest.mark.parametrize(
        ("steering", "weakened"),
        [
            (Steering(0.5), [[1, 0, 1, 1, 1], [0, 1, 0, 0, 1]]),
            (Steering(0.5, roles=(Role.USER,)), [[1, 0, 1, 1, 1], [0, 1, 1, 0, 1]]),
            (Steering(0.5, mode="prompt-only"), [[1, 0, 1, 0, 0], [0, 1, 0, 0, 0]]),
            (Steering(0.5, mode="compounding"), [[1, 0, 1, 0, 0], [0, 1, 0, 0, 0]]),
            (Steering(1.0), [[0] * 5, [0] * 5]),
        ],
    )
    def test_log_alpha_where_weakened(self, steering, weakened):
        bias = steering.key_bias(self.roles, self.prompt)
        torch.testing.assert_close(bias, torch.tensor(weakened) * math.log(steering.alpha))


class TestHeadSelect:
    def test_all(self):
        assert Steering(0.5).head_select(3, 2).tolist() == [1, 1]

    def test_pairs(self):
        steering = Steering(0.5, heads=((1, 2), (3, 0)))
        assert [steering.head_select(layer, 3).tolist() for layer in (0, 1, 3)] == [
            [0] * 3,
            [0, 0, 1],
            [1, 0, 0],
        ]
        assert [steering.touches(layer) for layer in range(4)] == [False, True, False, True]

    def test_compounding_weighs_by_layer(self):
        assert Steering(0.5, mode="compounding").head_select(2, 2).tolist() == [3, 3]


@pytest.mark.parametrize("alpha", [0, 0.0, -0.5, 1.1, math.nan, True])
def test_alpha_outside_is_refused(alpha):
    with pytest.raises(InputError, match=r"alpha must be in \(0, 1\]"):
        Steering(alpha)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "loud"}, "unknown steering mode 'loud'; choose one of paper, prompt-only, compounding"),
        ({"roles": ()}, "at least one target role"),
    ],
)
def test_malformed_steering_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        Steering(0.5, **options)


@pytest.mark.parametrize("head", [(4, 0), (0, 2), (-1, 0)])
def test_heads_out_of_range_name_the_models_shape(head):
    with pytest.raises(InputError, match=r"layers 0 to 3 with heads 0 to 1"):
        Steering(0.5, heads=(head,)).check_heads(4, 2)


def test_parse_heads():
    assert parse_heads("all") == "all"
    assert parse_heads("retrieval") == "retrieval"
    assert parse_heads("1.2, 3.0") == ((1, 2), (3, 0))
    with pytest.raises(InputError, match=r"heads '1:2' cannot be read"):
        parse_heads("3.0,1:2")


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ("retrieval", "retrieval heads depend on a model"),
        ([1, 2], "heads must be 'all' or pairs"),
        (None, "heads"),
    ],
)
def test_malformed_heads_are_refused(heads, words):
    with pytest.raises(InputError, match=words):
        as_heads(heads)


def test_heads_in_any_form():
    assert as_heads("all") == "all"
    assert as_heads("1.2,1.2,0.3") == as_heads([(1, 2), [0, 3]]) == ((1, 2), (0, 3))


def test_parse_roles():
    assert parse_roles("user, indicator") == (Role.USER, Role.INDICATOR)
    assert parse_roles(Role.SYSTEM) == (Role.SYSTEM,)
    assert parse_roles(["user", Role.TOOL]) == (Role.USER, Role.TOOL)
    with pytest.raises(InputError, match="somebody"):
        parse_roles("somebody")


class TestShares:
    def test_sum_by_role(self):
        pattern = torch.tensor([[[[0.1, 0.2, 0.3, 0.4]]]])
        shares = compute_role_shares(pattern, torch.tensor([[BOS, USER, USER, -1]]), 4)
        assert shares.flatten().tolist() == pytest.approx([0.1, 0, 0.5, 0])

    def test_shapes_are_named(self):
        with pytest.raises(InputError, match=r"\(1, 1, 1, 4\) and role_ids \(1, 3\)"):
            inspect.unwrap(compute_role_shares)(
                torch.zeros(1, 1, 1, 4), torch.zeros(1, 3, dtype=torch.long), 4
            )

    def test_renormalised_without_template(self):
        shares = torch.zeros(9)
        shares[[BOS, USER, ASSISTANT, TEMPLATE]] = torch.tensor([0.1, 0.3, 0.1, 0.5])
        kept = renormalise_shares(shares)
        assert kept[[BOS, USER, ASSISTANT, TEMPLATE]].tolist() == pytest.approx([0.2, 0.6, 0.2, 0])

    def test_retrieval_head_has_most_user_attention(self):
        shares = torch.zeros(2, 3, 9)
        shares[:, :, USER] = torch.tensor([[0.1, 0.5, 0.2], [0.3, 0.1, 0.2]])
        assert retrieval_heads(shares).tolist() == [1, 0]


class TestQueries:
    def chat(self):
        from tiny_models import make_chat

        return make_chat(10, 1, prompt=6)

    @pytest.mark.parametrize(
        ("queries", "positions"),
        [("first_answer", [5]), ("response_mean", [6, 7, 8, 9]), ("all", list(range(10))), ([3, 1], [3, 1])],
    )
    def test_positions(self, queries, positions):
        assert find_queries(self.chat(), queries, 3) == positions

    @pytest.mark.parametrize("queries", ["some", [10], [-1], []])
    def test_bad_ones_are_refused(self, queries):
        with pytest.raises(InputError, match=r"queries|query position"):
            find_queries(self.chat(), queries, None)

    def test_numpy_positions(self):
        assert find_queries(self.chat(), np.array([2, 3]).tolist(), None) == [2, 3]
