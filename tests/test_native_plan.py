"""What a call of a layer's attention has to do, and what layers and steps share, by hand."""

import pytest
import torch
from numerics import near
from tiny_models import make_chat

from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.batch import HeadWeights, RunningKeys, TokenBatch
from ctxlens.models.backends.native.attending import Attending, ForwardPass, add_to_mask
from ctxlens.models.backends.native.plan import PLAIN, Plan, plan_call

BATCH = TokenBatch.from_chats([make_chat(4, 1)], pad_id=0, side="right")
ALPHA, SHARE = Steering(0.5, heads=((1, 0),)), Steering(target_share=0.5, heads=((1, 0),))


def plan(layer, n_queries=9, *, steerings=(), layers=(), keep="shares", stop=False, causal=True, terms=False):
    attending = Attending(RunningKeys(BATCH, tuple(steerings)), frozenset(layers), None, keep, stop)
    return plan_call(attending, layer, n_queries, is_causal=causal, has_terms=terms)


def test_outside_of_attend_only_terms_need_our_call():
    assert plan_call(None, 0, 9, is_causal=True, has_terms=False) == PLAIN == Plan("plain")
    assert plan_call(None, 0, 9, is_causal=True, has_terms=True) == Plan("tiled")


def test_a_layer_that_is_neither_read_nor_steered_stays_plain():
    assert plan(0, steerings=[ALPHA], layers=[1]) == PLAIN
    assert plan(0, terms=True) == Plan("tiled")


def test_masked_groups_of_heads_need_our_call_so_that_keys_are_not_copied():
    options = {"is_causal": False, "has_terms": False, "copies_keys": True}
    assert plan_call(Attending(RunningKeys(BATCH)), 0, 1, **options) == Plan("fused", "not", "nothing")
    assert plan_call(None, 0, 1, **options) == PLAIN


@pytest.mark.parametrize(
    ("options", "steered"),
    [
        ({}, "columns"),
        ({"n_queries": 8}, "columns"),  # causality instead of a mask
        ({"n_queries": 8, "causal": False}, "ready mask"),
        ({"n_queries": 9, "causal": False}, "columns"),
        ({"n_queries": 1, "causal": False, "terms": True}, "columns"),
        ({"n_queries": 1, "causal": False, "layers": [1]}, "columns"),
    ],
)
def test_how_a_steering_enters(options, steered):
    assert plan(1, steerings=[ALPHA], **options).steered == steered
    of_shares = plan(1, steerings=[ALPHA, SHARE], **options).steered
    assert of_shares == ("mask" if steered == "ready mask" else steered)


def test_what_is_kept_and_where_the_pass_ends():
    assert plan(1, layers=[1, 2], stop=True) == Plan("fused", "not", "shares", stops=False)
    assert plan(2, layers=[1, 2], stop=True) == Plan("fused", "not", "shares", stops=True)
    assert plan(2, layers=[1, 2], keep="pattern", terms=True) == Plan("tiled", "not", "pattern", stops=False)


def test_masks_and_biases_are_added():
    bias = torch.tensor([-1.0, -2.0])
    lowest = torch.finfo(torch.float32).min
    assert add_to_mask(bias, torch.tensor([True, False])).tolist() == [-1, lowest]
    assert add_to_mask(bias, torch.tensor([0.5, lowest])).tolist() == [-0.5, lowest]


def test_layers_of_one_pass_share_what_is_made_of_a_mask():
    mask, other, made = torch.zeros(2), torch.zeros(2), []
    one, two = (HeadWeights(torch.ones(1, 1, 1, 1), (weight,)) for weight in (1.0, 2.0))

    def make():
        made.append(torch.full((1,), len(made)))
        return made[-1]

    current = ForwardPass()
    asked = [(mask, one), (mask, one), (other, one), (mask, two), (other, one), (mask, one)]
    assert [int(current.combine(*pair, make)) for pair in asked] == [0, 0, 1, 2, 1, 0]
    attending = Attending(RunningKeys(BATCH))
    before = attending.current
    attending.start_pass(7)
    assert attending.current is not before
    assert attending.keys.seen == 7


def test_step_masks_follow_weights_growth_and_dropped_rows():
    roles = torch.tensor([[2, 3], [3, 2]])
    batch = TokenBatch(roles, roles, torch.ones_like(roles), torch.tensor([2, 2]))
    keys = RunningKeys(batch, (Steering(0.5),))
    halved = float(torch.tensor(0.5).log())

    def bias(numbers, n_keys, n_rows=2):
        weights = HeadWeights(torch.tensor(numbers).reshape(1, -1, 1, 1), tuple(numbers))
        return keys.score_bias(weights, n_keys, n_rows, torch.float32, torch.device("cpu"))

    keys.seen = 3
    first = bias([1.0, 1.0], 3)
    assert first.shape == (2, 1, 1, 3)  # heads that are steered alike share one row
    assert first[:, 0, 0].tolist() == [near([0, halved, halved]), near([halved, 0, halved])]
    assert bias([1.0, 1.0], 3).data_ptr() == first.data_ptr()
    assert bias([1.0, 0.0], 3)[0, :, 0].tolist() == [near([0, halved, halved]), [0, 0, 0]]
    assert bias([1.0, 1.0], 3, n_rows=4)[1, 0, 0].tolist() == near([0, halved, halved])  # beams of one row
    keys.seen = 4
    assert bias([1.0, 1.0], 2)[0, 0, 0].tolist() == near([halved, halved])  # a window keeps the last keys
    keys.keep(torch.tensor([1]))
    assert bias([1.0, 1.0], 3, n_rows=1)[:, 0, 0].tolist() == [near([0, halved, halved])]
    assert bias([1.0, 1.0], 400, n_rows=1).shape[-1] == 400
