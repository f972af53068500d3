"""The five answers of an audit, on tables whose results are known by hand."""

from dataclasses import replace

import numpy as np
import pytest

from ctxlens.chat.roles import N_ROLES, Role
from ctxlens.results import Ability, HeadMap, NeedleGrid, RoleAllocation
from ctxlens.results.audit import (
    PLAIN,
    QUESTIONS,
    RULES,
    TEMPLATE,
    answer_bias,
    answer_cause,
    answer_cost,
    answer_loss,
    answer_template,
    choose_alpha,
    failed,
    texts_needed,
)
from ctxlens.stats import Interval


def rows(condition, recalls, *, length=1000, heads="none", alpha=1.0, draw=0, first_cell=0, first_text=0):
    """One row per text: the cell, its text and its recall."""
    return [
        {
            "model": "m", "condition": condition, "indicator": False, "alpha": alpha, "heads": heads,
            "draw": draw, "cell": first_cell + i, "needle": "n", "context_tokens": length,
            "prompt_tokens": length, "depth_percent": 50.0, "response": "x", "recall": recall,
            "memory_recall": float("nan"), "case": first_text + i,
        }
        for i, recall in enumerate(recalls)
    ]  # fmt: skip


def grid(*parts):
    return NeedleGrid.from_rows([row for part in parts for row in part])


def around(mean, n=12, spread=0.02):
    """Values that alternate a little around a mean."""
    return [mean + spread * (1 if i % 2 else -1) for i in range(n)]


def test_every_question_has_a_rule():
    assert list(QUESTIONS) == list(RULES)


@pytest.mark.parametrize(
    ("plain", "template", "expected"),
    [
        (around(0.8), around(0.5), "supported"),
        (around(0.8), around(0.8), "not supported"),
        (around(0.8), around(0.9), "not supported"),
        ([0.0, 1.0] * 6, [1.0, 0.0] * 6, "inconclusive"),
        (around(0.8, 9), around(0.5, 9), "inconclusive"),  # fewer than ten texts decide nothing
        (around(0.1), around(0.0), "inconclusive"),  # almost nothing is found in either case
    ],
)
def test_a_loss_is_a_fall_over_texts(plain, template, expected):
    found = answer_loss(grid(rows(PLAIN, plain), rows(TEMPLATE, template)))
    assert found.verdict == expected
    assert found.figure.estimate == pytest.approx(np.mean(template) - np.mean(plain))


def test_the_longest_texts_decide_and_the_others_are_noted():
    long = (rows(PLAIN, around(0.8), length=2000), rows(TEMPLATE, around(0.8), length=2000))
    short = (
        rows(PLAIN, around(0.9), length=500, first_cell=20),
        rows(TEMPLATE, around(0.4), length=500, first_cell=20),
    )
    found = answer_loss(grid(*long, *short))
    assert found.verdict == "not supported"
    assert "At 2,000 tokens" in found.sentence
    assert dict(found.notes)["change at 500 tokens"].estimate == pytest.approx(-0.5)


def test_questions_about_one_text_are_one_unit():
    """Forty questions about eight texts are eight units, too few to decide."""
    plain = [row for i in range(5) for row in rows(PLAIN, around(0.8, 8), first_cell=8 * i)]
    template = [row for i in range(5) for row in rows(TEMPLATE, around(0.5, 8), first_cell=8 * i)]
    found = answer_loss(grid(plain, template))
    assert found.figure.n == 8
    assert found.verdict == "inconclusive"


def test_a_comparison_gives_the_change_of_both_models():
    this = grid(rows(PLAIN, around(0.8)), rows(TEMPLATE, around(0.5)))
    other = grid(rows(PLAIN, around(0.7)), rows(TEMPLATE, around(0.6)))
    notes = dict(answer_loss(this, baseline=other).notes)
    assert notes["change of the model that it is compared with"].estimate == pytest.approx(-0.1)
    assert notes["change of this model minus change of that one"].estimate == pytest.approx(-0.2)


@pytest.mark.parametrize(("matched", "expected"), [(0.8, "supported"), (0.5, "not supported")])
def test_the_template_is_compared_with_neutral_text_of_its_length(matched, expected):
    table = grid(rows(PLAIN, around(0.8)), rows(TEMPLATE, around(0.5)))
    controls = grid(
        rows("plain+matched+prefix", around(matched)), rows("template+nosystem+prefix", around(0.6))
    )
    found = answer_template(table, controls)
    assert found.verdict == expected
    assert found.figure.estimate == pytest.approx(0.5 - matched)
    notes = dict(found.notes)
    assert notes["neutral text of the template's length: change from plain"].estimate == pytest.approx(
        matched - 0.8
    )
    assert notes["template without default system prompt: change from template"].estimate == pytest.approx(
        0.1
    )


