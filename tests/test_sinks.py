"""Attention sinks: their definition on hand-computed patterns, and the sample of query positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctxlens.errors import InputError
from ctxlens.models.attention.sinks import (
    LATER,
    NORM_RATIO,
    RECEIVED,
    QuerySample,
    SinkFinder,
    attention_received,
    norm_ratios,
    sample_queries,
)


def every_query(length: int) -> QuerySample:
    return QuerySample(torch.arange(length)[None], torch.ones(1, length))


def test_attention_received_by_hand():
    # Token 0 receives (1/2 + 1/2 + 1/4) / 3 from the first head, and (1 + 1 + 1) / 3 from the second.
    first = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.25, 0.25, 0], [0.25, 0.25, 0.25, 0.25]])
    second = torch.zeros(4, 4)
    second[:, 0] = 1
    received = attention_received(torch.stack([first, second])[None], every_query(4))
    expected = [(1.25 / 3 + 1) / 2, (0.5 / 2) / 2, 0.25 / 2, 0.0]
    assert received[0].tolist() == pytest.approx(expected)


def test_weights_say_how_many_positions_a_sample_stands_for():
    pattern = torch.tensor([[[[0.2, 0.8, 0.0], [0.6, 0.4, 0.0]]]])
    sample = QuerySample(torch.tensor([[1, 2]]), torch.tensor([[1.0, 3.0]]))
    received = attention_received(pattern, sample)
    assert received[0].tolist() == pytest.approx([(0.2 + 3 * 0.6) / 4, 0.4, 0.0])


def test_padding_of_the_sample_counts_for_nothing():
    pattern = torch.tensor([[[[0.2, 0.8], [0.9, 0.1]]]])
    sample = QuerySample(torch.tensor([[1, 0]]), torch.tensor([[1.0, 0.0]]))
    assert attention_received(pattern, sample)[0].tolist() == pytest.approx([0.2, 0.0])


@given(st.integers(1, 20_000), st.integers(2, 64))
def test_a_sample_is_a_partition_of_the_text_that_ends_at_its_last_token(length, samples):
    sample = sample_queries(torch.tensor([length]), samples)
    positions = sample.positions[0].tolist()
    assert positions == sorted(set(positions))
    assert len(positions) == min(length, samples)
    assert positions[-1] == length - 1
    assert positions[0] >= 0
    assert sample.weights.sum() == length
    assert (sample.weights >= 1).all()


def test_samples_lie_closer_together_towards_the_end_and_reach_the_beginning():
    positions = sample_queries(torch.tensor([4096]), 64).positions[0]
    gaps = positions.diff()
    assert positions[0] < 512
    assert gaps[-1] == 1
    assert gaps[0] == gaps.max() > 100


def test_texts_of_other_lengths_are_padded_with_weight_zero():
    sample = sample_queries(torch.tensor([3, 5]))
    assert sample.positions.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    assert sample.weights.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(("lengths", "samples"), [([0], 64), ([4], 1)])
def test_what_cannot_be_sampled_is_refused(lengths, samples):
    with pytest.raises(InputError, match="cannot sample"):
        sample_queries(torch.tensor(lengths), samples)


def test_norms_are_measured_in_medians_of_the_text_without_padding():
    hidden = torch.tensor([[[3.0, 4.0], [0, 1], [0, 2], [0, 100]]])
    is_token = torch.tensor([[True, True, True, False]])
    assert norm_ratios(hidden, is_token)[0].tolist() == pytest.approx([5 / 2, 1 / 2, 1, 0])


def finder(length: int, **options) -> SinkFinder:
    return SinkFinder(torch.ones(1, length, dtype=torch.bool), **options)


def hidden_with(length: int, place: int, norm: float):
    hidden = torch.ones(1, length, 1)
    hidden[0, place] = norm
    return hidden


def test_a_token_with_a_huge_hidden_state_that_receives_attention_is_a_sink():
    found = finder(LATER + 10)
    found.enter(hidden_with(LATER + 10, 5, NORM_RATIO))
    received = torch.zeros(1, LATER + 10)
    received[0, [5, 6]] = RECEIVED
    assert found.find(received)[0].nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize(
    ("norm", "received", "later"),
    [
        (NORM_RATIO * 0.99, RECEIVED, LATER),
        (NORM_RATIO, RECEIVED * 0.99, LATER),
        (NORM_RATIO, RECEIVED, LATER - 1),
    ],
)
def test_each_part_of_the_definition_is_needed(norm, received, later):
    length = later + 6
    found = finder(length)
    found.enter(hidden_with(length, 5, norm))
    attention = torch.zeros(1, length)
    attention[0, 5] = received
    assert not found.find(attention).any()


def test_a_candidate_stays_one_in_the_layers_above():
    found = finder(LATER + 6)
    found.enter(hidden_with(LATER + 6, 5, 100))
    found.enter(hidden_with(LATER + 6, 5, 1))
    assert found.find(torch.full((1, LATER + 6), RECEIVED))[0].nonzero().flatten().tolist() == [0, 5]


def test_the_first_token_and_bos_need_no_huge_hidden_state():
    length = LATER + 6
    is_bos = torch.zeros(1, length, dtype=torch.bool)
    is_bos[0, 3] = True
    found = finder(length, is_bos=is_bos).find(torch.full((1, length), RECEIVED))
    assert found[0].nonzero().flatten().tolist() == [0, 3]


def test_the_first_token_is_the_first_that_is_not_padding():
    is_token = torch.ones(1, LATER + 6, dtype=torch.bool)
    is_token[0, :2] = False
    found = SinkFinder(is_token).find(torch.ones(1, LATER + 6))
    assert found[0].nonzero().flatten().tolist() == [2]
