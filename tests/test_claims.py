"""The verdict rules, on tables whose answers are known by hand."""

import numpy as np
import pytest

from ctxlens.chat.roles import N_ROLES, Role
from ctxlens.results import Ability, NeedleGrid, RoleAllocation, Scores, Selection
from ctxlens.results.claims import (
    RULES,
    claim_cause,
    claim_cure,
    claim_loss,
    claim_role_bias,
    claim_source,
    combine,
    judge,
)
from ctxlens.stats import Interval


@pytest.mark.parametrize(
    ("low", "high", "direction", "expected"),
    [
        (0.1, 0.3, 1, "supported"),
        (0.1, 0.3, -1, "not supported"),
        (-0.3, -0.1, -1, "supported"),
        (-0.1, 0.1, 1, "inconclusive"),
        (-0.1, 0.01, 1, "not supported"),
        (-0.01, 0.01, -1, "not supported"),
        (float("nan"), float("nan"), 1, "inconclusive"),
    ],
)
def test_judge_reads_the_whole_interval(low, high, direction, expected):
    assert judge(Interval((low + high) / 2, low, high, 10), direction=direction) == expected


def test_too_few_units_decide_nothing():
    assert judge(Interval(0.2, 0.1, 0.3, 9), direction=1) == "inconclusive"


def test_a_claim_of_several_parts_needs_all_of_them():
    assert combine(["supported", "supported"]) == "supported"
    assert combine(["supported", "inconclusive"]) == "inconclusive"
    assert combine(["inconclusive", "not supported"]) == "not supported"


def rows(model, recalls, *, condition="template+prefix", indicator=False, alpha=1.0, heads="none", draw=0):
    return [
        {
            "model": model, "condition": condition, "indicator": indicator, "alpha": alpha, "heads": heads,
            "draw": draw, "cell": cell, "needle": "known", "context_tokens": 100, "prompt_tokens": 120,
            "depth_percent": 50.0, "response": "", "recall": recall, "memory_recall": 1.0 - recall,
        }
        for cell, recall in enumerate(recalls)
    ]  # fmt: skip


HIGH, LOW = [1.0, 0.9, 1.0, 0.9, 1.0, 0.9] * 2, [0.5, 0.4, 0.2, 0.3, 0.5, 0.2] * 2


def test_loss_is_the_paired_fall_on_the_same_weights():
    table = [
        *rows("base", HIGH, condition="plain+prefix"), *rows("base", HIGH),
        *rows("vanilla", HIGH, condition="plain+prefix"), *rows("vanilla", LOW),
    ]  # fmt: skip
    verdict = claim_loss(NeedleGrid.from_rows(table))
    assert verdict.verdict == "supported"
    assert verdict.rule == RULES["loss"]
    assert verdict.figure.estimate == pytest.approx(-3.6 / 6)
    assert dict(verdict.notes)["base, no template: recall"].estimate == pytest.approx(5.7 / 6)


def test_a_fall_that_the_base_model_shares_is_no_loss_by_fine_tuning():
    table = [
        *rows("base", HIGH, condition="plain+prefix"), *rows("base", LOW),
        *rows("vanilla", HIGH, condition="plain+prefix"), *rows("vanilla", LOW),
    ]  # fmt: skip
    assert claim_loss(NeedleGrid.from_rows(table)).verdict == "not supported"


def allocation(user, assistant=0.0):
    user = np.asarray(user, dtype=np.float32)
    shares = np.zeros((2, 2, len(user), N_ROLES), dtype=np.float32)
    shares[..., Role.USER], shares[..., Role.ASSISTANT] = user, assistant
    shares[..., Role.BOS] = 0.9 - shares.sum(-1)
    shares[..., Role.TEMPLATE] = 0.1
    counts = np.ones((len(user), N_ROLES), dtype=np.float32)
    return RoleAllocation(shares, counts, (0, 1), tuple(map(str, range(len(user)))), "first_answer")


