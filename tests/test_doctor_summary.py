"""The sentences with which `doctor` ends: what `auto` takes, what fits, where sinks are, what to mind."""

from dataclasses import replace

import numpy as np
import pytest
from chat_cases import BYTES, user
from tiny_models import make_tiny, make_tokenizer

from ctxlens.chat.roles import N_ROLES, Role, render_plain
from ctxlens.models import Model
from ctxlens.models.doctor import diagnose
from ctxlens.models.doctor.findings import Finding
from ctxlens.models.doctor.summary import longest_fitting, name_sinks, summarise
from ctxlens.models.memory import forecast_memory

CHAT = render_plain(BYTES, [user("abcdefghijklmnopqrst")], bos=False)
QUERIES = np.array([18, 19])


@pytest.fixture(scope="module")
def model():
    return Model.from_hf(make_tiny("llama"), make_tokenizer())


def attention(**received):
    """Two layers of one head whose later positions attend like this to the characters of each layer."""
    pattern = np.zeros((2, 1, 2, CHAT.n_tokens), dtype=np.float32)
    for name, shares in received.items():
        pattern[:, 0, :, "abcdefghijklmnopqrst".index(name)] = np.array(shares)[:, None]
    return pattern


def resting(*layers):
    found = np.zeros((2, 1, 1, N_ROLES), dtype=np.float32)
    found[list(layers), ..., int(Role.USER)] = 0.5
    return found


def test_sinks_are_named_by_what_they_receive():
    pattern = attention(a=(0.5, 0.5), c=(0.2, 0.04), d=(0.04, 0.04))
    assert name_sinks(CHAT, pattern, QUERIES, resting(0, 1)) == [
        "the first token 'a' (said by the user), in 2 of 2 layers",
        "token 2 'c' (said by the user), in 1 of 2 layers",
    ]
    assert name_sinks(CHAT, pattern, QUERIES, resting(1)) == [
        "the first token 'a' (said by the user), in 1 of 2 layers"
    ]
    assert name_sinks(CHAT, pattern, QUERIES, resting()) == []


def test_a_token_with_few_after_it_is_no_sink():
    assert name_sinks(CHAT, attention(e=(0.5, 0.5)), QUERIES, resting(0, 1)) == []


def test_who_wrote_a_sink():
    role = CHAT.role.copy()
    role[0], role[1] = int(Role.BOS), int(Role.TEMPLATE)
    chat = replace(CHAT, role=role)
    found = np.ones((2, 1, 1, N_ROLES), dtype=np.float32)
    first, second = name_sinks(chat, attention(a=(0.5, 0.5), b=(0.3, 0.3)), QUERIES, found)
    assert first.startswith("the first token 'a' (BOS)")
    assert second.startswith("token 1 'b' (a marker of the template)")


def test_the_longest_conversation_that_fits(model):
    def need(length):
        return max(forecast_memory(model, length=length, what=w).run for w in ("read", "steer", "generate"))

    assert longest_fitting(model, 0) == 0
    assert longest_fitting(model, need(20)) >= 20
    assert longest_fitting(model, need(21) - 1) <= 20
    assert longest_fitting(model, 10**15) == model.n_ctx


def test_the_diagnosis_ends_with_it(model):
    found = diagnose(model.tokenizer, lambda backend: model, with_lens=False, with_eager=False)
    first, second = found.summary
    assert first == (
        "auto takes the native backend and float32 on cpu; conversations of up to "
        f"{model.n_ctx} tokens, the whole window, fit into the free memory."
    )
    assert second.endswith(".")
    assert found.as_dict()["summary"] == [first, second]


def test_what_a_template_does_is_told():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ bos_token }}{{ m.content }}{% endfor %}"
    )
    model = Model.from_hf(make_tiny("llama"), tokenizer)
    refused = Finding("roles", "tools", "skipped", "Refused: no tools.")
    second = summarise(model, CHAT, [refused])[-1]
    assert f"the BOS token {tokenizer.bos_token!r} also begins turns of the template" in second
    assert "the template leaves out what the system says" in second
    assert "the template refuses: tools" in second
