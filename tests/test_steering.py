"""Steering and role shares as plain arithmetic."""

import inspect
import math

import numpy as np
import pytest
import torch
from numerics import assert_close, near

from ctxlens.chat.condition import Condition
from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.errors import InputError
from ctxlens.models.attention.shares import compute_role_shares, renormalise_shares, retrieval_heads
from ctxlens.models.attention.steering import (
    Steering,
    as_heads,
    emphasise,
    parse_heads,
    parse_roles,
    steering_of,
    weigh_targets,
)
from ctxlens.models.queries import find_queries

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
        assert_close(bias, torch.tensor(weakened) * math.log(steering.alpha))

    def test_a_target_share_marks_the_targets(self):
        bias = Steering(target_share=0.5).key_bias(self.roles, self.prompt)
        assert bias.tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 1, 0]]

    @pytest.mark.parametrize(
        ("steering", "biased"),
        [
            (Steering(0.5, emphasised=True), [1, 1, 0, 1]),
            (Steering(target_share=0.5, emphasised=True), [0, 0, 1, 0]),
        ],
    )
    def test_emphasised_tokens_take_the_roles_place(self, steering, biased):
        roles, marks = (
            torch.tensor([[USER, USER, TEMPLATE, ASSISTANT, -1]]),
            torch.zeros(1, 5, dtype=torch.bool),
        )
        marks[0, 2] = True
        bias = steering.key_bias(roles, torch.tensor([4]), marks)
        assert_close(bias, torch.tensor([[*biased, 0]]) * (math.log(steering.alpha or math.e)))

    def test_without_marks_nothing_is_emphasised(self):
        bias = Steering(0.5, emphasised=True).key_bias(torch.tensor([[USER, -1]]), torch.tensor([1]))
        assert_close(bias, torch.tensor([[math.log(0.5), 0.0]]))

    @pytest.mark.parametrize(
        ("steering", "nothing"),
        [
            (Steering(1.0), True),
            (Steering(1), True),
            (Steering(0.5, heads=()), True),
            (Steering(0.999), False),
            (Steering(target_share=0.5), False),
            (Steering(1.0, heads=((0, 0),)), True),
        ],
    )
    def test_what_changes_nothing(self, steering, nothing):
        assert steering.changes_nothing is nothing
        assert steering.touches(0) is not nothing

    def test_heads_must_exist_in_the_model(self):
        Steering(0.5).check_heads(1, 1)
        Steering(0.5, heads=((0, 0), (1, 2))).check_heads(2, 3)
        for head in ((2, 0), (0, 3)):
            with pytest.raises(
                InputError, match=rf"head {head[0]}.{head[1]} does not exist: .* 0 to 1 .* 0 to 2"
            ):
                Steering(0.5, heads=(head,)).check_heads(2, 3)


class TestTargetShares:
    """Shares by head and query: what goes to others, to targets, and to the sink if there is one."""

    def weights(self, shares, steerings, select):
        asked = []

        def read_shares(kinds, weights):
            asked.append((kinds.tolist(), weights[..., 0].flatten().tolist()))
            return shares

        bias = torch.stack([torch.tensor([[0.0, 1.0, 1.0]])] * len(steerings), -1)
        return weigh_targets(steerings, bias, select, read_shares), asked

    def test_by_hand(self):
        # To move 1/5 to 1/2, the targets' odds of 1/4 must become 1: times 4. From 3/4 to 1/2: divide by 3.
        # A query that sees only targets, or none, is left alone; so is a head that is not chosen.
        shares = torch.tensor([[[[0.8, 0.2], [0.25, 0.75]], [[0.0, 1.0], [1.0, 0.0]]]])
        select = torch.ones(1, 2, 1, 1)
        weights, asked = self.weights(shares, [Steering(target_share=0.5)], select)
        assert weights[0, :, :, 0].exp().flatten().tolist() == near([4, 1 / 3, 1, 1])
        assert asked == [([[0, 1, 1]], [0, 0])]
        select[0, 0] = 0
        shares[0, 1] = shares[0, 0]
        weights, _ = self.weights(shares, [Steering(target_share=0.8)], select)
        assert weights[0, :, :, 0].exp().flatten().tolist() == near([1, 1, 16, 4 / 3])

    def test_the_sink_is_something_else(self):
        # Targets 0.2, others 0.3, sink 0.5: to reach 0.5 the targets' odds 1/4 must become 1.
        shares = torch.tensor([[[[0.3, 0.2, 0.5]]]])
        weights, _ = self.weights(shares, [Steering(target_share=0.5)], torch.ones(1, 1, 1, 1))
        assert weights.exp().item() == near(4)

    def test_alphas_come_first(self):
        shares = torch.tensor([[[[0.8, 0.2]]]])
        select = torch.tensor([3.0, 1.0]).reshape(1, 1, 1, 2)
        weights, asked = self.weights(shares, [Steering(0.5), Steering(target_share=0.5)], select)
        assert asked == [([[0, 1, 1]], [3.0])]
        assert weights[0, 0, 0, 0].item() == 3
        assert weights[0, 0, 0, 1].exp().item() == near(4)

    def test_without_one_nothing_is_read(self):
        select = torch.ones(1, 2, 1, 1)
        weights, asked = self.weights(torch.zeros(1, 2, 2, 2), [Steering(0.5)], select)
        assert weights is select
        assert asked == []

    def test_gradients_are_finite_at_the_edges(self):
        shares = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]], requires_grad=True)
        weights, _ = self.weights(shares, [Steering(target_share=0.6)], torch.ones(1, 1, 1, 1))
        weights.sum().backward()
        assert shares.grad is not None
        assert shares.grad.flatten().tolist() == near([0, 0, 2, -2])


