"""Which turns are chosen: the rules by hand, bins of length, and data that were not scored."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlens.chat.data import Conversation, fingerprint_conversations
from ctxlens.errors import InputError
from ctxlens.results import Scores
from ctxlens.scoring.lengths import length_bins
from ctxlens.scoring.selection import (
    DEFAULT_RULE,
    THRESHOLD_RULES,
    check_scored,
    check_threshold,
    choose_layer,
    score_rows,
    select_turns,
    selection_quality,
)


def table(values, lengths=None, **columns):
    lengths = [9] * len(values) if lengths is None else lengths
    rows = [
        {
            "conversation": f"c{k}", "turn": 1, "layer": 0, "best_of_mean": value / 2,
            "mean_of_best": value, "mean_heads": 0.0, "uniform": 0.5, "response_tokens": 3,
            "context_tokens": length, "truncated": False, **{n: of[k] for n, of in columns.items()},
        }
        for k, (value, length) in enumerate(zip(values, lengths, strict=True))
    ]  # fmt: skip
    return Scores.from_rows(rows, {"model": {"name": "fake"}})


def test_selection_takes_scores_above_the_threshold():
    scores = table([0.1, 0.6, 0.61, 0.9])
    chosen = select_turns(scores, beta=0.6, layer=0)
    assert chosen.turns == {("c2", 1), ("c3", 1)}
    assert chosen.meta["threshold"] == 0.6
    assert (chosen.meta["turns"], chosen.meta["selected"]) == (4, 2)
    assert select_turns(scores, beta=1.0, layer=0).turns == frozenset()
    assert len(select_turns(scores, beta=0.0, layer=0).turns) == 4
    assert select_turns(scores, beta=0.4, layer=0, reduction="best_of_mean").turns == {("c3", 1)}


def test_valley_and_mixture_part_the_highest_group_from_all_others():
    peaks = {0.2: 300, 0.5: 100, 0.9: 60}
    scattered = np.random.default_rng(0)
    values = [v for at, n in peaks.items() for v in scattered.normal(at, 0.03, n).clip(0, 1)]
    for beta, said in (("valley", "valley"), (None, "highest of up to three groups")):
        chosen = select_turns(table(values), beta=beta, layer=0)
        assert 0.6 < chosen.meta["threshold"] < 0.8
        assert chosen.meta["selected"] == 60
        assert said in chosen.meta["rule"]


def test_otsu_splits_the_scores_into_two_groups_and_says_so():
    chosen = select_turns(table([0.1, 0.8, 0.12, 0.4, 0.85, 0.42]), beta="otsu", layer=0)
    assert chosen.meta["threshold"] == pytest.approx(0.61)
    assert "two groups" in chosen.meta["rule"]


@pytest.mark.parametrize("beta", [-0.1, 1.5, math.nan, "high"])
def test_threshold_outside_its_range_is_refused(beta):
    with pytest.raises(
        InputError, match='β must be a number from 0 to 1, or "mixture" or "valley" or "otsu"'
    ):
        select_turns(table([0.5]), beta=beta, layer=0)


def test_selection_needs_a_scored_layer_reduction_and_share():
    with pytest.raises(InputError, match=r"layer 7 is not among the scored layers \(0\)"):
        select_turns(table([0.5]), layer=7)
    with pytest.raises(InputError, match="unknown reduction 'median'"):
        select_turns(table([0.5]), layer=0, reduction="median")
    with pytest.raises(InputError, match="top_share is a share"):
        select_turns(table([0.5]), layer=0, top_share=1.2)


def test_quality_against_known_truth_by_hand():
    chosen = select_turns(table([0.1, 0.7, 0.8, 0.9]), beta=0.5, layer=0)
    # Selected c1 c2 c3; true c2 c3 c0 and one turn that was never scored: 2 of 3, 2 of 3.
    quality = selection_quality(chosen, {("c2", 1), ("c3", 1), ("c0", 1), ("other", 1)})
    assert (quality.both, quality.selected, quality.true, quality.turns) == (2, 3, 3, 4)
    assert quality.precision == pytest.approx(2 / 3)
    assert quality.recall == pytest.approx(2 / 3)
    nothing = selection_quality(select_turns(table([0.1]), beta=0.5, layer=0), set())
    assert math.isnan(nothing.precision)
    assert math.isnan(nothing.recall)


def test_layer_rules():
    assert choose_layer(22, rule="middle") == 15
    assert choose_layer(4, rule="middle") == 3
    assert choose_layer(1, rule="middle") == 0
    assert choose_layer(4, needle_layer=1) == 1
    with pytest.raises(InputError, match="needs needle_layer from 0 to 3"):
        choose_layer(4)
    with pytest.raises(InputError, match='"needle" or "middle"'):
        choose_layer(4, rule="last")


def test_top_share_takes_the_highest_and_of_equal_ones_the_first():
    chosen = select_turns(table([0.5, 0.9, 0.5, 0.1, 0.5]), layer=0, top_share=0.4)
    assert chosen.turns == {("c1", 1), ("c0", 1)}
    assert chosen.meta["threshold"] == 0.5
    assert select_turns(table([0.2, 0.9]), layer=0, top_share=1).meta["selected"] == 2


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_top_share_outside_its_range_is_refused(share):
    with pytest.raises(InputError, match=r"top_share is a share of the turns, 0 to 1 and above 0, got"):
        select_turns(table([0.5]), layer=0, top_share=share)


def test_top_share_of_less_than_a_turn_is_refused():
    with pytest.raises(InputError, match=r"top_share 0.1 of 3 turns is less than one turn"):
        select_turns(table([0.5, 0.6, 0.7]), layer=0, top_share=0.1)


def test_two_rules_at_once_are_refused():
    with pytest.raises(InputError, match="one rule for what is selected, not beta and top_share together"):
        select_turns(table([0.5]), layer=0, beta=0.5, top_share=0.5)
    with pytest.raises(InputError, match="top_share and per_length_quantile"):
        select_turns(table([0.5]), layer=0, top_share=0.5, per_length_quantile=0.5)


def test_quantile_is_taken_among_turns_of_one_length():
    # 20 short turns with scores 0.00 to 0.19 and 20 long ones with 0.50 to 0.69: the highest quarter of
    # each, five turns, is chosen; one threshold for all would have taken long ones only.
    values = [k / 100 for k in range(20)] + [0.5 + k / 100 for k in range(20)]
    chosen = select_turns(table(values, [10] * 20 + [90] * 20), layer=0, per_length_quantile=0.75)
    assert {name for name, _ in chosen.turns} == {f"c{k}" for k in (*range(15, 20), *range(35, 40))}
    assert [(b["from"], b["to"], b["turns"], b["selected"]) for b in chosen.meta["bins"]] == [
        (10, 10, 20, 5), (90, 90, 20, 5),
    ]  # fmt: skip
    assert chosen.meta["bins"][0]["threshold"] == pytest.approx(0.1425)
    assert chosen.meta["threshold"] is None


@pytest.mark.parametrize("quantile", [0, 1, 2.0, float("nan")])
def test_quantile_outside_its_range_is_refused(quantile):
    with pytest.raises(InputError, match="per_length_quantile must lie between 0 and 1"):
        select_turns(table([0.5]), layer=0, per_length_quantile=quantile)


def test_bins_by_hand():
    # Six lengths in three bins of at least two: 1 1 1 | 2 5 | 5: equal lengths stay together, and the
    # last bin, which would hold one length, goes into the one before.
    assert length_bins(np.array([5, 1, 1, 2, 1, 5, 7]), n_bins=3, min_count=2).tolist() == [
        1, 0, 0, 1, 0, 1, 1,
    ]  # fmt: skip
    assert length_bins(np.array([4, 4]), min_count=20).tolist() == [0, 0]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=120), st.integers(1, 12), st.integers(1, 30))
def test_bins_are_ordered_full_and_part_no_equals(lengths, n_bins, min_count):
    lengths = np.array(lengths)
    bins = length_bins(lengths, n_bins=n_bins, min_count=min_count)
    assert set(bins) == set(range(bins.max() + 1))
    order = np.argsort(lengths, kind="stable")
    assert (np.diff(bins[order]) >= 0).all()
    assert all(len(set(bins[lengths == length])) == 1 for length in set(lengths))
    assert bins.max() == 0 or min(np.bincount(bins)) >= min_count
    assert bins.max() + 1 <= n_bins


def test_lp_gap_is_chosen_without_a_layer_and_in_nats():
    scores = table([0.1, 0.2, 0.3], lp_gap=[-0.5, 3.0, 2.0])
    chosen = select_turns(scores, reduction="lp_gap", beta=2.5)
    assert chosen.turns == {("c1", 1)}
    assert (chosen.meta["layer"], chosen.meta["threshold"]) == (None, 2.5)
    with pytest.raises(InputError, match="hold no lp_gap; score again with --lp-gap"):
        select_turns(table([0.1]), reduction="lp_gap")
    with pytest.raises(InputError, match="needs the layer"):
        select_turns(table([0.1]))


def test_no_scores_no_selection():
    with pytest.raises(InputError):
        select_turns(Scores.from_rows([]), layer=0)
    with pytest.raises(InputError, match="no scored turns"):
        select_turns(Scores(table([0.1]).frame.iloc[:0].assign(lp_gap=[])), reduction="lp_gap")


def talk(name, user="Hello", answer="Hi"):
    messages = ({"role": "user", "content": user}, {"role": "assistant", "content": answer})
    return Conversation(name, messages, "test", {})


def test_data_that_were_not_scored_are_refused():
    data = [talk("c0"), talk("c1")]
    scores = table([0.1, 0.2])
    assert check_scored(scores, data) == fingerprint_conversations(data)
    with pytest.raises(InputError, match="turn 1 of conversation 'c1' was scored, but is not in the data"):
        check_scored(scores, data[:1])
    with pytest.raises(InputError, match="'c1' was scored, but is not in the data"):
        check_scored(scores, [talk("c0"), Conversation("c1", talk("c1").messages[:1], "test", {})])
    known = Scores(scores.frame, {"fingerprint": fingerprint_conversations(data)})
    check_scored(known, data)
    with pytest.raises(InputError, match="same ids but other texts"):
        check_scored(known, [talk("c0"), talk("c1", answer="Hi!")])


def test_turns_without_a_score_are_never_chosen_and_do_not_count():
    """`lp_gap` is NaN where nothing but the user's text stands before a response."""
    gaps = [3.0, math.nan, 1.0, math.nan, 2.0, 0.0]
    scores = table([0.5] * len(gaps), lp_gap=gaps)
    chosen = select_turns(scores, reduction="lp_gap", top_share=0.75)
    assert chosen.turns == {("c0", 1), ("c2", 1), ("c4", 1)}
    assert chosen.meta["threshold"] == 1.0
    chosen = select_turns(scores, reduction="lp_gap", per_length_quantile=0.5)
    assert chosen.turns == {("c0", 1), ("c4", 1)}
    with pytest.raises(InputError, match=r"top_share 0\.5 of 0 turns is less than one"):
        select_turns(table([0.5], lp_gap=[math.nan]), reduction="lp_gap", top_share=0.5)


