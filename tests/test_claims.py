"""The verdict rules, on tables whose answers are known by hand."""

from dataclasses import replace

import numpy as np
import pytest

from ctxlens.chat.roles import N_ROLES, Role
from ctxlens.results import Ability, NeedleGrid, RoleAllocation, Scores, Selection
from ctxlens.results.claims import (
    ABILITY_TOLERANCE,
    MARGIN,
    MIN_UNITS,
    PAPERS_FIGURE,
    RECALL_LOSS,
    RULES,
    claim_cause,
    claim_cure,
    claim_loss,
    claim_role_bias,
    claim_source,
    combine,
    conflicting,
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
        (0.05, float("nan"), 1, "inconclusive"),
        (float("nan"), 0.05, 1, "inconclusive"),
        # An interval that touches zero does not lie on one side of it.
        (0.0, 0.3, 1, "inconclusive"),
        (-0.3, 0.0, -1, "inconclusive"),
        (1e-9, 0.3, 1, "supported"),
        # The margin itself still counts as a difference; anything below it does not.
        (-0.1, 0.02, 1, "inconclusive"),
        (-0.1, 0.0199, 1, "not supported"),
        (-0.02, 0.1, -1, "inconclusive"),
        (-0.0199, 0.1, -1, "not supported"),
        # Small but clear differences on the claimed side are supported.
        (0.001, 0.01, 1, "supported"),
    ],
)
def test_judge_reads_the_whole_interval(low, high, direction, expected):
    assert judge(Interval((low + high) / 2, low, high, 10), direction=direction) == expected


def test_too_few_units_decide_nothing():
    assert judge(Interval(0.2, 0.1, 0.3, 9), direction=1) == "inconclusive"
    assert judge(Interval(0.2, 0.1, 0.3, 10), direction=1) == "supported"
    assert judge(Interval(-0.2, -0.3, -0.1, 9), direction=1) == "inconclusive"


def test_the_published_thresholds():
    """Verdicts of different versions can only be compared while these stay the same."""
    assert (MARGIN, ABILITY_TOLERANCE, RECALL_LOSS, MIN_UNITS) == (0.02, 0.03, 0.25, 10)
    assert "by more than 0.03" in RULES["cure"]


def test_a_claim_of_several_parts_needs_all_of_them():
    assert combine(["supported", "supported"]) == "supported"
    assert combine(["supported", "inconclusive"]) == "inconclusive"
    assert combine(["inconclusive", "not supported"]) == "not supported"
    assert combine(["not supported", "supported"]) == "not supported"
    assert combine(["inconclusive", "inconclusive"]) == "inconclusive"


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


def flat(value, n=16):
    """The same recall in every cell, so that intervals have no width and edges can be hit exactly."""
    return [value] * n


def loss_of(base_plain, base_template, plain, template, n=16):
    table = [
        *rows("base", flat(base_plain, n), condition="plain+prefix"), *rows("base", flat(base_template, n)),
        *rows("vanilla", flat(plain, n), condition="plain+prefix"), *rows("vanilla", flat(template, n)),
    ]  # fmt: skip
    return claim_loss(NeedleGrid.from_rows(table))


def test_loss_reports_every_figure():
    verdict = loss_of(0.5, 0.375, 1.0, 0.25)
    assert verdict.figure == Interval(-0.75, -0.75, -0.75, 16)
    assert {what: figure.estimate for what, figure in verdict.notes} == {
        "base, no template: recall": 0.5,
        "base, template: recall": 0.375,
        "vanilla, no template: recall": 1.0,
        "vanilla, template: recall": 0.25,
        "change of vanilla minus change of base": -0.75 + 0.125,
    }
    assert "75 percentage points less" in verdict.sentence


@pytest.mark.parametrize(
    ("template", "size", "points"),
    [
        (0.75, "a large loss", "25 percentage points less"),
        (0.7578125, "a measurable loss", "24 percentage points less"),
        (1.0, "no clear loss", "0 percentage points more"),
    ],
)
def test_the_sentence_names_the_size_of_the_loss(template, size, points):
    verdict = loss_of(1.0, 1.0, 1.0, template)
    assert size in verdict.sentence
    assert points in verdict.sentence


