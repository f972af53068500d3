"""Intervals, differences and thresholds against numbers worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm, permutation_test

from ctxlens.stats import (
    Interval,
    McNemar,
    PairedComparison,
    auroc,
    auroc_interval,
    bootstrap_mean,
    compare_pairs,
    mcnemar,
    mixture_threshold,
    otsu_threshold,
    paired_difference,
    t_interval,
    valley_threshold,
)


def test_bootstrap_mean_leaves_nan_out():
    interval = bootstrap_mean([1.0, float("nan"), 0.0, 1.0, 0.0])
    assert interval.estimate == 0.5
    assert interval.n == 4
    assert 0 <= interval.low < 0.5 < interval.high <= 1


def test_bootstrap_interval_is_near_the_normal_one_for_many_values():
    values = np.tile([0.0, 1.0], 200)  # standard error 0.5 / sqrt(400) = 0.025
    interval = bootstrap_mean(values)
    assert interval.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.008)
    assert interval.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.008)


def test_the_same_seed_gives_the_same_interval():
    values = np.arange(20.0)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_clusters_are_drawn_whole():
    values, clusters = [1.0] * 50 + [0.0] * 50, ["a"] * 50 + ["b"] * 50
    apart = bootstrap_mean(values)
    together = bootstrap_mean(values, clusters=clusters)
    assert together.estimate == apart.estimate == 0.5
    assert together.n == 2
    assert (together.low, together.high) == (0.0, 1.0)  # of two clusters, both may be the same one
    assert apart.high - apart.low < 0.25


def test_clusters_of_unequal_size_weigh_by_their_size():
    assert bootstrap_mean([1, 1, 1, 0], clusters=["a", "a", "a", "b"]).estimate == 0.75


@pytest.mark.parametrize(("values", "n"), [([], 0), ([float("nan")], 0), ([0.7], 1)])
def test_too_few_values_have_no_interval(values, n):
    interval = bootstrap_mean(values)
    assert interval.n == n
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_equal_values_have_an_interval_without_width():
    assert bootstrap_mean([0.25] * 5) == Interval(0.25, 0.25, 0.25, 5)


def test_paired_difference_is_second_minus_first():
    interval = paired_difference([0.9, 0.8, 0.7], [0.4, 0.3, 0.2])
    assert interval.estimate == pytest.approx(-0.5)
    assert interval.high == pytest.approx(-0.5)


def test_pairs_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        paired_difference([1, 2, 3], [1, 2])


def test_t_interval_of_three_seeds():
    # mean 2, standard deviation 1, t(0.975, 2) = 4.3027: 4.3027 / sqrt(3) = 2.4841
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval.estimate == 2.0
    assert interval.low == pytest.approx(2 - 2.4841, abs=1e-3)
    assert interval.high == pytest.approx(2 + 2.4841, abs=1e-3)
    assert math.isnan(t_interval([1.0]).low)


def test_auroc_counts_pairs_and_halves_ties():
    assert auroc([3, 4], [1, 2]) == 1.0
    assert auroc([1, 2], [3, 4]) == 0.0
    assert auroc([1, 3], [2, 3]) == (0 + 0 + 1 + 0.5) / 4
    assert math.isnan(auroc([], [1]))


def test_auroc_interval_holds_the_estimate():
    rng = np.random.default_rng(0)
    interval = auroc_interval(rng.normal(1, 1, 60), rng.normal(0, 1, 50))
    assert interval.low < interval.estimate < interval.high
    assert interval.n == 50
    assert math.isnan(auroc_interval([1.0], [0.0, 0.5]).low)


def test_otsu_splits_where_the_gap_is():
    assert otsu_threshold([0.1, 0.12, 0.14, 0.8, 0.82]) == pytest.approx((0.14 + 0.8) / 2)


def test_otsu_with_too_few_values():
    assert otsu_threshold([0.4, 0.4]) == 0.4
    assert math.isnan(otsu_threshold([]))
    assert otsu_threshold([0.2, float("nan"), 0.6]) == pytest.approx(0.4)


def test_mixture_begins_the_highest_group_where_both_groups_are_equally_likely():
    # two equal Gaussians: halfway between their means, by symmetry
    quantiles = (np.arange(500) + 0.5) / 500
    group = norm.ppf(quantiles)
    assert mixture_threshold(np.concatenate([group - 3, group + 5])) == pytest.approx(1.0, abs=0.05)
    # three groups of unequal numbers: between the two highest, nearer to the smaller one
    three = mixture_threshold(np.concatenate([group * 0.5 - 8, group[::2] * 0.5, group[::10] * 0.5 + 4]))
    assert 2.0 < three < 2.6


def test_mixture_of_shares_is_one_of_log_odds_and_keeps_0_and_1():
    group = norm.ppf((np.arange(400) + 0.5) / 400)
    values = expit(np.concatenate([group - 1, group + 5]))
    assert mixture_threshold(values) == pytest.approx(expit(2.0), abs=0.01)
    assert 0 < mixture_threshold([0.0] * 30 + [0.5, 0.51, 0.49] * 10 + [1.0] * 30) < 1


def test_mixture_of_overlapping_groups_finds_the_smaller_where_there_is_no_valley():
    drawn = np.random.default_rng(0)
    many, few = drawn.normal(0.0, 1.0, 1500), drawn.normal(3.0, 0.5, 450)
    threshold = mixture_threshold(np.concatenate([many, few, drawn.normal(-6, 1, 2000)]))
    assert (few > threshold).mean() > 0.9
    assert (many > threshold).mean() < 0.05


def test_mixture_of_one_group_or_of_few_values_is_otsu():
    group = norm.ppf((np.arange(300) + 0.5) / 300)
    assert mixture_threshold(group) == otsu_threshold(group)
    assert mixture_threshold([0.2, 0.6]) == pytest.approx(0.4)
    assert mixture_threshold([0.1, 0.2, 0.8, 0.9]) == pytest.approx(0.5)
    assert mixture_threshold([0.1, 0.2, 0.3, 0.7, 0.8, 0.9] * 3) == pytest.approx(0.5)
    assert mixture_threshold([0.5, 0.5, 0.5]) == 0.5
    assert math.isnan(mixture_threshold([]))
    assert 0.2 <= mixture_threshold([0.2, 0.5, 0.9]) <= 0.9


def test_a_few_far_values_are_no_group_of_a_mixture():
    group = norm.ppf((np.arange(500) + 0.5) / 500)
    threshold = mixture_threshold(np.concatenate([group - 3, group + 5, [40.0, 40.5, 41.0]]))
    assert (group + 5 > threshold).all()
    assert (group - 3 > threshold).mean() < 0.05


def test_valley_lies_between_the_two_highest_peaks():
    scattered = np.random.default_rng(1)
    values = np.concatenate([scattered.normal(at, 0.02, n) for at, n in ((0.2, 200), (0.5, 60), (0.8, 40))])
    assert 0.55 < valley_threshold(values) < 0.75


def test_valley_of_a_single_peak_or_of_few_values_is_otsu():
    values = np.random.default_rng(2).normal(0.5, 0.1, 50).tolist()
    assert valley_threshold(values) == otsu_threshold(values)
    assert valley_threshold([0.2, 0.6]) == pytest.approx(0.4)
    assert math.isnan(valley_threshold([]))


def test_interval_as_text_and_values():
    interval = Interval(0.4123, 0.3, 0.5, 7)
    assert interval.format() == "0.41 [0.30, 0.50]"
    assert interval.as_dict() == {"estimate": 0.4123, "low": 0.3, "high": 0.5, "n": 7}


def test_signs_of_clusters_are_flipped_exactly():
    # Sums of the four clusters: 3, 3, 3, 3. Of 16 ways to sign them two are as far from 0: p = 2/16.
    first, second = np.zeros(8), np.tile([1.0, 2.0], 4)
    pair = compare_pairs(first, second, clusters=np.repeat(range(4), 2))
    assert (pair.p_value, pair.pairs, pair.difference.n) == (2 / 16, 8, 4)
    assert (pair.first.estimate, pair.second.estimate, pair.difference.estimate) == (0, 1.5, 1.5)
    # Sums 3, 3, 3, -1 give 8; as far from 0 are 3+3+3+1 and 3+3+3-1 with either sign: p = 4/16.
    second[6:] = -0.5
    assert compare_pairs(first, second, clusters=np.repeat(range(4), 2)).p_value == 4 / 16


def test_flipping_signs_agrees_with_wilcoxon_on_many_pairs():
    from scipy.stats import wilcoxon

    rng = np.random.default_rng(0)
    first = rng.normal(size=60)
    second = first + rng.normal(0.3, 1.0, size=60)
    pair = compare_pairs(first, second)
    assert pair.p_value == pytest.approx(float(wilcoxon(second - first).pvalue), abs=0.02)
    assert pair.difference == paired_difference(first, second)


@pytest.mark.parametrize(
    ("shift", "clusters", "reading"),
    [
        (1.0, 8, "higher"),
        (-1.0, 8, "lower"),
        (0.0, 8, "no difference shown"),
        (1.0, 5, "too few to tell"),  # p cannot be below 2/32
        (1.0, 1, "too few to tell"),
    ],
)
def test_reading_needs_interval_and_test(shift, clusters, reading):
    noise = np.tile([0.1, -0.1], 40)[: 4 * clusters]
    pair = compare_pairs(np.zeros(4 * clusters), noise + shift, clusters=np.repeat(range(clusters), 4))
    assert pair.reading == reading


def test_pairs_with_a_missing_half_are_left_out():
    nan = float("nan")
    pair = compare_pairs([0.0, nan, 1.0, nan], [1.0, 1.0, nan, nan])
    assert (pair.pairs, pair.first.estimate, pair.second.estimate) == (1, 0, 1)
    assert math.isnan(compare_pairs([nan], [1.0]).p_value)
    with pytest.raises(ValueError, match="of the same shape"):
        compare_pairs([1.0], [1.0, 2.0])


def test_mcnemar_counts_what_differs_and_tests_it_exactly():
    # Right under the second alone 5 times, under the first alone once: p = 2 (1 + 6) / 2^6.
    found = mcnemar([1, 1, 0, 0, 0, 0, 0, 1, 0], [1, 0, 1, 1, 1, 1, 1, 1, 0])
    assert (found.only_first, found.only_second) == (1, 5)
    assert found.p_value == pytest.approx(14 / 64)
    # 3 against 0: p = 2 / 2^3; what is missing in either does not count.
    nan = float("nan")
    found = mcnemar([1, 1, 1, nan, 0], [0, 0, 0, 1, nan])
    assert (found.only_first, found.only_second, found.p_value) == (3, 0, 0.25)


def test_mcnemar_without_a_difference_is_certain_of_none():
    assert mcnemar([1, 0], [1, 0]).p_value == 1
    assert mcnemar([1, 1, 0, 0], [0, 0, 1, 1]).p_value == 1
    assert mcnemar([], []).p_value == 1
    with pytest.raises(ValueError, match="0 and 1 only"):
        mcnemar([0.5], [1])
    with pytest.raises(ValueError, match="of the same shape"):
        mcnemar([1], [1, 0])


def comparison(low, high, p_value, n=8):
    unused = Interval(0.0, 0.0, 0.0, n)
    return PairedComparison(unused, unused, Interval((low + high) / 2, low, high, n), p_value, n)


@pytest.mark.parametrize(
    ("low", "high", "p_value", "n", "reading"),
    [
        (0.1, 0.3, 0.05, 8, "higher"),  # exactly the level is significant
        (0.1, 0.3, 0.0501, 8, "no difference shown"),
        (-0.3, -0.1, 0.05, 8, "lower"),
        (0.0, 0.3, 0.01, 8, "no difference shown"),  # an interval that touches zero does not exclude it
        (-0.3, 0.0, 0.01, 8, "no difference shown"),
        (-0.1, 0.1, 0.01, 2, "no difference shown"),
        (math.nan, math.nan, 1.0, 1, "too few to tell"),
        (math.nan, math.nan, 1.0, 2, "no difference shown"),
        (0.1, 0.3, 2 / 2**5, 5, "too few to tell"),  # 0.0625, the least p value of five clusters
        (0.1, 0.3, 2 / 2**6, 6, "higher"),  # 0.03125
        (0.1, 0.3, 0.0625, 6, "no difference shown"),
    ],
)
def test_reading_at_its_edges(low, high, p_value, n, reading):
    assert comparison(low, high, p_value, n).reading == reading


def test_one_pair_has_p_1_and_none_has_no_p():
    assert compare_pairs([0.0], [1.0]).p_value == 1.0
    assert compare_pairs([0.0, 0.0], [1.0, 1.0]).p_value == 2 / 4


def test_signs_are_flipped_exactly_up_to_13_clusters():
    assert compare_pairs(np.zeros(13), np.ones(13)).p_value == 2 / 2**13


def test_percentile_interval_of_two_values_and_its_level():
    """Means of two draws from 0 and 1 are 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4."""
    assert bootstrap_mean([0.0, 1.0]) == Interval(0.5, 0.0, 1.0, 2)
    half = bootstrap_mean([0.0, 1.0], level=0.4)  # from the 30 % to the 70 % point: 1/2 both
    assert (half.low, half.high) == (0.5, 0.5)


def test_a_level_and_a_number_of_resamples_reach_every_interval():
    values = np.arange(10.0)
    wide, narrow = bootstrap_mean(values), bootstrap_mean(values, level=0.5)
    assert wide.low < narrow.low < 4.5 < narrow.high < wide.high
    assert paired_difference(np.zeros(10), values, level=0.5) == narrow
    pair = compare_pairs(np.zeros(10), values, level=0.5)
    assert pair.second == pair.difference == narrow
    few = bootstrap_mean(values, n_resamples=50, seed=1)
    assert paired_difference(np.zeros(10), values, n_resamples=50, seed=1) == few
    assert few != bootstrap_mean(values, seed=1)


def test_one_cluster_of_many_values_has_no_interval():
    interval = bootstrap_mean([0.0, 1.0, 0.5], clusters=["a"] * 3)
    assert (interval.estimate, interval.n) == (0.5, 1)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_two_equal_values_are_enough_for_an_interval():
    assert bootstrap_mean([0.25, 0.25]) == Interval(0.25, 0.25, 0.25, 2)


def test_labels_of_missing_values_are_left_out_with_them():
    with_gap = bootstrap_mean([1.0, math.nan, 0.0, 0.5], clusters=["a", "gone", "b", "b"])
    assert with_gap == bootstrap_mean([1.0, 0.0, 0.5], clusters=["a", "b", "b"])
    assert with_gap.n == 2


def test_interval_as_text_with_digits_and_without_bounds():
    assert Interval(0.4126, 0.3, 0.5, 7).format(3) == "0.413 [0.300, 0.500]"
    assert Interval(0.4, math.nan, 0.5, 1).format() == "0.40 (too few for an interval)"
    assert Interval(0.4, 0.3, math.nan, 1).format() == "0.40 (too few for an interval)"


def test_t_interval_of_two_values_at_another_level():
    # mean 1, standard error 1, t(0.75, 1) = 1
    interval = t_interval([0.0, 2.0], level=0.5)
    assert (interval.estimate, interval.n) == (1.0, 2)
    assert (interval.low, interval.high) == pytest.approx((0.0, 2.0), abs=1e-9)


def test_auroc_with_an_empty_group():
    assert math.isnan(auroc([1], []))
    assert math.isnan(auroc([], []))
    assert auroc([0.5], [0.5]) == 0.5


def test_auroc_interval_needs_two_of_each():
    assert math.isnan(auroc_interval([0.0, 1.0], [0.5]).high)
    interval = auroc_interval([2.0, 3.0], [0.0, 1.0], n_resamples=100)
    assert interval == Interval(1.0, 1.0, 1.0, 2)
    assert auroc_interval([0.0, 1.0], [2.0, 3.0, 4.0], n_resamples=100) == Interval(0.0, 0.0, 0.0, 2)


def test_mcnemar_needs_both_halves_of_a_pair():
    nan = math.nan
    found = mcnemar([nan, 1, 1], [1, nan, 0])
    assert (found.only_first, found.only_second, found.p_value) == (1, 0, 1.0)


def test_otsu_by_hand():
    # Splits of 0, 1, 3 by the product of counts and squared distance of means:
    # {0} {1, 3}: 1·2·2² = 8; {0, 1} {3}: 2·1·2.5² = 12.5.
    assert otsu_threshold([3.0, 0.0, 1.0]) == 2.0
    # {0} {2, 3}: 1·2·2.5² = 12.5; {0, 2} {3}: 2·1·2² = 8.
    assert otsu_threshold([0.0, 2.0, 3.0]) == 1.0
    # Equal values stay together: {0, 0, 0} {1} and not two zeros from the third.
    assert otsu_threshold([0.0, 0.0, 0.0, 1.0]) == 0.5


def test_a_mixture_needs_ten_values_and_three_distinct_ones():
    few = [0.1, 0.11, 0.12, 0.5, 0.51, 0.52, 0.9, 0.91, 0.92]
    assert mixture_threshold(few) == otsu_threshold(few)
    two = [0.2] * 20 + [0.6] * 20
    assert mixture_threshold(two) == otsu_threshold(two) == pytest.approx(0.4)


def test_a_valley_needs_three_distinct_values():
    assert valley_threshold([0.0] * 10 + [1.0] * 10) == 0.5


def test_the_valley_of_two_equal_groups_is_halfway():
    group = norm.ppf((np.arange(200) + 0.5) / 200)
    values = np.concatenate([group - 5, group + 5, [math.nan]])
    step = (values[:-1].max() - values[:-1].min()) / 511  # of the grid on which the density is read
    assert valley_threshold(values) == pytest.approx(0.0, abs=step)


@pytest.mark.parametrize("result", [
    Interval(0.0, 0.0, 0.0, 1),
    PairedComparison(*[Interval(0.0, 0.0, 0.0, 1)] * 3, 1.0, 1),
    McNemar(0, 0, 1.0),
])  # fmt: skip
def test_results_are_frozen(result):
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.p_value = 0.0


def test_default_numbers_of_resamples_and_seeds():
    values, others = np.sin(np.arange(12.0)), np.cos(np.arange(9.0))
    assert bootstrap_mean(values) == bootstrap_mean(values, seed=0, n_resamples=2000, level=0.95)
    assert auroc_interval(values, others) == auroc_interval(values, others, seed=0, n_resamples=1000)


def test_random_flips_are_9999():
    values = np.sin(np.arange(15.0)) + 0.3
    expected = permutation_test(
        (values,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=9999, rng=np.random.default_rng(0),
    ).pvalue  # fmt: skip
    assert compare_pairs(np.zeros(15), values).p_value == expected


def test_sums_and_counts_of_clusters_are_drawn_together():
    # Eight clusters of nine ones, eight of a single zero: no draw of whole clusters has a mean above 1.
    values = [1.0] * 72 + [0.0] * 8
    labels = [*np.repeat(np.arange(8), 9), *range(8, 16)]
    assert bootstrap_mean(values, clusters=labels).high <= 1.0


def test_t_interval_of_one_value_keeps_the_value():
    found = t_interval([0.5])
    assert (found.estimate, found.n) == (0.5, 1)
    assert math.isnan(found.low)


def test_otsu_never_splits_equal_values():
    assert otsu_threshold([0.0, 0.0, 0.001]) == pytest.approx(0.0005)


def test_otsu_weighs_squared_distances():
    # n_below * n_above * distance^2: splits after 1, 2, 3 of 0 3 6 10 give
    # 3 * (19/3)^2 = 120.3, 4 * 6.5^2 = 169, 3 * 7^2 = 147; cubes would give 762, 1098.5, 1029.
    assert otsu_threshold([0.0, 3.0, 6.0, 10.0]) == 4.5
    # 0 0 0 1 1.9: after 3: 6 * 1.45^2 = 12.6, after 4: 4 * 1.65^2 = 10.9; cubes 18.3 and 18.0.
    # 0 0 0 1 2.0: after 3: 6 * 1.5^2 = 13.5, after 4: 4 * 1.75^2 = 12.25; cubes 20.25 and 21.4.
    assert otsu_threshold([0.0, 0.0, 0.0, 1.0, 2.0]) == 0.5


def test_valley_of_three_distinct_values_lies_between_the_peaks():
    assert valley_threshold([0.0] * 10 + [1.0] + [2.0] * 10) == pytest.approx(1.0, abs=0.02)


def test_a_bump_below_two_percent_is_no_peak():
    values = np.append(norm.ppf((np.arange(1000) + 0.5) / 1000), 8.0)
    assert valley_threshold(values) == otsu_threshold(values) < 4


def test_the_valley_of_many_values_is_that_of_their_quantiles():
    group = norm.ppf((np.arange(6000) + 0.5) / 6000)
    assert valley_threshold(np.concatenate([group - 3, group + 5])) == pytest.approx(1.0, abs=0.05)


def test_a_mixture_of_three_distinct_values_begins_at_the_highest():
    values = [-5.0] * 30 + [0.0] * 10 + [1.0] * 10
    assert otsu_threshold(values) == -2.5
    assert mixture_threshold(values) == pytest.approx(0.5, abs=0.01)


def test_a_mixture_has_three_groups_at_most():
    group = norm.ppf((np.arange(100) + 0.5) / 100) * 0.2
    assert 10 < mixture_threshold(np.concatenate([group + at for at in (0.0, 10.0, 20.0, 21.5)])) < 20


@pytest.mark.parametrize("extra", [[1.2], [-0.1], [1.3, 1.4, 1.5]])
def test_values_outside_0_and_1_are_no_shares(extra):
    group = norm.ppf((np.arange(100) + 0.5) / 100)
    values = np.concatenate([0.5 + 0.1 * group, 0.9 + 0.02 * group, extra])
    assert mixture_threshold(values) == pytest.approx(mixture_threshold(values + 100) - 100, abs=0.003)


def test_a_share_of_0_counts_as_the_least_share():
    group = expit(norm.ppf((np.arange(50) + 0.5) / 50) * 0.5)
    high = expit(3 + norm.ppf((np.arange(50) + 0.5) / 50) * 0.5)
    found = [mixture_threshold([least, *group, *high]) for least in (0.0, 1e-9)]
    assert found[0] == found[1]
    # One group at the log-odds of 1e-4, -9.21, and one at 0: the border is halfway, at -4.61.
    assert mixture_threshold([0.0] * 29 + [1e-9] + [0.5] * 30) == pytest.approx(expit(-4.605), rel=0.02)