def test_a_selection_says_what_it_was_made_of():
    scores = table([0.1, 0.7], kind=["closed", "document"])
    scores = Scores(scores.frame, {**scores.meta, "fingerprint": "f"})
    chosen = select_turns(scores, beta=0.5, layer=0)
    assert dict(chosen.meta) == {
        "threshold": 0.5, "rule": "score above the given threshold 0.5", "layer": 0,
        "reduction": "mean_of_best", "turns": 2, "selected": 1, "model": {"name": "fake"}, "fingerprint": "f",
    }  # fmt: skip
    assert chosen.frame.to_dict("list") == {
        "conversation": ["c0", "c1"], "turn": [1, 1], "score": [0.1, 0.7], "kind": ["closed", "document"],
        "selected": [False, True],
    }  # fmt: skip


def test_rules_and_their_default():
    assert DEFAULT_RULE == "mixture"
    assert list(THRESHOLD_RULES) == ["mixture", "valley", "otsu"]
    # Sixty values in two groups: the default is the rule of mixtures, not one of the others.
    values = [k / 1000 for k in range(100, 140)] + [k / 1000 for k in range(800, 820)]
    chosen = select_turns(table(values), layer=0)
    assert chosen.meta["threshold"] == THRESHOLD_RULES["mixture"][0](values)
    assert chosen.meta["rule"] == THRESHOLD_RULES["mixture"][1]