@pytest.mark.parametrize(
    ("recalls", "expected"),
    [
        ((1.0, 1.0, 1.0, 0.5), "supported"),
        ((0.5, 1.0, 1.0, 0.875), "supported"),  # the base model gains, so the excess is larger than the fall
        ((1.0, 0.5, 1.0, 0.5), "not supported"),  # no more than the base model
        ((1.0, 0.0, 1.0, 0.5), "not supported"),  # less than the base model
        ((1.0, 0.5, 0.5, 0.5), "not supported"),  # no fall at all
        ((0.5, 0.0, 0.5, 1.0), "not supported"),  # a gain
    ],
)
def test_loss_needs_a_fall_and_one_beyond_the_base_models(recalls, expected):
    assert loss_of(*recalls).verdict == expected


def test_loss_is_inconclusive_with_nine_cells():
    assert loss_of(1.0, 1.0, 1.0, 0.5, n=9).verdict == "inconclusive"
    assert loss_of(1.0, 1.0, 1.0, 0.5, n=10).verdict == "supported"


def test_loss_looks_at_unsteered_rows_without_indicator_alone():
    table = [
        *rows("base", flat(1.0), condition="plain+prefix"), *rows("base", flat(1.0)),
        *rows("vanilla", flat(1.0), condition="plain+prefix"), *rows("vanilla", flat(0.5)),
        *rows("vanilla", flat(0.875), alpha=0.5, heads="all"), *rows("vanilla", flat(0.125), indicator=True),
    ]  # fmt: skip
    assert claim_loss(NeedleGrid.from_rows(table)).figure.estimate == -0.5


def test_cells_without_a_memorised_counterpart_are_left_out_where_others_have_one():
    mixed = rows("base", [1.0, 0.5, 0.25])
    mixed[1]["memory_recall"] = float("nan")
    assert conflicting(NeedleGrid.from_rows(mixed)).frame["recall"].tolist() == [1.0, 0.25]
    for row in mixed:
        row["memory_recall"] = float("nan")
    assert conflicting(NeedleGrid.from_rows(mixed)).frame["recall"].tolist() == [1.0, 0.5, 0.25]


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


def by_head(user, assistant, template, n=12):
    """Shares of two layers with two heads, alike in all `n` conversations; what is left is on BOS."""
    shares = np.zeros((2, 2, n, N_ROLES), dtype=np.float32)
    shares[..., Role.USER] = np.array(user)[..., None]
    shares[..., Role.ASSISTANT], shares[..., Role.TEMPLATE] = assistant, template
    shares[..., Role.BOS] = 1 - shares.sum(-1)
    counts = np.ones((n, N_ROLES), dtype=np.float32)
    return RoleAllocation(shares, counts, (0, 1), tuple(map(str, range(n))), "first_answer")


def test_role_bias_reports_every_figure():
    # Without template the heads with most attention on the user are (0, 1) and (1, 0). With it half of the
    # attention is on the template, so renormalised shares are twice the raw ones.
    plain = by_head([[0.25, 0.75], [0.5, 0.25]], 0.125, 0.0)
    template = by_head([[0.25, 0.125], [0.125, 0.0]], 0.25, 0.5)
    base = by_head([[0.5, 0.5], [0.5, 0.5]], 0.0, 0.0)
    base_template = by_head([[0.1875, 0.1875], [0.1875, 0.1875]], 0.0, 0.5)
    verdict = claim_role_bias(plain, template, base, base_template)
    # Renormalised, mean over heads: 0.4375 without; 0.25 with. Base model: 0.5 and 0.375.
    assert verdict.figure.estimate == pytest.approx(0.25 - 0.4375, abs=1e-6)
    assert "19 percentage points less" in verdict.sentence
    expected = {
        "change of the fine-tuned model minus change of the base": -0.1875 + 0.125,
        "assistant's share, renormalised: change": 0.5 - 0.125,
        "user's share, raw (template tokens counted): change": 0.125 - 0.4375,
        "retrieval heads' user share, renormalised: change": (0.25 + 0.25) / 2 - (0.75 + 0.5) / 2,
        "template's own share, raw": 0.5,
    }
    assert {what: figure.estimate for what, figure in verdict.notes} == pytest.approx(expected, abs=1e-6)
    assert verdict.verdict == "supported"