class TestEmphasise:
    #        0         1         2
    #        0123456789012345678901234
    text = "<u> the cat, the dog <a> o"
    spans = ((0, 3), (3, 7), (7, 11), (11, 12), (12, 16), (16, 20), (20, 24), (24, 26))
    turns = (-1, 0, 0, 0, 0, 0, -1, 1)

    def chat(self):
        roles = [TEMPLATE if turn < 0 else USER if turn == 0 else ASSISTANT for turn in self.turns]
        return RenderedChat(
            self.text,
            np.arange(8),
            np.array(roles, dtype=np.int8),
            np.array(self.turns, dtype=np.int32),
            np.array(self.spans, dtype=np.int32),
            (),
            True,
            {},
        )

    @pytest.mark.parametrize(
        ("places", "turns", "tokens"),
        [
            (["the"], [], [1, 4]),
            (["cat, the"], [], [2, 3, 4]),
            ([(8, 11)], [], [2]),
            ([(7, 13)], [], [2, 3]),  # white space at the end is no part of the place
            ([(9, 10), "dog"], [], [2, 5]),
            ([], [1], [7]),
            ([], [0], [1, 2, 3, 4, 5]),
            ([(0, 2)], [1], [0, 7]),
            ([(0, 26)], [], [0, 1, 2, 3, 4, 5, 6, 7]),  # the whole text
        ],
    )
    def test_tokens_that_are_marked(self, places, turns, tokens):
        chat = self.chat()
        marked = emphasise(chat, *places, turns=turns)
        assert marked.emphasised is not None
        assert np.flatnonzero(marked.emphasised).tolist() == tokens
        assert chat.emphasised is None

    def test_marks_add_up(self):
        marked = emphasise(emphasise(self.chat(), "cat"), "dog")
        assert marked.emphasised is not None
        assert np.flatnonzero(marked.emphasised).tolist() == [2, 5]

    @pytest.mark.parametrize(
        ("places", "turns", "words"),
        [
            (["bird"], [], "'bird' holds no token"),
            (["<u>"], [], "'<u>' holds no token"),  # nobody said it: the template did
            ([""], [], "'' holds no token"),
            ([(3, 4)], [], r"\(3, 4\) holds no token"),
            ([(5, 99)], [], r"\(5, 99\) holds no token"),
            ([], [2], "turn 2 has no token"),
            ([], [-1], "turn -1 has no token"),
        ],
    )
    def test_places_without_tokens_are_refused(self, places, turns, words):
        with pytest.raises(InputError, match=words):
            emphasise(self.chat(), *places, turns=turns)


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
        ({"target_share": 0.5}, "either alpha or a target share, not both"),
        ({"alpha": None}, "either alpha or a target share, not neither"),
        ({"mode": "target-share"}, "mode 'target-share' does not go with alpha"),
        (
            {"alpha": None, "target_share": 0.5, "mode": "paper"},
            "mode 'paper' does not go with a target share",
        ),
        ({"alpha": None, "target_share": 1.0}, r"target share must be in \(0, 1\), got 1.0"),
        ({"alpha": None, "target_share": math.nan}, r"target share must be in \(0, 1\), got nan"),
    ],
)
def test_malformed_steering_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        Steering(**{"alpha": 0.5, **options})


def test_what_a_result_keeps():
    assert Steering(0.5, heads=((1, 2),)).describe() == {
        "alpha": 0.5, "roles": ["user", "indicator"], "heads": ["1.2"], "mode": "paper",
    }  # fmt: skip
    assert Steering(target_share=0.6, emphasised=True).describe() == {
        "target_share": 0.6, "roles": ["emphasised"], "heads": "all", "mode": "target-share",
    }  # fmt: skip


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


@pytest.mark.parametrize(
    ("words", "steering"),
    [
        ("template+indicator", None),
        ("template+steered:0.5", Steering(0.5)),
        ("plain+steered:0.5:1.2/3.0", Steering(0.5, heads=((1, 2), (3, 0)))),
        ("template+steered:share=0.6:1.10/", Steering(target_share=0.6, heads=((1, 10),))),
    ],
)
def test_the_steering_of_a_condition(words, steering):
    assert steering_of(Condition.parse(words)) == steering


@pytest.mark.parametrize(
    ("heads", "words"), [("retrieval", "retrieval heads depend on a model"), ("1.x", "'1.x' cannot be read")]
)
def test_heads_of_a_condition_that_steering_cannot_take(heads, words):
    with pytest.raises(InputError, match=words):
        steering_of(Condition(alpha=0.5, heads=heads))


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
        assert shares.flatten().tolist() == near([0.1, 0, 0.5, 0])

    def test_shapes_are_named(self):
        with pytest.raises(InputError, match=r"\(1, 1, 1, 4\) and role_ids \(1, 3\)"):
            inspect.unwrap(compute_role_shares)(
                torch.zeros(1, 1, 1, 4), torch.zeros(1, 3, dtype=torch.long), 4
            )
        with pytest.raises(InputError, match=r"\(1, 2, 1, 4\) and role_ids \(2, 4\)"):
            inspect.unwrap(compute_role_shares)(
                torch.zeros(1, 2, 1, 4), torch.zeros(2, 4, dtype=torch.long), 4
            )

    def test_renormalised_without_template(self):
        shares = torch.zeros(9)
        shares[[BOS, USER, ASSISTANT, TEMPLATE]] = torch.tensor([0.1, 0.3, 0.1, 0.5])
        kept = renormalise_shares(shares)
        assert kept[[BOS, USER, ASSISTANT, TEMPLATE]].tolist() == near([0.2, 0.6, 0.2, 0])
        two = renormalise_shares(torch.stack([shares, 2 * shares]))  # every row by its own sum
        assert two[1].tolist() == two[0].tolist() == near(kept.tolist())

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
