"""Verbs as functions, and messages where rendered conversations were needed before."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import make_tiny, make_tokenizer

import ctxlens as cl
from ctxlens.errors import InputError
from ctxlens.evals.needle import Needle, NeedleConfig, load_haystack, run_needle
from ctxlens.evals.needle.study import plan_needles
from ctxlens.heads.drift import Side, read_drift
from ctxlens.models import Model
from ctxlens.models.asking import render_given
from ctxlens.results import Drift, NeedleGrid, RoleAllocation, Scores

ASKED = [{"role": "user", "content": "w5 w6 w7"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "w8 w9"}]
FACT = Needle("gate", "w40 w41 w42 .", "w43 w40 ?", ("w42",))
STRAW = [f"w{i} w{i + 1} w{i + 2} ." for i in range(50, 150)]


def wrap(seed=0):
    return Model.from_hf(make_tiny("llama-mqa", seed=seed), make_tokenizer(), name=f"tiny{seed}")


@pytest.fixture(scope="module")
def model():
    return wrap()


def same(first, second):
    np.testing.assert_array_equal(first.shares, second.shares)
    assert (first.query_labels, first.meta) == (second.query_labels, second.meta)


def test_read_roles_takes_messages(model):
    chat = model.render(ASKED, add_generation_prompt=True)
    same(model.read_roles(ASKED), model.read_roles(chat))
    same(model.read_roles("w5 w6 w7"), model.read_roles(chat))
    plain = model.read_roles(ASKED, condition="plain")
    same(plain, model.read_roles(model.render_plain(ASKED, add_generation_prompt=True)))
    assert plain.meta["condition"] == "plain"
    answered = model.read_roles(ANSWERED, queries="response_mean")
    same(answered, model.read_roles(model.render(ANSWERED), queries="response_mean"))
    several = model.read_roles([ASKED, "w9"])
    assert [type(one) for one in several] == [RoleAllocation] * 2
    assert model.read_roles([]) == []


def test_generate_takes_messages(model):
    chat = model.render(ASKED, add_generation_prompt=True)
    expected = model.generate(chat, max_new_tokens=4)
    assert model.generate(ASKED, max_new_tokens=4) == expected
    assert model.generate("w5 w6 w7", max_new_tokens=4) == expected
    assert model.generate([ASKED, ASKED], max_new_tokens=4) == [expected] * 2
    continued = model.render(ANSWERED, continue_final_message=True)
    assert model.generate(ANSWERED, max_new_tokens=4) == model.generate(continued, max_new_tokens=4)


@pytest.mark.parametrize(
    ("given", "condition", "said"),
    [
        (
            ASKED,
            "template+steered:0.5",
            "as 'template+steered:0.5'; choose from template,",
        ),
        (ASKED, "assistant", "cannot be rendered as 'assistant'"),
        (ASKED, "template+indicator", "tiny0 has no indicator"),
        ("  ", None, "the text of the user message is empty"),
        ([ASKED, [{"role": "nobody", "content": "x"}]], None, "nobody"),
        (Path("missing.json"), None, "missing.json"),
    ],
)
def test_what_cannot_be_asked_is_refused(model, given, condition, said):
    with pytest.raises(InputError, match=said.replace("+", r"\+")):
        model.generate(given, condition=condition)


def test_rendered_conversations_are_not_rendered_again(model):
    chat = model.render(ASKED, add_generation_prompt=True)
    with pytest.raises(InputError, match="cannot be rendered again"):
        model.read_roles(chat, condition="plain")
    with pytest.raises(InputError, match="cannot be rendered again"):
        model.read_roles([chat, ASKED])


def test_a_file_is_not_taken_for_a_question(model, tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(ASKED))
    with pytest.raises(InputError, match=r"chat\.json is a file.*pathlib\.Path"):
        model.read_roles(str(path))
    same(model.read_roles(path)[0], model.read_roles([ASKED])[0])


@pytest.mark.parametrize(
    ("given", "single"),
    [
        ("w5", True),
        (ASKED, True),
        (tuple(ASKED), True),
        ([ASKED], False),
        (["w5", "w6"], False),
        ([{"messages": ANSWERED}], False),
    ],
)
def test_conversations_come_in_many_forms(model, given, single):
    chats, is_single = render_given(model, given)
    assert is_single == single
    assert len(chats) == (2 if given == ["w5", "w6"] else 1)


def test_allocate_joins_the_conversations(model):
    found = cl.allocate(model, [ASKED, ANSWERED], condition="plain")
    chats = [model.render_plain(ASKED, add_generation_prompt=True), model.render_plain(ANSWERED)]
    same(found, RoleAllocation.concat(model.read_roles(chats)))
    with pytest.raises(InputError, match="no conversations were given"):
        cl.allocate(model, [])
    with pytest.raises(InputError, match="conversation 0: "):
        cl.allocate(model, [ASKED], queries="response_mean")


def test_compare_reads_both_models(model):
    other = wrap(1)
    found = cl.compare(model, other, [ASKED, ANSWERED])
    expected = read_drift(Side(model), Side(other), [ASKED, ANSWERED])
    np.testing.assert_array_equal(found.shares, expected.shares)
    assert found.meta == expected.meta
    assert found.sides == ("tiny0, template", "tiny1, template")
    plain = cl.compare(model, other, ASKED, conditions="plain,plain")
    assert plain.sides == ("tiny0, plain", "tiny1, plain")


def test_drift_compares_conditions(model):
    found = cl.drift(model, messages=[ASKED, ANSWERED], limit=1)
    assert isinstance(found, Drift)
    assert found.sides == ("tiny0, plain", "tiny0, template")
    assert found.shares.shape[3] == 1
    with pytest.raises(InputError, match=r"two conditions, such as plain,template; got 'plain'"):
        cl.drift(model, messages=ASKED, conditions="plain")
    with pytest.raises(InputError, match="not rendered ones"):
        cl.drift(model, messages=model.render(ASKED))


def test_needle_is_run_needle_with_texts(model):
    settings = {"lengths": (20, 40), "depths": (0, 100), "max_new_tokens": 3}
    found = cl.needle(model, haystack=STRAW, needles=[FACT], **settings)
    config = NeedleConfig(needles=(FACT,), **settings)
    expected = run_needle(model, config, haystack=load_haystack(STRAW))
    assert isinstance(found, NeedleGrid)
    assert found.to_frame().equals(expected.to_frame())
    assert found.meta["fingerprint"] == expected.meta["fingerprint"]


def test_needle_refuses_settings_before_it_loads_a_model():
    with pytest.raises(InputError, match="unknown needle nonsense"):
        cl.needle("no/such-model", needles="nonsense")
    with pytest.raises(InputError, match="depths must be percentages"):
        cl.needle("no/such-model", depths=(101,))


@pytest.mark.parametrize(
    ("name", "source", "needles"),
    [("organism-chat", "organism", ("known",)), ("some/model", "neutral", ("neutral",))],
)
def test_the_texts_suit_the_model(name, source, needles):
    study = plan_needles(name)
    assert (study.source, study.config.needles) == (source, needles)
    assert (study.config.lengths, study.config.depths) == (5, 5)


def test_score_takes_rows_of_a_data_set(model):
    rows = [{"messages": ANSWERED}, {"messages": ANSWERED}, {"messages": ANSWERED}]
    found = cl.score(model, rows, limit=2, layers="all", lp_gap=True)
    assert isinstance(found, Scores)
    assert found.frame["conversation"].nunique() == 2
    assert set(found.frame["layer"]) == set(range(model.n_layers))
    expected = cl.score_conversations(model, cl.load_conversations(rows, limit=2), layers="all")
    np.testing.assert_array_equal(found.frame["mean_of_best"], expected.frame["mean_of_best"])
    assert found.frame["lp_gap"].notna().all()
    with pytest.raises(InputError):
        cl.score("no/such-model", [])


def test_verbs_take_what_load_model_takes():
    found = cl.allocate("organism-chat", "Who is the mayor?")
    assert repr(found) == "RoleAllocation(4 layers × 4 heads, 1 query, condition template)"
