"""Attention drift: two sides of the same conversations, and what is refused."""

import numpy as np
import pytest
from tiny_models import make_tiny, make_tokenizer

from ctxlens.chat.condition import Condition
from ctxlens.chat.roles import Role
from ctxlens.errors import InputError
from ctxlens.heads.drift import Side, read_drift
from ctxlens.models import Model
from ctxlens.results import RoleAllocation

CONVERSATIONS = [
    [{"role": "user", "content": "w5 w6 w7 w8"}, {"role": "assistant", "content": "w9 w10"}],
    [{"role": "user", "content": "w11 w12"}],
    [{"role": "user", "content": "w5 w6 w20 w21 w22"}, {"role": "assistant", "content": "w30"}],
]


def wrap(seed=0, **changes):
    return Model.from_hf(make_tiny("llama-mqa", seed=seed, **changes), make_tokenizer(), name=f"tiny{seed}")


@pytest.fixture(scope="module")
def model():
    return wrap()


def test_sides_are_what_read_roles_gives(model):
    other = wrap(1)
    found = read_drift(Side(model, "plain"), Side(other, "template"), CONVERSATIONS)
    plain = [model.render_plain(m, add_generation_prompt=m[-1]["role"] == "user") for m in CONVERSATIONS]
    template = [other.render(m, add_generation_prompt=m[-1]["role"] == "user") for m in CONVERSATIONS]
    for side, lm, chats in ((0, model, plain), (1, other, template)):
        read = RoleAllocation.concat(lm.read_roles(chats))
        np.testing.assert_allclose(found.shares[side], read.shares, atol=1e-6)
        np.testing.assert_array_equal(found.key_counts[side], read.key_counts)
    heads = RoleAllocation.concat(model.read_roles(plain)).retrieval_heads()
    assert found.retrieval.tolist() == heads.tolist()
    change = found.difference("user").values
    np.testing.assert_allclose(change, (found.share("user")[1] - found.share("user")[0]).mean(-1), atol=1e-6)
    assert found.sides == ("tiny0, plain", "tiny1, template")
    assert found.meta["same_tokens"] is False


def test_retrieval_heads_are_chosen_without_template(model):
    found = read_drift(Side(model), Side(wrap(1)), CONVERSATIONS)
    plain = [model.render_plain(m, add_generation_prompt=m[-1]["role"] == "user") for m in CONVERSATIONS]
    heads = RoleAllocation.concat(model.read_roles(plain)).retrieval_heads()
    assert found.retrieval.tolist() == heads.tolist()
    assert found.meta["same_tokens"] is True


def test_nothing_drifts_against_itself(model):
    steps = []
    found = read_drift(
        Side(model), Side(model), CONVERSATIONS, queries="first_answer", contexts=np.array([0, 0, 1]),
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert np.abs(found.difference("user").effects).max() == 0
    assert found.contexts.tolist() == [0, 0, 1]
    assert steps[-1] == (9, 9)


def test_the_indicator_is_put_into_the_last_question():
    tokenizer = make_tokenizer()
    model = Model.from_hf(make_tiny("llama-mqa"), tokenizer, name="tiny", indicator="w63")
    asked = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}, CONVERSATIONS[1][0]]
    side = Side(model, "template+indicator")
    assert side.asked == Side(model, Condition(indicator=True)).asked == Side(model, "indicator").asked
    chat = side.render(asked)
    assert (chat.role == Role.INDICATOR).sum() == 1
    assert chat.turn[chat.role == Role.INDICATOR].tolist() in ([2], [-1])
    assert not (Side(model).render([{**CONVERSATIONS[1][0], "indicator": True}]).role == Role.INDICATOR).any()
    found = read_drift(Side(model), side, CONVERSATIONS)
    assert "indicator" in found.shown_roles()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: Side(m, "bare"), "unknown word 'bare' in the condition 'bare'"),
        (
            lambda m: Side(m, "template+prefix"),
            "cannot compare the condition 'template.prefix'; choose from plain, ",
        ),
        (lambda m: Side(m, "indicator"), "tiny0 has no indicator token"),
        (lambda m: read_drift(Side(m), Side(m), []), "no conversations were given"),
        (
            lambda m: read_drift(Side(m), Side(wrap(2, num_hidden_layers=2)), CONVERSATIONS),
            "tiny0 has 3 layers of 4 heads, tiny2 2 of 4",
        ),
        (
            lambda m: read_drift(Side(m), Side(m), [*CONVERSATIONS, [{"role": "nobody", "content": "w5"}]]),
            r"conversation 3 \(tiny0, template\): ",
        ),
        (lambda m: read_drift(Side(m), Side(m), CONVERSATIONS, queries="all"), "choose first_answer or"),
    ],
)
def test_bad_comparisons_are_refused(model, call, words):
    with pytest.raises(InputError, match=words):
        call(model)
