"""Transformers models read and steered in place, against eager attention, family by family."""

import math

import numpy as np
import pytest
import torch
from family_checks import CHATS, all_queries, left, read_all, right
from numerics import MODEL_TERMS, assert_close
from tiny_models import VOCAB, make_tiny

from ctxlens.chat.roles import N_ROLES
from ctxlens.errors import InputError, UnsupportedModelError
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.native import NAME, NativeBackend, attend, shape_of
from ctxlens.models.generation import continue_greedily

STEERINGS = {
    "paper": Steering(0.2),
    "heads": Steering(0.05, heads=((0, 1), (2, 3))),
    "prompt-only": Steering(0.2, mode="prompt-only"),
    "compounding": Steering(0.5, mode="compounding"),
    "target-share": Steering(target_share=0.7),
}


def pattern(backend, chat, steerings=()):
    layers = range(backend.shape.n_layers)
    return backend.read_pattern(right([chat]), layers, all_queries([chat]), steerings)[0]


@pytest.fixture(scope="module")
def llama():
    return NativeBackend(make_tiny("llama"))


def test_what_cannot_be_expressed_is_refused_by_name():
    model = make_tiny("bloom")
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM does not take its attention"):
        NativeBackend(model)
    assert model.config._attn_implementation == before


class TestSteering:
    def test_first_layer_follows_the_papers_formula(self, llama):
        chat, alpha = CHATS[0], 0.3
        plain = pattern(llama, chat)
        steered = pattern(llama, chat, [Steering(alpha)])
        weight = torch.where(torch.from_numpy(chat.mask("user", "indicator")), 1.0, alpha)
        weighted = plain[0] * weight
        want = weighted / weighted.sum(-1, keepdim=True)
        assert_close(steered[0], want, n_terms=MODEL_TERMS)

    def test_one_head_of_a_later_layer_and_no_other(self, llama):
        chat, alpha = CHATS[0], 0.01
        plain = pattern(llama, chat)
        steered = pattern(llama, chat, [Steering(alpha, heads=((1, 2),))])
        weight = torch.where(torch.from_numpy(chat.mask("user", "indicator")), 1.0, alpha)
        weighted = plain[1, 2] * weight
        want = plain[:2].clone()
        want[1, 2] = weighted / weighted.sum(-1, keepdim=True)
        assert_close(steered[:2], want, n_terms=MODEL_TERMS)
        assert (steered[2] - plain[2]).abs().max() > 1e-4

    def test_shares_under_steering_are_those_of_the_steered_pattern(self, llama):
        one_hot = torch.from_numpy(np.eye(N_ROLES, dtype=np.float32)[CHATS[0].role])
        for steering in STEERINGS.values():
            want = pattern(llama, CHATS[0], [steering]) @ one_hot
            got = read_all(llama, CHATS[:1], [steering])[0]
            assert_close(got, want.numpy(), n_terms=MODEL_TERMS)

    def test_compounding_is_alpha_to_the_layer(self, llama):
        chat = CHATS[0]
        once = pattern(llama, chat, [Steering(0.5**3, heads=((2, 0), (2, 1), (2, 2), (2, 3)))])
        heads = tuple((2, head) for head in range(4))
        compounding = pattern(llama, chat, [Steering(0.5, heads=heads, mode="compounding")])
        assert_close(compounding, once, n_terms=MODEL_TERMS)

    def test_two_steerings_add_up(self, llama):
        both = pattern(llama, CHATS[0], [Steering(0.5), Steering(0.4)])
        one = pattern(llama, CHATS[0], [Steering(0.2)])
        assert_close(both, one, n_terms=MODEL_TERMS)

    def test_alpha_one_changes_no_bit(self, llama):
        plain = llama.logits(right(CHATS), [])
        assert torch.equal(llama.logits(right(CHATS), [Steering(1.0)]), plain)

    def test_training_under_steering_has_the_gradients_of_eager_attention(self):
        model, eager = make_tiny("llama"), make_tiny("llama", attn="eager")
        batch = right(CHATS[:1])
        bias = Steering(0.3).key_bias(batch.role_ids, batch.prompt_tokens)
        causal = torch.ones(20, 20).tril().bool()
        mask = torch.where(causal, bias[:, None, None], torch.finfo(torch.float32).min)
        eager(input_ids=batch.tokens, labels=batch.tokens, attention_mask=mask).loss.backward()
        with attend(model, batch, steerings=[Steering(0.3)]):
            model(input_ids=batch.tokens, labels=batch.tokens).loss.backward()
        for got, want in zip(model.parameters(), eager.parameters(), strict=True):
            assert_close(got.grad, want.grad, n_terms=MODEL_TERMS)


