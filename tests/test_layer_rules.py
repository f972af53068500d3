"""Rules that find the layer whose scores decide, by hand."""

import numpy as np
import pytest

from ctxlens.errors import InputError
from ctxlens.results import Scores
from ctxlens.scoring import layers
from ctxlens.scoring.layers import (
    DEFAULT_LAYER_RULE,
    LAYER_RULES,
    default_layers,
    default_rule,
    find_layer,
    most_agreeing,
    most_attentive,
    most_varied,
)
from ctxlens.scoring.lengths import deviations, log_odds, ranks_within

LENGTHS = [10] * 20 + [90] * 20
# Layer 0 knows length alone, layer 1 tells turns of one length apart, layer 2 does so in the opposite order
# and less.
BY_LENGTH = [0.1] * 20 + [0.9] * 20
ORDERED = [0.3 + k / 50 for k in range(20)] * 2
OPPOSED = [0.6 - k / 100 for k in range(20)] * 2


def table(by_layer, meta=None, lengths=LENGTHS, **columns):
    rows = [
        {
            "conversation": f"c{k}", "turn": 1, "layer": layer, "best_of_mean": value / 2,
            "mean_of_best": value, "mean_heads": 0.0, "uniform": 0.5, "response_tokens": 3,
            "context_tokens": lengths[k], "truncated": False, **{n: of[k] for n, of in columns.items()},
        }
        for layer, values in by_layer.items()
        for k, value in enumerate(values)
    ]  # fmt: skip
    return Scores.from_rows(rows, meta or {})


def test_values_within_bins_by_hand():
    bins = np.array([0, 1, 0, 1, 0])
    assert deviations(np.array([1.0, 4, 2, 8, 6]), bins).tolist() == [-2, -2, -1, 2, 3]
    ranks = ranks_within(np.array([1.0, 4.0, 2.0, np.nan, 2.0]), bins)
    assert ranks == pytest.approx([1 / 3, 1, 2.5 / 3, np.nan, 2.5 / 3], nan_ok=True)
    assert log_odds(np.array([0.5, 0.8])) == pytest.approx([0, np.log(4)])
    assert log_odds(np.array([0.0, 1.0])) == pytest.approx([-13.8155, 13.8155], abs=1e-3)


def test_residual_takes_the_layer_that_varies_most_at_one_length():
    scores = table({0: BY_LENGTH, 1: ORDERED, 2: OPPOSED})
    assert find_layer(scores, "residual") == 1
    assert find_layer(table({0: BY_LENGTH, 5: OPPOSED}), "residual") == 5
    assert most_varied(np.array([BY_LENGTH, ORDERED, OPPOSED]), np.array(LENGTHS)) == 1


def test_gap_takes_the_layer_that_agrees_at_one_length():
    falling = [*range(20, 0, -1), *range(120, 100, -1)]
    scores = table({3: BY_LENGTH, 4: ORDERED, 5: OPPOSED}, lp_gap=falling)
    assert find_layer(scores, "gap") == 5
    rising = [*range(20), *range(20)]
    assert find_layer(table({3: BY_LENGTH, 4: ORDERED, 5: OPPOSED}, lp_gap=rising), "gap") == 4
    # A turn without lp_gap does not count.
    gap = np.array([np.nan, *falling[1:]])
    assert most_agreeing(np.array([ORDERED, OPPOSED]), gap, np.array(LENGTHS)) == 1
    with pytest.raises(InputError, match="which these scores lack; score again with --lp-gap"):
        find_layer(table({0: ORDERED}), "gap")
    with pytest.raises(InputError, match="are the same for all turns"):
        find_layer(table({0: ORDERED}, lp_gap=[1.0] * 40), "gap")


def test_the_order_of_rows_does_not_matter():
    scores = table({0: ORDERED, 1: OPPOSED}, lp_gap=[*range(20), *range(20)])
    mixed = Scores(scores.frame.sample(frac=1, random_state=0), scores.meta)
    assert find_layer(mixed, "gap") == find_layer(scores, "gap") == 0
    assert find_layer(mixed, "residual") == find_layer(scores, "residual") == 0


def test_needle_rules_take_the_best_head_or_all_of_a_layer():
    shares = np.array([[0.1, 0.1], [0.5, 0.0], [0.4, 0.4]])
    assert (most_attentive(shares), most_attentive(shares, together=True)) == (1, 2)
    scores = table({0: ORDERED, 1: ORDERED, 2: ORDERED})
    assert find_layer(scores, "needle", needle_shares=shares) == 1
    assert find_layer(scores, "needle-mean", needle_shares=shares) == 2
    with pytest.raises(InputError, match="rule needle needs the attention of every head"):
        find_layer(scores, "needle")
    with pytest.raises(InputError, match=r"chooses layer 2, which was not scored \(layers 0, 1\)"):
        find_layer(table({0: ORDERED, 1: ORDERED}), "needle-mean", needle_shares=shares)


def test_middle_takes_the_nearest_scored_layer():
    assert find_layer(table({14: ORDERED, 17: ORDERED}, {"n_layers": 22}), "middle") == 14
    assert find_layer(table({0: ORDERED, 1: ORDERED, 2: ORDERED, 3: ORDERED}), "middle") == 3


def test_the_default_rule_gives_way_to_the_middle_where_scores_lack_what_it_needs(monkeypatch):
    scores, shares = table({0: ORDERED, 1: OPPOSED}), np.array([[0.4], [0.2], [0.1]])
    monkeypatch.setattr(layers, "DEFAULT_LAYER_RULE", "needle")
    assert default_rule(scores) == "middle"
    assert default_rule(scores, needle_shares=shares) == "needle"
    assert default_rule(scores, needle_shares=shares[::-1]) == "middle"  # layer 2 was not scored
    assert default_layers(22) == tuple(range(22))
    monkeypatch.setattr(layers, "DEFAULT_LAYER_RULE", "gap")
    assert default_rule(scores) == "middle"
    monkeypatch.setattr(layers, "DEFAULT_LAYER_RULE", "residual")
    assert default_rule(scores) == "residual"
    monkeypatch.setattr(layers, "DEFAULT_LAYER_RULE", "middle")
    assert default_layers(22) == tuple(range(16))


def test_rules_that_do_not_exist_and_scores_that_are_empty_are_refused():
    assert DEFAULT_LAYER_RULE in LAYER_RULES
    with pytest.raises(
        InputError, match="must be one of middle, needle, needle-mean, residual, gap, got 'best'"
    ):
        find_layer(table({0: ORDERED}), "best")
    with pytest.raises(InputError, match="no scored turns"):
        find_layer(Scores(table({0: ORDERED}).frame.iloc[:0], {}), "residual")