@pytest.mark.parametrize("beta", [0.0, 1.0, "mixture", "valley", "otsu"])
def test_thresholds_at_the_ends_of_their_range_are_allowed(beta):
    check_threshold(beta)


@pytest.mark.parametrize("beta", [-1e-9, 1 + 1e-9, "Otsu"])
def test_thresholds_just_outside_are_not(beta):
    with pytest.raises(InputError, match="β must be a number"):
        check_threshold(beta)


@pytest.mark.parametrize("beta", [math.inf, math.nan, "high"])
def test_a_threshold_in_nats_must_be_finite(beta):
    with pytest.raises(InputError, match="β must be a number"):
        select_turns(table([0.5, 0.6], lp_gap=[1.0, 2.0]), reduction="lp_gap", beta=beta)


def test_a_threshold_in_nats_may_be_negative():
    chosen = select_turns(table([0.5, 0.6], lp_gap=[-2.0, -1.0]), reduction="lp_gap", beta=-1.5)
    assert chosen.turns == {("c1", 1)}


def test_top_share_is_rounded_to_whole_turns():
    # 0.3 of 5 is 1.5, rounded to 2; 0.29 of 5 is 1.45, rounded to 1; 0.11 of 5 is 0.55, rounded to 1.
    scores = table([0.1, 0.2, 0.3, 0.4, 0.5])
    counts = [select_turns(scores, layer=0, top_share=share).meta["selected"] for share in (0.3, 0.29, 0.11)]
    assert counts == [2, 1, 1]


