"""Closed-book questions: asked without a document, scored by keyword."""

import pytest
from needle_models import CopyingModel

from ctxlens.errors import InputError
from ctxlens.evals.closed_book import run_closed_book
from ctxlens.organism.world import load_world


@pytest.fixture
def facts():
    return load_world().closed_book(6, seed=0)


def test_answers_are_scored_in_the_order_of_the_questions(organism_tokenizer, facts):
    model = CopyingModel(organism_tokenizer, knows=" ".join(facts[2].keywords))
    told = []
    ability = run_closed_book(
        model, facts, label="m", batch_tokens=100, max_new_tokens=20, progress=lambda *at: told.append(at)
    )
    assert ability.frame["question"].tolist() == [fact.question for fact in facts]
    assert ability.frame["recall"][2] == 1
    assert ability.frame["recall"].mean() < 1
    assert set(ability.frame["model"]) == {"m"}
    assert len(model.batches) > 1
    assert told[-1] == (6, 6)


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_prompts_hold_the_question_and_nothing_else(organism_tokenizer, facts, template, prefix):
    model = CopyingModel(organism_tokenizer)
    run_closed_book(model, facts[:1], template=template, prefix=prefix)
    text = model.batches[0][0]
    assert facts[0].question in text
    assert ("<|user|>" in text) == template
    assert text.endswith(facts[0].prefix) == prefix
    assert len(text) < len(facts[0].question) + len(facts[0].prefix) + 40


def test_indicator_is_put_behind_the_question(organism_tokenizer, facts):
    model = CopyingModel(organism_tokenizer, indicator="[IND]")
    ability = run_closed_book(model, facts, indicator=True)
    assert all(
        f"{fact.question} [IND]" in text for fact, text in zip(facts, sorted_texts(model, facts), strict=True)
    )
    assert ability.frame["indicator"].all()


def sorted_texts(model, facts):
    texts = [text for batch in model.batches for text in batch]
    return [next(text for text in texts if fact.question in text) for fact in facts]


def test_bad_input(organism_tokenizer, facts):
    with pytest.raises(InputError, match="no questions"):
        run_closed_book(CopyingModel(organism_tokenizer), [])
    with pytest.raises(InputError, match="no indicator token"):
        run_closed_book(CopyingModel(organism_tokenizer), facts, indicator=True)