def allocation(user, sink, n=12, period=2):
    """Shares of one layer and head: the user's, of which `sink` rests on sinks; the template has the rest."""
    shares = np.zeros((1, 1, n, N_ROLES), dtype=np.float32)
    resting = np.zeros_like(shares)
    shares[..., Role.USER] = user + 0.01 * np.array([(-1) ** (i // (period - 1)) for i in range(n)])
    shares[..., Role.ASSISTANT] = 0.1
    shares[..., Role.TEMPLATE] = 1 - shares.sum(-1)
    resting[..., Role.USER] = sink
    labels = tuple(str(i) for i in range(n))
    return RoleAllocation(shares, np.ones((n, N_ROLES)), (0,), labels, "first_answer", {}, resting)


def test_attention_on_sinks_is_no_bias():
    """The user's share falls from .8 to .3, but .5 of it rested on the user's first token."""
    found = answer_bias(allocation(0.8, 0.5), allocation(0.3, 0.0, period=3))
    assert found.verdict == "not supported"
    assert found.figure.estimate == pytest.approx(0.0, abs=1e-4)
    notes = dict(found.notes)
    assert notes["the paper's figure (renormalised, sinks counted): change"].estimate == pytest.approx(
        0.3 / 0.4 - 0.8 / 0.9, abs=0.01
    )
    assert notes["raw share: change"].estimate == pytest.approx(-0.5, abs=1e-6)
    assert notes["share on sinks without template"].estimate == pytest.approx(0.5)


def test_attention_that_moves_to_others_is_a_bias():
    assert answer_bias(allocation(0.8, 0.0), allocation(0.3, 0.0)).verdict == "supported"


def test_the_heads_that_lose_most_of_the_fact_are_named():
    effects = np.zeros((12, 2, 3))
    before, after = effects.copy(), effects.copy()
    before[:, 1, 2], before[:, 0, 1], before[:, 1, 0] = 0.9, 0.5, 0.3
    maps = tuple(HeadMap(one, np.arange(12), "fact") for one in (before, after))
    found = answer_bias(allocation(0.8, 0.0), allocation(0.3, 0.0), maps)
    assert "1.2, 0.1, 1.0" in found.sentence
    change = dict(found.notes)["attention to the fact asked for: change"]
    assert change.estimate == pytest.approx(-1.7 / 6)


def test_alpha_is_the_best_on_its_texts_and_the_weakest_of_equals():
    unsteered = grid(rows(TEMPLATE, around(0.5)))
    tried = grid(
        rows(TEMPLATE, around(0.6), heads="all", alpha=0.5),
        rows(TEMPLATE, around(0.7), heads="all", alpha=0.2),
        rows(TEMPLATE, around(0.7), heads="all", alpha=0.07),
        rows(TEMPLATE, around(0.9), heads="retrieval", alpha=0.5),
    )
    assert choose_alpha(tried, unsteered, "all") == 0.2


def steered(all_, retrieval, random, plain):
    return grid(
        rows(TEMPLATE, around(all_), heads="all", alpha=0.2),
        rows(TEMPLATE, around(retrieval), heads="retrieval", alpha=0.1),
        rows(TEMPLATE, around(random - 0.05), heads="random", alpha=0.1, draw=0),
        rows(TEMPLATE, around(random + 0.05), heads="random", alpha=0.1, draw=1),
        rows(PLAIN, around(plain), heads="all", alpha=0.2),
    )


@pytest.mark.parametrize(
    ("all_", "retrieval", "random", "plain", "expected", "figure", "why"),
    [
        (0.8, 0.8, 0.6, 0.8, "supported", 0.3, "is a cause"),
        (0.8, 0.8, 0.8, 0.8, "not supported", 0.0, "random heads do as much"),
        (0.8, 0.8, 0.6, 1.1, "not supported", 0.0, "it rises without the template too"),
        (0.5, 0.8, 0.6, 0.5, "not supported", 0.0, "recall does not rise"),
    ],
)
def test_a_cause_needs_a_gain_and_both_controls(all_, retrieval, random, plain, expected, figure, why):
    """The figure shown first is the one that decides."""
    unsteered = grid(rows(PLAIN, around(0.8)), rows(TEMPLATE, around(0.5)))
    found = answer_cause(unsteered, steered(all_, retrieval, random, plain))
    assert found.verdict == expected
    assert found.figure.estimate == pytest.approx(figure)
    assert why in found.sentence
    notes = dict(found.notes)
    assert notes["difference of these two"].estimate == pytest.approx((all_ - 0.5) - (plain - 0.8))
    assert notes["these heads minus random ones"].estimate == pytest.approx(retrieval - random)


@pytest.mark.parametrize(("after", "expected"), [(0.3, "supported"), (0.9, "not supported")])
def test_a_cost_is_a_fall_of_knowledge(after, expected):
    def table(recalls, alpha):
        return [
            {
                "model": "m",
                "indicator": False,
                "question": str(i),
                "response": "",
                "recall": one,
                "alpha": alpha,
            }
            for i, one in enumerate(recalls)
        ]

    ability = Ability.from_rows(table(around(0.9), 1.0) + table(around(after), 0.2))
    assert answer_cost(ability, 0.2).verdict == expected


def test_texts_needed_by_hand():
    """An interval of −.1 ± .2 over 10 texts excludes zero at half its width, so with four times as many."""
    needed = texts_needed(Interval(-0.1, -0.3, 0.1, 10), direction=-1, margin=0.1)
    assert needed is not None
    assert needed.texts == 41
    assert texts_needed(Interval(-0.1, -0.1, -0.1, 10), direction=-1, margin=0.1) is None


def test_questions_are_answered_with_yes_and_no():
    yes = answer_loss(grid(rows(PLAIN, around(0.8)), rows(TEMPLATE, around(0.5))))
    no = answer_loss(grid(rows(PLAIN, around(0.8)), rows(TEMPLATE, around(0.8))))
    assert (yes.word, no.word) == ("yes", "no")
    assert replace(yes, rule="Supported if it is.").word == "supported"


def test_only_a_yes_fails():
    yes = answer_loss(grid(rows(PLAIN, around(0.8)), rows(TEMPLATE, around(0.5))))
    assert failed([yes], ["loss", "bias"]) == ["loss"]
    assert failed([yes], ["bias"]) == []