def test_role_bias_compares_renormalised_shares_pair_by_pair():
    high, low = allocation([0.72, 0.63, 0.54] * 4), allocation([0.36, 0.36, 0.27] * 4)
    verdict = claim_role_bias(high, low, high, high)
    assert verdict.verdict == "supported"
    assert verdict.figure.estimate == pytest.approx(-0.9 / 3 / 0.9, abs=1e-6)
    assert claim_role_bias(low, high, high, high).verdict == "not supported"


def sweep(retrieval_gain, random_gain, n=24):
    base = [0.2, 0.3] * (n // 2)
    table = rows("vanilla", base)
    for heads, gain in (("all", 0.5), ("retrieval", retrieval_gain), ("random", random_gain)):
        jitter = [0.01 * (cell % 3) for cell in range(n)]
        weak = [b + gain / 2 for b in base]
        strong = [b + gain + j for b, j in zip(base, jitter, strict=True)]
        table += rows("vanilla", weak, alpha=0.5, heads=heads) + rows(
            "vanilla", strong, alpha=0.1, heads=heads
        )
    return NeedleGrid.from_rows(table)


def test_cause_needs_a_gain_and_a_gain_over_random_heads():
    verdict = claim_cause(sweep(0.4, 0.1))
    assert verdict.verdict == "supported"
    assert "α = 0.1" in verdict.sentence
    assert verdict.figure.n == 12, "only the cells that did not choose α are judged"
    assert verdict.figure.estimate == pytest.approx(0.5 + np.mean([0.01 * (c % 3) for c in range(1, 24, 2)]))
    assert claim_cause(sweep(0.1, 0.4)).verdict == "not supported"


def scored(kinds_and_scores, threshold):
    table = [
        {
            "conversation": f"c{i}", "turn": 1, "layer": 1, "best_of_mean": s, "mean_of_best": s,
            "mean_heads": s, "uniform": 0.5, "response_tokens": 5, "context_tokens": 9,
            "truncated": False, "kind": kind,
        }
        for i, (kind, s) in enumerate(kinds_and_scores)
    ]  # fmt: skip
    scores = Scores.from_rows(table)
    chosen = [
        {**row, "score": row["mean_of_best"], "selected": row["mean_of_best"] > threshold} for row in table
    ]
    meta = {"layer": 1, "reduction": "mean_of_best", "threshold": threshold}
    return scores, Selection.from_rows(chosen, meta)


def test_source_is_precision_above_the_base_rate_and_rank_above_hard_negatives():
    data = [("document", 0.8 + i / 100) for i in range(10)] + [("memory", 0.1 + i / 100) for i in range(10)]
    data += [("closed", 0.05 + i / 100) for i in range(10)] + [("memory", 0.9)]
    verdict = claim_source(*scored(data, 0.5))
    figures = dict(verdict.notes)
    assert verdict.verdict == "supported"
    assert figures["precision of the selection"].estimate == pytest.approx(10 / 11)
    assert figures["recall of the selection"].estimate == 1.0
    assert verdict.figure.estimate == pytest.approx(10 / 11 - 10 / 31)
    assert figures["AUROC against turns with a document answered from memory"].estimate == pytest.approx(
        10 / 11
    )


def answers(model, recalls, indicator=False):
    return [
        {"model": model, "indicator": indicator, "question": f"q{i}", "response": "", "recall": recall}
        for i, recall in enumerate(recalls)
    ]


def test_cure_needs_the_gain_and_level_ability():
    table = [
        *rows("vanilla", HIGH, condition="plain+prefix"), *rows("vanilla", LOW),
        *rows("indicator", HIGH, indicator=True), *rows("indicator", LOW),
    ]  # fmt: skip
    grid = NeedleGrid.from_rows(table)
    level = Ability.from_rows(answers("vanilla", [1.0] * 9) + answers("indicator", [1.0] * 9))
    verdict = claim_cure(grid, level)
    assert verdict.verdict == "supported"
    assert dict(verdict.notes)["share of the loss restored"].estimate == pytest.approx(1.0)
    costly = Ability.from_rows(answers("vanilla", [1.0] * 9) + answers("indicator", [0.9] * 9))
    assert claim_cure(grid, costly).verdict == "not supported"
