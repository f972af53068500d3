"""A real pretrained model: role shares and decoding of SmolLM2 agree with plain transformers."""

import numpy as np
import pytest
import torch

import ctxlens as cl
from ctxlens.chat.roles import Role

MESSAGES = [
    {"role": "system", "content": "Answer from the text."},
    {"role": "user", "content": "The ferry to Oakford leaves at nine. When does the ferry leave?"},
    {"role": "assistant", "content": "At nine."},
    {"role": "user", "content": "Where does it go?"},
]
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def folder(test_models):
    return test_models / "smollm2"


@pytest.fixture(scope="module")
def model(folder):
    return cl.load_model(str(folder), backend="native", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def eager(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def chat(model):
    return cl.render(model.tokenizer, MESSAGES, add_generation_prompt=True)


@pytest.fixture(scope="module")
def patterns(eager, chat):
    """Explicit attention patterns `[layer, head, query_pos, key_pos]`."""
    with torch.no_grad():
        output = eager(torch.tensor(chat.tokens)[None], output_attentions=True, use_cache=False)
    return torch.cat(output.attentions).numpy()


def test_every_token_has_the_role_of_the_message_that_it_comes_from(model, chat):
    text = model.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert model.tokenizer.decode(chat.tokens) == text
    for role in (Role.SYSTEM, Role.USER, Role.ASSISTANT):
        said = "".join(one["content"] for one in MESSAGES if one["role"] == role.name.lower())
        assert model.tokenizer.decode(chat.tokens[chat.role == role]) == said


def test_role_shares_agree_with_explicit_patterns_summed_by_role(model, chat, patterns):
    allocation = model.read_roles(chat, queries="all")
    for role in Role:
        expected = patterns[..., chat.role == role].sum(-1)
        np.testing.assert_allclose(allocation.share(role.name.lower()), expected, atol=TOLERANCE, rtol=0)
    assert 0.01 < allocation.share("user").mean() < 0.99


def test_a_wrong_role_is_noticed(model, chat, patterns):
    others = patterns[..., chat.role == Role.SYSTEM].sum(-1)
    share = model.read_roles(chat, queries="all").share("user")
    assert np.abs(np.asarray(share) - others).max() > 100 * TOLERANCE


def test_greedy_text_is_that_of_transformers(model, eager, chat):
    tokens = torch.tensor(chat.tokens)[None]
    written = eager.generate(tokens, max_new_tokens=8, do_sample=False)[0, tokens.shape[1] :]
    expected = model.tokenizer.decode(written, skip_special_tokens=True)
    assert model.generate(chat, max_new_tokens=8).strip() == expected.strip()