class TestGenerate:
    """Transformers' own `generate` inside `attend`."""

    @pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
    def test_cache_equals_no_cache(self, family, options):
        model = make_tiny(family)
        prompts = left(CHATS)
        inputs = {"input_ids": prompts.tokens, "attention_mask": prompts.attention_mask}
        inputs |= {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options = {
            k: v for k, v in options.items() if k != "cache_implementation" or family == "llama"
        } | options
        with attend(model, prompts, steerings=[Steering(0.2)]):
            cached = model.generate(**inputs, **options)
            beams = {k: v for k, v in options.items() if k == "num_beams"}
            plain = model.generate(**inputs, use_cache=False, **beams)
        assert cached.tolist() == plain.tolist()

    def test_it_is_steered(self):
        model = make_tiny("llama")
        prompts = left(CHATS)
        inputs = {"input_ids": prompts.tokens, "attention_mask": prompts.attention_mask}
        inputs |= {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        plain = model.generate(**inputs)
        with attend(model, prompts, steerings=[Steering(0.05)]):
            steered = model.generate(**inputs)
        assert plain.tolist() != steered.tolist()
        assert model.generate(**inputs).tolist() == plain.tolist()


def test_batched_rows_equal_single_ones(llama):
    limits = {"max_new_tokens": [10, 10], "stop_ids": {2}}
    for steerings in ([], [STEERINGS["paper"]]):
        together = continue_greedily(llama, left(CHATS), steerings, **limits)
        alone = [
            continue_greedily(llama, left([chat]), steerings, max_new_tokens=[10], stop_ids={2})[0]
            for chat in CHATS
        ]
        assert together == alone
        for got, chat in zip(read_all(llama, CHATS, steerings), CHATS, strict=True):
            assert_close(got, read_all(llama, [chat], steerings)[0], n_terms=MODEL_TERMS)


class TestSelection:
    def state(self, model):
        return model.config._attn_implementation, len(model.base_model._forward_pre_hooks)

    def test_restored_after_an_exception(self):
        model = make_tiny("llama")
        before = self.state(model)

        def fail():
            with attend(model, right(CHATS)):
                assert model.config._attn_implementation == NAME
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert self.state(model) == before

    def test_restored_when_nested(self):
        model = make_tiny("llama", attn="eager")
        tokens = right(CHATS[:1]).tokens
        with torch.no_grad():
            plain = model(tokens).logits
            with attend(model, right(CHATS[:1]), steerings=[Steering(0.1)]):
                outer = model(tokens).logits
                with attend(model, right(CHATS[:1])):
                    assert_close(model(tokens).logits, plain, n_terms=MODEL_TERMS)
                assert torch.equal(model(tokens).logits, outer)
            assert torch.equal(model(tokens).logits, plain)
        assert self.state(model) == ("eager", 0)

    def test_the_innermost_block_alone_steers_where_modules_call_torch_themselves(self):
        model = make_tiny("falcon")
        tokens = right(CHATS[:1]).tokens
        with torch.no_grad(), attend(model, right(CHATS[:1]), steerings=[Steering(0.1)]):
            once = model(tokens).logits
            with attend(model, right(CHATS[:1]), steerings=[Steering(0.1)]):
                assert_close(model(tokens).logits, once, n_terms=MODEL_TERMS)

    def test_two_models_do_not_mix(self):
        one, two = make_tiny("llama"), make_tiny("llama", seed=1)
        tokens = right(CHATS[:1]).tokens
        with torch.no_grad():
            plain = two(tokens).logits
            with attend(one, right(CHATS[:1]), steerings=[Steering(0.1)]):
                assert torch.equal(two(tokens).logits, plain)

    def test_only_the_layers_asked_for_are_run(self, llama):
        ran = []
        hooks = [
            layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
            for i, layer in enumerate(llama.hf_model.model.layers)
        ]
        shares = llama.read_shares(right(CHATS), [1], all_queries(CHATS), [])
        for hook in hooks:
            hook.remove()
        assert ran == [0]
        assert_close(shares[0, 0, :, :20].numpy(), read_all(llama, CHATS)[0][1], n_terms=MODEL_TERMS)

    def test_chosen_queries_are_the_rows_of_all(self, llama):
        some = llama.read_shares(right(CHATS), range(3), torch.tensor([[19, 3], [0, 12]]), [])
        everything = read_all(llama, CHATS)
        np.testing.assert_array_equal(some[0].numpy(), everything[0][:, :, [19, 3]])
        np.testing.assert_array_equal(some[1].numpy(), everything[1][:, :, [0, 12]])


def test_dropout_is_refused():
    model = make_tiny("llama", attention_dropout=0.5).train()
    with pytest.raises(InputError, match=r"model.eval\(\)"), attend(model, right(CHATS), layers=[0]):
        model(right(CHATS).tokens)


def test_an_encoder_is_refused():
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    with pytest.raises(UnsupportedModelError, match="not a decoder-only language model"):
        shape_of(transformers.BertModel(config))


def test_bfloat16_shares_are_good_to_half_a_percent():
    model = make_tiny("llama", scale=6.0)
    want = read_all(NativeBackend(model), CHATS)
    got = read_all(NativeBackend(model.to(torch.bfloat16)), CHATS)
    assert math.isclose(max(np.abs(g.sum(-1) - 1).max() for g in got), 0, abs_tol=0.02)
    assert max(np.abs(g - w)[0].max() for g, w in zip(got, want, strict=True)) < 0.02