def test_role_bias_needs_a_shift_beyond_the_base_models():
    high, low = allocation([0.72] * 12), allocation([0.36] * 12)
    lower = allocation([0.18] * 12)
    assert claim_role_bias(high, low, high, low).verdict == "not supported"
    assert claim_role_bias(high, low, high, lower).verdict == "not supported"
    assert claim_role_bias(high, lower, high, low).verdict == "supported"
    assert claim_role_bias(high, high, low, high).verdict == "not supported"


def on_bos(one):
    """The same allocation with all attention to BOS measured as resting."""
    resting = np.zeros_like(one.shares)
    resting[..., Role.BOS] = one.shares[..., Role.BOS]
    return replace(one, resting=resting)


def test_role_bias_is_judged_without_sinks_and_the_papers_figure_stands_beside():
    # Renormalised, the user's share falls from .8 to .4 because BOS takes over; without BOS it stays 1 of 1.
    plain, template = allocation([0.72] * 12), allocation([0.36] * 12)
    counted = claim_role_bias(plain, template, plain, plain)
    assert (counted.verdict, counted.figure.estimate) == ("supported", pytest.approx(-0.4, abs=1e-6))
    assert "attention sinks were not measured" in counted.sentence
    assert counted.rule.endswith("so they count.")
    sinkless = claim_role_bias(*map(on_bos, (plain, template, plain, plain)))
    assert (sinkless.verdict, sinkless.figure.estimate) == ("not supported", pytest.approx(0, abs=1e-6))
    notes = {what: figure.estimate for what, figure in sinkless.notes}
    assert notes[f"{PAPERS_FIGURE}: user's share, renormalised"] == pytest.approx(-0.4, abs=1e-6)
    excess = f"{PAPERS_FIGURE}: change of the fine-tuned model minus change of the base"
    assert notes[excess] == pytest.approx(-0.4, abs=1e-6)
    # With the template's .1 kept: .72 of .82 and .36 of .46.
    what = "user's share, without sinks (template tokens counted): change"
    assert notes[what] == pytest.approx(0.36 / 0.46 - 0.72 / 0.82, abs=1e-6)
    assert "40 percentage points less (verdict: supported)" in sinkless.sentence
    one_old = claim_role_bias(*map(on_bos, (plain, template, plain)), plain)
    assert one_old.figure == counted.figure


def test_role_bias_counts_texts_not_conversations():
    high, low = allocation([0.72] * 18), allocation([0.36] * 18)
    nine, eighteen = [k // 2 for k in range(18)], list(range(18))
    verdict = claim_role_bias(high, low, high, high, contexts=nine)
    assert verdict.verdict == "inconclusive"
    assert [figure.n for _, figure in verdict.notes] == [9] * 5
    assert claim_role_bias(high, low, high, high, contexts=eighteen).verdict == "supported"


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


def steered(gains, base=0.25, n=24):
    """A sweep whose gains over the unsteered model are given as (even cells, odd cells)."""
    table = rows("vanilla", flat(base, n))
    for (heads, alpha), (even, odd) in gains.items():
        found = [base + (odd if cell % 2 else even) for cell in range(n)]
        table += rows("vanilla", found, alpha=alpha, heads=heads)
    return NeedleGrid.from_rows(table)


GAINS = {
    ("all", 0.5): (0.5, 0.25), ("all", 0.1): (0.25, 0.5),
    ("retrieval", 0.5): (0.0, 0.5), ("retrieval", 0.1): (0.25, 0.375),
    ("random", 0.5): (0.5, 0.5), ("random", 0.1): (0.0, 0.125),
}  # fmt: skip


def test_cause_chooses_alpha_on_even_cells_and_judges_odd_ones():
    """All heads do best at 0.5 on even cells, retrieval heads at 0.1; odd cells would say the opposite."""
    verdict = claim_cause(steered(GAINS))
    assert "α = 0.5" in verdict.sentence
    assert "25 percentage points more" in verdict.sentence
    assert verdict.figure == Interval(0.25, 0.25, 0.25, 12)
    assert {what: figure.estimate for what, figure in verdict.notes} == {
        "retrieval heads' gain at their α": 0.375,
        "random heads' gain at the same α": 0.125,
        "retrieval minus random": 0.25,
        "answers from memory: change with all heads": -0.25,
    }
    assert verdict.verdict == "supported"


@pytest.mark.parametrize(
    ("all_heads", "retrieval", "random", "expected"),
    [
        (0.5, 0.5, 0.25, "supported"),
        (0.5, 0.25, 0.25, "not supported"),
        (0.0, 0.5, 0.25, "not supported"),
        (-0.125, 0.5, 0.25, "not supported"),
    ],
)
def test_both_parts_of_the_cause_must_hold(all_heads, retrieval, random, expected):
    gains = {("all", 0.1): all_heads, ("retrieval", 0.1): retrieval, ("random", 0.1): random}
    grid = steered({key: (gain, gain) for key, gain in gains.items()})
    assert claim_cause(grid).verdict == expected


def test_cause_needs_ten_cells_that_did_not_choose_alpha():
    assert claim_cause(steered(GAINS, n=19)).verdict == "inconclusive"
    assert claim_cause(steered(GAINS, n=20)).verdict == "supported"


def test_cause_reports_the_cost_at_the_chosen_alpha_where_it_was_measured():
    def ability(recall):
        return Ability.from_rows(answers("vanilla", [recall] * 8))

    what = "closed-book recall: change with all heads"
    measured = {1.0: ability(1.0), 0.5: ability(0.75), 0.1: ability(0.0)}
    assert dict(claim_cause(steered(GAINS), ability=measured).notes)[what].estimate == -0.25
    for missing in (1.0, 0.5):
        partly = {alpha: found for alpha, found in measured.items() if alpha != missing}
        assert what not in dict(claim_cause(steered(GAINS), ability=partly).notes)


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


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (0.2, "supported"),
        (0.8, "not supported"),  # ranked above the document turns, though below the threshold
        (0.6, "not supported"),  # ties: AUROC 0.5
    ],
)
def test_source_needs_a_rank_above_turns_answered_from_memory(memory, expected):
    data = [("document", 0.6)] * 12 + [("memory", memory)] * 12 + [("closed", 0.1)] * 40
    verdict = claim_source(*scored(data, 0.5))
    assert verdict.figure.estimate > 0.1
    assert verdict.verdict == expected


