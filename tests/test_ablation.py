"""Heads switched off: both backends against weights changed by hand."""

import numpy as np
import pytest
import torch
from tiny_models import make_chat, make_tiny, make_tokenizer

from ctxlens.chat.roles import Role
from ctxlens.errors import InputError, UnsupportedModelError
from ctxlens.heads.ablation import Ablation
from ctxlens.models import Model
from ctxlens.models.backends.native.projections import find_output_projections

FAMILIES = ("llama-mqa", "gpt2", "gpt-neox", "gemma")
HEADS = ((0, 1), (2, 0), (2, 3))
CHATS = [make_chat(18, 1, prompt=12), make_chat(11, 2, prompt=8)]
D_HEAD = {"gemma": 16}


def wrap(hf_model, backend):
    return Model.from_hf(hf_model, make_tokenizer(), backend=backend)


def projection(hf_model, layer):
    """The output projection by its name, and its weight as [out, in]."""
    if hasattr(hf_model, "transformer"):
        module = hf_model.transformer.h[layer].attn.c_proj
        return module, module.weight.T
    if hasattr(hf_model, "gpt_neox"):
        module = hf_model.gpt_neox.layers[layer].attention.dense
        return module, module.weight
    module = hf_model.model.layers[layer].self_attn.o_proj
    return module, module.weight


def cut(hf_model, heads, d_head, means=None):
    """Zero the columns of heads in the output projections, and add what their mean output would give."""
    with torch.no_grad():
        for layer, head in heads:
            module, weight = projection(hf_model, layer)
            columns = slice(head * d_head, (head + 1) * d_head)
            if means is not None:
                gift = weight[:, columns] @ means[layer, head]
                if module.bias is None:
                    module.bias = torch.nn.Parameter(torch.zeros(len(gift)))
                module.bias += gift
            weight[:, columns] = 0
    return hf_model


@pytest.mark.parametrize("backend", ["native", "lens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zeroed_heads_are_zeroed_columns_of_the_output_projection(family, backend):
    d_head = D_HEAD.get(family, 8)
    model = wrap(make_tiny(family), backend)
    before = model.logprobs(CHATS)
    with Ablation(model).apply(HEADS, "zero"):
        got = model.logprobs(CHATS)
    want = wrap(cut(make_tiny(family), HEADS, d_head), "native").logprobs(CHATS)
    for a, b, c in zip(got, want, before, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
        assert np.abs(a - c).max() > 0.01
    assert all(np.array_equal(a, b) for a, b in zip(before, model.logprobs(CHATS), strict=True))


@pytest.mark.parametrize("backend", ["native", "lens"])
@pytest.mark.parametrize("family", ["llama-mqa", "gpt2"])
def test_mean_ablation_writes_the_mean_over_real_positions(family, backend):
    model = wrap(make_tiny(family), backend)
    ablation = Ablation(model)
    means = ablation.read_means(CHATS)
    # The same means by hand: the projections' inputs, one conversation at a time.
    hf_model, seen = make_tiny(family), {layer: [] for layer in range(3)}
    for layer in range(3):
        projection(hf_model, layer)[0].register_forward_pre_hook(
            lambda _, args, layer=layer: seen[layer].append(args[0][0].detach())
        )
    for chat in CHATS:
        hf_model(input_ids=torch.from_numpy(chat.tokens)[None])
    by_hand = torch.stack([torch.cat(seen[layer]).mean(0).reshape(4, 8) for layer in range(3)])
    torch.testing.assert_close(means, by_hand, atol=1e-5, rtol=1e-4)
    with ablation.apply(HEADS, "mean"):
        got = model.logprobs(CHATS)
    want = wrap(cut(make_tiny(family), HEADS, 8, by_hand), "native").logprobs(CHATS)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("backend", ["native", "lens"])
def test_blinded_heads_see_everything_but_the_user(backend):
    model, chat = wrap(make_tiny("llama-mqa"), backend), CHATS[0]
    before = model.read_patterns(chat)
    user = chat.role == Role.USER
    with Ablation(model).apply([(0, 1), (1, 2)], "blind"):
        after = model.read_patterns(chat)
    rest = np.where(user, 0, before[0, 1])
    np.testing.assert_allclose(after[0, 1], rest / rest.sum(-1, keepdims=True), atol=1e-5)
    assert after[1, 2][:, user].max() < 1e-6
    np.testing.assert_allclose(after[0, [0, 2, 3]], before[0, [0, 2, 3]], atol=1e-6)
    assert np.array_equal(model.read_patterns(chat), before)


@pytest.mark.parametrize("backend", ["native", "lens"])
def test_a_query_that_sees_only_the_user_attends_as_before(backend):
    chat = make_chat(12, 3)
    chat.role[:] = Role.USER
    chat.turn[:] = 0
    model = wrap(make_tiny("llama"), backend)
    before = model.read_patterns(chat)
    with Ablation(model).apply([(layer, head) for layer in range(3) for head in range(4)], "blind"):
        after = model.read_patterns(chat)
    np.testing.assert_allclose(after, before, atol=1e-3)


@pytest.mark.parametrize("kind", ["zero", "mean", "blind"])
def test_both_backends_agree_while_generating(kind):
    answers = []
    for backend in ("native", "lens"):
        model = wrap(make_tiny("llama-mqa"), backend)
        ablation = Ablation(model)
        ablation.read_means(CHATS)
        plain = model.generate(CHATS, max_new_tokens=8)
        with ablation.apply(HEADS, kind):
            answers.append(model.generate(CHATS, max_new_tokens=8))
        assert model.generate(CHATS, max_new_tokens=8) == plain
        assert answers[-1] != plain
    assert answers[0] == answers[1]


@pytest.mark.parametrize("backend", ["native", "lens"])
@pytest.mark.parametrize("kind", ["zero", "blind"])
def test_everything_is_restored_after_an_exception(backend, kind):
    model = wrap(make_tiny("gpt2"), backend)
    before = model.logprobs(CHATS)
    with pytest.raises(RuntimeError, match="stop"), Ablation(model).apply(HEADS, kind):
        raise RuntimeError("stop")
    assert all(np.array_equal(a, b) for a, b in zip(before, model.logprobs(CHATS), strict=True))


def test_bad_requests_are_refused():
    model = wrap(make_tiny("llama"), "native")
    ablation = Ablation(model)
    for heads, kind, words in (
        ([(3, 0)], "zero", "head 3.0 does not exist: the model has layers 0 to 2"),
        ([(0, 4)], "blind", "head 0.4 does not exist"),
        ([(0, 0)], "half", "unknown ablation 'half'; choose from zero, mean, blind"),
        ([(0, 0)], "mean", "call read_means first"),
    ):
        with pytest.raises(InputError, match=words), ablation.apply(heads, kind):
            pass
    with pytest.raises(InputError, match="needs conversations"):
        ablation.read_means([])


def test_a_projection_that_cannot_be_told_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"output projection of layer 0 .* takes 32 features"):
        find_output_projections(make_tiny("llama"), 3, 40)
    with pytest.raises(UnsupportedModelError, match=r"layer 0 of Headless .*there is none"):
        find_output_projections(Headless(4, 4), 1, 4)


class Headless(torch.nn.Linear):
    """A module without attention."""

    def forward(self, input_ids, use_cache):
        return input_ids
