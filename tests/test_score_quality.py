"""The experiment on the quality of scores: its measures by hand, its baselines, and what its labels mean."""

import itertools

import numpy as np
import pytest

from experiments.score_quality.baselines import baselines, containment
from experiments.score_quality.data import FAMILIES, family_of, organism_world, t0_world
from experiments.score_quality.ranking import (
    EqualLength,
    auroc,
    auroc_at_equal_length,
    average_precision,
    difference,
    rank,
)


def test_average_precision_by_hand():
    # Ranked: + - + with precision 1 and 2/3 at the positives.
    positive = np.array([True, False, True])
    assert average_precision(positive, np.array([3.0, 2.0, 1.0])) == pytest.approx((1 + 2 / 3) / 2)
    # All equal: one step at the base rate.
    assert average_precision(positive, np.zeros(3)) == pytest.approx(2 / 3)
    # + and - tie at the top (1/2 when both are in), then +: (1/2 + 2/3) / 2.
    assert average_precision(positive, np.array([2.0, 2.0, 1.0])) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        positive, score = rng.random(12) < 0.5, rng.integers(0, 4, 12).astype(float)
        if positive.all() or not positive.any():
            continue
        pairs = itertools.product(score[positive], score[~positive])
        expected = np.mean([(a > b) + (a == b) / 2 for a, b in pairs])
        assert auroc(positive, score) == pytest.approx(expected)
        far = np.full(12, 7.0)
        assert auroc_at_equal_length(positive, score, far)[0] == pytest.approx(expected)


def test_pairs_of_other_lengths_do_not_count():
    positive = np.array([True, False, False])
    score, length = np.array([1.0, 0.0, 2.0]), np.array([100.0, 110.0, 200.0])
    assert auroc_at_equal_length(positive, score, length) == (1.0, 1)
    assert auroc(positive, score) == 0.5


def test_samples_at_equal_length_are_those_of_drawn_rows():
    rng = np.random.default_rng(3)
    positive, length = rng.random(40) < 0.4, rng.integers(50, 120, 40).astype(float)
    scores = {"a": rng.integers(0, 5, 40) / 5 + positive * 0.2, "b": rng.random(40)}
    drawn = EqualLength(positive, [length], scores, n=30)
    again = np.random.default_rng(0)
    rows = [np.arange(40), *(again.integers(0, 40, 40) for _ in range(30))]
    by_hand = {
        name: [auroc_at_equal_length(positive[at], score[at], length[at])[0] for at in rows]
        for name, score in scores.items()
    }
    assert drawn.values("a") == pytest.approx(by_hand["a"])
    difference = np.subtract(by_hand["a"], by_hand["b"])
    found = drawn.difference("a", "b")
    assert (found.estimate, found.n) == (pytest.approx(difference[0]), 40)
    assert (found.low, found.high) == pytest.approx(np.quantile(difference[1:], (0.025, 0.975)))


def test_pairs_alike_in_both_lengths_by_hand():
    """The first positive has one partner in both lengths, which it beats; the second has none."""
    positive = np.array([True, True, False, False])
    prompt, response = np.array([100, 100, 110, 100]), np.array([10, 50, 11, 20])
    drawn = EqualLength(positive, [prompt, response], {"a": np.array([0.9, 0.1, 0.5, 0.95])}, n=2)
    assert drawn.pairs[0] == 1
    assert drawn.values("a")[0] == 1.0


def test_a_perfect_score_beats_a_useless_one_and_itself_by_nothing():
    positive = np.arange(40) % 2 == 0
    useless = np.random.default_rng(1).random(40)
    ranked = rank({"perfect": positive * 1.0, "useless": useless}, positive, np.arange(40), seed=0, n=200)
    assert ranked["perfect"].summary()["auroc"] == [1, 1, 1]
    estimate, low, high = difference(ranked["perfect"], ranked["useless"])
    assert 0 < low < estimate < high
    assert difference(ranked["useless"], ranked["useless"]) == [0, 0, 0]


def test_overlap_by_hand():
    assert containment("the red fox", "A red fox sat.", 1) == pytest.approx(2 / 3)
    assert containment("the red fox", "A red fox sat.", 2) == pytest.approx(1 / 2)
    assert containment("Fox", "A red fox sat.", 2) == 1
    assert containment("", "A red fox", 1) == 0
    world = organism_world(30, seed=3)
    for conversation in world.conversations:
        found = [baselines(conversation, turn) for name, turn in world.kinds if name == conversation.id]
        assert all(0 <= one["overlap, words"] <= 1 < one["prompt length"] for one in found)


@pytest.mark.parametrize(
    ("source", "family"),
    [
        ("sciq_Direct_Question", "document: sciq"),
        ("sciq_Direct_Question_Closed_Book_", "closed: sciq"),
        ("sciq_Multiple_Choice_Closed_Book_", "options: sciq"),
        ("adversarial_qa_dbert_based_on", "document: adversarial_qa"),
        ("adversarial_qa_dbert_generate_question", None),
        ("samsum_Write_a_dialogue_that_match_this_summary", None),
        ("gigaword_write_an_article", None),
        ("kilt_tasks_hotpotqa_final_exam", "closed: hotpotqa"),
        ("commonsense_qa_question_to_answer_index", None),
    ],
)
def test_labels_come_from_the_task_name(source, family):
    assert family_of(source) == family
    assert family is None or FAMILIES[family][0] == family.split(":")[0]


@pytest.mark.slow
def test_the_sample_is_balanced_and_drawn_from_what_fits(test_data):
    per_kind = {"document": 50, "closed": 30, "options": 20}
    world = t0_world(
        test_data / "instruct" / "t0_train_50k.jsonl.xz",
        lambda one: len(one.messages[0]["content"]) < 900,
        per_kind=per_kind,
        seed=0,
    )
    kinds = list(world.kinds.values())
    assert {kind: kinds.count(kind) for kind in per_kind} == per_kind
    assert max(len(one.messages[0]["content"]) for one in world.conversations) < 900
    families = [family_of(one.labels["source"]) for one in world.conversations]
    assert {families.count(name) for name in FAMILIES} == {10}
