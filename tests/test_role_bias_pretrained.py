"""The measurement of role bias on pretrained models: texts, conditions, views, rules of the verdicts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from chat_cases import assistant, byte_tokenizer, letters, user

from ctxlens.chat.roles import N_ROLES, Role
from ctxlens.evals.needle.prompts import Window
from ctxlens.results import RoleAllocation
from experiments.role_bias.conclusions import conclude, decide, tables
from experiments.role_bias.pretrained import main, user_shares
from experiments.role_bias.texts import CHATML, Text, chats, conditions, essays

TEXT = Text("talk", [user("ab"), assistant("c"), user("d")], False)


@pytest.fixture(scope="module")
def smollm():
    """Tokenizer and window of a model whose BOS token opens every turn."""
    tokenizer = byte_tokenizer(bos="<|im_start|>")
    tokenizer.chat_template = CHATML.replace("{{ '<|im_start|>' + message", "{{ bos_token + message", 1)
    return Window("smollm", tokenizer, 10_000)


def test_the_first_token_counts_as_bos_under_every_condition_that_has_it(smollm):
    shown = {name: letters(ask(TEXT)) for name, ask in conditions(smollm).items()}
    assert shown["plain"] == "UUtAtUt"
    assert shown["plain, first token"] == "BUUtAtUt"
    assert shown["template"].startswith("B")
    assert "B" not in shown["template"][1:]
    assert shown["template, no system prompt"] == shown["template"]


def test_a_model_without_template_gets_chatml_after_its_bos_token():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    asked = conditions(Window("base", tokenizer, 10_000))
    assert [name for name, ask in asked.items() if letters(ask(TEXT))[0] == "B"] == [
        "plain, first token", "template",
    ]  # fmt: skip
    assert asked["template"](TEXT).text == "<s>" + asked["template, no BOS"](TEXT).text


def test_essays_hide_a_needle_and_begin_the_answer(smollm, tmp_path):
    (tmp_path / "LICENSE.txt").write_text("Not an essay. " * 200)
    (tmp_path / "b.txt").write_text("Short. ")
    for name in "ca":
        (tmp_path / f"{name}.txt").write_text("Some words stand here. " * 100)
    found = list(essays(smollm, tmp_path, 900, 5))
    assert [text.name for text in found] == ["a", "c"]
    asked, begun = found[0].messages
    assert "sandwich" in asked["content"]
    assert begun == assistant("The best thing to do in San Francisco")
    assert "figs" in found[1].messages[0]["content"]


def test_chats_have_an_earlier_answer_and_end_with_a_question(smollm, tmp_path):
    long = "x" * 70
    rows = [
        [user(long)],
        [user(long), assistant("b"), user("c"), assistant("d")],
        [user("a"), assistant("b")],
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"messages": row} for row in rows]))
    [text] = chats(smollm, file, 5)
    assert (text.name, text.begun) == ("row 1", False)
    assert text.messages == [user(long), assistant("b"), user("c")]


def test_the_views_of_one_query_by_hand():
    # BOS .4 (.3 of it a sink), user .3 (.1 a sink), assistant .1, template .2: without sinks .1 .2 .1 .2.
    roles = [Role.BOS, Role.USER, Role.ASSISTANT, Role.TEMPLATE]
    shares, resting = np.zeros((1, 1, 1, N_ROLES)), np.zeros((1, 1, 1, N_ROLES))
    shares[..., roles] = 0.4, 0.3, 0.1, 0.2
    resting[..., roles[:2]] = 0.3, 0.1
    read = RoleAllocation(shares, np.ones((1, N_ROLES)), (0,), ("q",), "first_answer", resting=resting)
    wanted = {
        "raw": 0.3,
        "renormalised, first token as BOS": 0.3 / 0.8,
        "renormalised": 0.3 / 0.4,
        "without sinks": 0.2 / 0.6,
        "renormalised without sinks": 0.2 / 0.3,
    }
    found = user_shares(read, marks_turns=True)
    assert {view: value[0] for view, value in found.items()} == pytest.approx(wanted, abs=1e-5)
    kept = user_shares(read, marks_turns=False)
    assert kept["renormalised"] == kept["renormalised, first token as BOS"]
    assert kept["renormalised without sinks"] == pytest.approx([0.2 / 0.4], abs=1e-5)


FALL = np.array([-0.38, -0.42, -0.40, -0.41, -0.39, -0.40, -0.37, -0.43])


@pytest.mark.parametrize(
    ("left", "verdict"),
    [
        (0.25 * FALL, "supported"),
        (-0.25 * FALL, "supported"),
        (0.75 * FALL, "refuted"),
        (0 * FALL, "supported"),
    ],
)
def test_the_rule_of_the_verdict(left, verdict):
    found = decide(left, FALL)
    assert found["verdict"] == verdict
    assert found["left"]["estimate"] == pytest.approx(left.sum() / FALL.sum())


def test_a_part_around_one_half_and_a_missing_fall_are_not_decided():
    assert decide(FALL * np.array([0, 1] * 4), FALL)["verdict"] == "undecided"
    assert decide(FALL, -FALL)["verdict"] == "no fall to explain"
    assert decide(-0.9 * FALL, FALL)["verdict"] == "undecided"


def test_conclusions_pair_the_texts():
    names = ("plain", "plain, first token", "template")
    views = ("raw", "renormalised, first token as BOS", "renormalised", "without sinks")
    rows = [
        {
            "share": {
                name: {
                    **{view: [0.9 - 0.2 * (name == "template") - 0.01 * text, 0.5] for view in views},
                    "renormalised without sinks": [0.6, 0.5],
                }
                for name in names
            }
        }
        for text in range(8)
    ]
    found = conclude(rows)
    assert found["texts"] == 8
    fall = found["differences"]["template minus plain"]["renormalised"]
    assert (fall["estimate"], fall["low"], fall["reading"]) == (
        pytest.approx(-0.1),
        pytest.approx(-0.1),
        "lower",
    )
    assert found["by layer"]["template minus plain"]["raw"] == [[-0.2, -0.2, -0.2], [0.0, 0.0, 0.0]]
    assert found["verdicts"]["sinks, first token as labelled"]["verdict"] == "supported"
    assert found["verdicts"]["same first token"]["verdict"] == "refuted"
    assert found["verdicts"]["something is left"] == "no difference shown"
    assert "-0.100 [-0.100, -0.100] (lower" in tables({"toy": found})


def test_without_texts_it_skips_with_a_sentence(tmp_path, capsys):
    main(["--model", "m", "--name", "n", "--essays", str(tmp_path / "none")])
    assert capsys.readouterr().out.startswith(f"skipped: {tmp_path / 'none'} does not exist")