def test_source_is_not_supported_where_the_selection_is_no_better_than_the_base_rate():
    data = [("document", 0.9)] * 10 + [("document", 0.3)] * 10
    data += [("memory", 0.2)] * 10 + [("closed", 0.9)] * 10
    verdict = claim_source(*scored(data, 0.5))
    assert (verdict.figure.estimate, verdict.figure.n) == (0.0, 20)
    assert verdict.verdict != "supported"
    assert dict(verdict.notes)["recall of the selection"].estimate == 0.5
    # Against all others: 10 of 20 document turns tie with 10 of 20 others and beat 10; 10 beat 10 only.
    assert dict(verdict.notes)["AUROC against all other turns"].estimate == (10 * 15 + 10 * 10) / 400
    assert "50% of the turns score above" in verdict.sentence
    assert "50% of these are truly answered from the context, where 50% of all" in verdict.sentence


def test_source_reads_the_layer_and_reduction_of_the_selection():
    data = [("document", 0.9)] * 12 + [("memory", 0.1)] * 12
    scores, selection = scored(data, 0.5)
    elsewhere = scores.frame.assign(layer=0, mean_of_best=1 - scores.frame["mean_of_best"])
    wrong = dict.fromkeys(("best_of_mean", "mean_heads"), 0.5)
    table = [*elsewhere.to_dict("records"), *scores.frame.assign(**wrong).to_dict("records")]
    verdict = claim_source(Scores.from_rows(table), selection)
    assert dict(verdict.notes)["AUROC against all other turns"].estimate == 1.0
    assert verdict.figure.estimate == 0.5


def test_turns_of_one_conversation_are_one_unit_of_precision():
    data = [("document", 0.9)] * 18 + [("memory", 0.1)] * 18
    scores, selection = scored(data, 0.5)
    pairs = {f"c{i}": (f"c{i // 2}", 1 + 2 * (i % 2)) for i in range(36)}

    def regrouped(frame):
        rows = [pairs[name] for name in frame["conversation"].astype(str)]
        return frame.assign(conversation=[name for name, _ in rows], turn=[turn for _, turn in rows])

    verdict = claim_source(
        Scores.from_rows(regrouped(scores.frame).to_dict("records")),
        Selection.from_rows(regrouped(selection.frame).to_dict("records"), selection.meta),
    )
    assert verdict.figure.n == 9
    assert dict(verdict.notes)["recall of the selection"].n == 9
    assert verdict.verdict == "inconclusive"


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


