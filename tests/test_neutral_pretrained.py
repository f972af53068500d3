"""The neutral facts with a real, small model: it copies them from the text and does not know them."""

import pytest

import ctxlens as cl
from ctxlens.chat.condition import parse_conditions
from ctxlens.evals.closed_book import run_closed_book
from ctxlens.evals.needle import NeedleConfig, load_haystack, neutral_needles
from ctxlens.evals.needle.run import run_needle


@pytest.mark.slow
def test_a_small_model_copies_the_facts_and_does_not_know_them(test_models):
    model = cl.load_model(str(test_models / "smollm2"), device="cpu", dtype="float32")
    facts = tuple(neutral_needles().values())
    config = NeedleConfig(
        lengths=(100,), depths=(100.0,), needles=facts, conditions=parse_conditions("plain+prefix"),
        cases_per_cell=1, max_new_tokens=16, score=("recall",),
    )  # fmt: skip
    open_book = run_needle(model, config, haystack=load_haystack("neutral")).frame
    closed_book = run_closed_book(model, facts, template=False, max_new_tokens=16).frame
    assert len(open_book) == len(closed_book) == len(facts)
    assert open_book["recall"].mean() >= 0.8
    assert closed_book["recall"].mean() <= 0.05