def test_a_score_at_the_quantile_is_not_above_it():
    # The median of 0, 1/4 and 1/2 is 1/4, which is not chosen.
    chosen = select_turns(table([0.0, 0.25, 0.5]), layer=0, per_length_quantile=0.5)
    assert chosen.turns == {("c2", 1)}
    assert dict(chosen.meta["bins"][0]) == {"from": 9, "to": 9, "turns": 3, "threshold": 0.25, "selected": 1}


def test_bins_hold_a_tenth_and_at_least_twenty_turns_by_default():
    # 40 different lengths: two bins of 20, though a tenth is 4.
    assert np.bincount(length_bins(np.arange(40))).tolist() == [20, 20]
    # 39: the rest of 19 goes into the first bin.
    assert np.bincount(length_bins(np.arange(39))).tolist() == [39]
    # 301: a bin is full at ceil(30.1) = 31; nine of them, and a last one of 22.
    assert np.bincount(length_bins(np.arange(301))).tolist() == [31] * 9 + [22]


@pytest.mark.parametrize(("n_layers", "layer"), [(1, 0), (2, 1), (3, 2), (6, 4), (12, 8), (22, 15), (32, 22)])
def test_the_papers_depth_in_models_of_other_depths(n_layers, layer):
    """15/22 of 6, 12 and 32 layers are 4.09, 8.18 and 21.8."""
    assert choose_layer(n_layers, rule="middle") == layer


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_needle_layer_that_the_model_does_not_have_is_refused(layer):
    with pytest.raises(InputError, match=f"needs needle_layer from 0 to 3, got {layer}"):
        choose_layer(4, needle_layer=layer)


def test_the_first_and_the_last_layer_may_hold_the_needle():
    assert [choose_layer(4, needle_layer=layer) for layer in (0, 3)] == [0, 3]


def test_a_scored_turn_must_be_in_its_conversation():
    frame = table([0.1]).frame
    data = [talk("c0")]
    for turn in (-1, 2, 0):  # before the first, after the last, and the user's
        with pytest.raises(InputError, match=f"turn {turn} of conversation 'c0' was scored, but is not in"):
            check_scored(Scores(frame.assign(turn=turn)), data)


def test_bins_name_their_shortest_and_longest_context():
    lengths = [3, 1, 2, *range(4, 21), *range(40, 20, -1)]
    bins = select_turns(
        table(np.linspace(0.1, 0.9, 40), lengths), layer=0, per_length_quantile=0.5
    ).meta["bins"]  # fmt: skip
    assert [(one["from"], one["to"], one["turns"]) for one in bins] == [(1, 20, 20), (21, 40, 20)]


def test_rows_have_no_columns_but_those_of_the_scores_and_the_score():
    scores = table([0.1, 0.2])
    rows = score_rows(scores, 0, "mean_of_best")
    assert set(rows.columns) == {*scores.frame.columns, "score"}
    assert rows["score"].tolist() == [0.1, 0.2]


@pytest.mark.parametrize(("turn", "known"), [(0, True), (-1, False), (1, False)])
def test_an_assistant_turn_that_opens_a_conversation_belongs_to_the_data(turn, known):
    data = [Conversation("c0", ({"role": "assistant", "content": "Hi."},), "test", {})]
    scores = table([0.5])
    scores = Scores(scores.frame.assign(turn=turn), {})
    if known:
        assert check_scored(scores, data) == fingerprint_conversations(data)
    else:
        with pytest.raises(InputError, match=f"turn {turn} of conversation 'c0' was scored"):
            check_scored(scores, data)


def test_the_quality_of_a_selection_is_frozen():
    quality = selection_quality(select_turns(table([0.1, 0.9]), beta=0.5, layer=0), {("c1", 1)})
    with pytest.raises(dataclasses.FrozenInstanceError):
        quality.recall = 0.0