def cure_of(vanilla, plain, asked, unasked, cost=(1.0, 1.0), n=16):
    table = [
        *rows("vanilla", flat(plain, n), condition="plain+prefix"), *rows("vanilla", flat(vanilla, n)),
        *rows("indicator", flat(asked, n), indicator=True), *rows("indicator", flat(unasked, n)),
    ]  # fmt: skip
    before, after = (flat(value, 8) for value in cost)
    ability = [*answers("vanilla", before), *answers("indicator", after)]
    # Answers to questions with the indicator do not count here.
    ability += answers("indicator", flat(0.0, 8), indicator=True)
    return claim_cure(NeedleGrid.from_rows(table), Ability.from_rows(ability))


def test_cure_reports_every_figure():
    verdict = cure_of(0.25, 0.75, 0.625, 0.375, cost=(0.5, 1.0))
    assert verdict.figure == Interval(0.375, 0.375, 0.375, 16)
    assert "38 percentage points more" in verdict.sentence
    assert dict(verdict.notes) == {
        "share of the loss restored": Interval(0.75, 0.75, 0.75, 16),
        "recall with indicator": Interval(0.625, 0.625, 0.625, 16),
        "trained with the indicator, asked without it: change from vanilla": Interval(
            0.125, 0.125, 0.125, 16
        ),
        "closed-book recall: change": Interval(0.5, 0.5, 0.5, 8),
    }


@pytest.mark.parametrize(
    ("asked", "cost", "expected"),
    [
        (0.75, (1.0, 1.0), "supported"),
        (0.75, (0.0, 1.0), "supported"),  # better without context: no harm
        (0.75, (0.03, 0.0), "supported"),  # exactly the tolerance
        (0.75, (0.03125, 0.0), "not supported"),
        (0.25, (1.0, 1.0), "not supported"),  # no gain
        (0.0, (1.0, 1.0), "not supported"),
    ],
)
def test_cure_needs_a_gain_and_closed_book_recall_within_the_tolerance(asked, cost, expected):
    assert cure_of(0.25, 0.75, asked, 0.25, cost=cost).verdict == expected


def test_cure_is_inconclusive_with_nine_cells():
    assert cure_of(0.25, 0.75, 0.5, 0.25, n=9).verdict == "inconclusive"


@pytest.mark.parametrize(("plain", "told"), [(0.02, False), (0.03125, True), (0.0, False)])
def test_the_share_of_the_loss_is_told_only_where_there_is_a_loss(plain, told):
    notes = dict(cure_of(0.0, plain, 0.5, 0.25).notes)
    assert ("share of the loss restored" in notes) == told


def test_what_was_not_measured_is_said():
    grid = NeedleGrid.from_rows(rows("vanilla", flat(0.5)) + rows("base", flat(0.5)))
    verdict = claim_loss(grid)
    assert verdict.verdict == "inconclusive"
    assert "no measured share" in verdict.sentence


@pytest.mark.parametrize("direction", [0, 2, -2])
def test_a_direction_is_one_or_minus_one(direction):
    with pytest.raises(ValueError, match="direction is 1 or -1"):
        judge(Interval(0.2, 0.1, 0.3, 20), direction=direction)


def test_all_even_cells_choose_alpha_not_the_first_alone():
    table = rows("vanilla", flat(0.25, 24))
    for heads in ("all", "retrieval", "random"):
        table += rows("vanilla", [1.0, *flat(0.25, 23)], alpha=0.1, heads=heads)  # best in cell 0 alone
        table += rows("vanilla", flat(0.5, 24), alpha=0.5, heads=heads)
    assert "α = 0.5" in claim_cause(NeedleGrid.from_rows(table)).sentence


def test_the_share_of_the_loss_is_the_first_note():
    assert cure_of(0.25, 0.75, 0.625, 0.375).notes[0][0] == "share of the loss restored"


def test_the_figure_of_the_source_is_the_precision_less_the_base_rate():
    data = [("document", 0.8), ("document", 0.3), ("memory", 0.7), ("closed", 0.1)] * 5
    verdict = claim_source(*scored(data, 0.5))
    precision = dict(verdict.notes)["precision of the selection"]
    assert (precision.estimate, precision.n) == (0.5, 10)
    assert precision.low < 0.5 < precision.high
    assert verdict.figure == Interval(0.0, precision.low - 0.5, precision.high - 0.5, 10)
