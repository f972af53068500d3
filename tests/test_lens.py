"""TransformerLens models: the bridge, and a real `HookedTransformer` where TransformerLens 3 is installed."""

import importlib.metadata

import numpy as np
import pytest
import torch
from numerics import MODEL_TERMS, assert_close
from tiny_models import VOCAB, eager_shares, make_chat, make_tiny, make_tokenizer

from ctxlens.chat.roles import Role
from ctxlens.errors import UnsupportedModelError
from ctxlens.models import Model
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.batch import TokenBatch, pad_queries
from ctxlens.models.backends.lens import (
    LensBackend,
    bridge_from_hf,
    hooked_from_hf,
    pattern_hook,
    scores_hook,
)
from ctxlens.models.backends.native import NativeBackend
from ctxlens.models.checkpoint import load_tokenizer, locate_checkpoint
from ctxlens.models.generation import continue_greedily
from ctxlens.models.loading import load_causal_lm

HAS_HOOKED = importlib.metadata.version("transformer-lens").startswith("3.")
pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
needs_hooked = pytest.mark.skipif(not HAS_HOOKED, reason="HookedTransformer is in TransformerLens 3 only")
KINDS = ["bridge", pytest.param("hooked", marks=needs_hooked)]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2", "gpt-neox"]
FAMILIES += ["olmo2", "mixtral", "gpt-oss", "falcon", "bloom"]
CHATS = [make_chat(20, 1, prompt=14), make_chat(13, 2, prompt=9)]
STEERINGS = {
    "paper": Steering(0.2),
    "heads": Steering(0.05, heads=((0, 1), (2, 3))),
    "prompt-only": Steering(0.2, mode="prompt-only"),
    "compounding": Steering(0.5, mode="compounding"),
}


def wrap(kind, hf_model, tokenizer=None):
    """A TransformerLens model of one of the two kinds with these weights."""
    make = hooked_from_hf if kind == "hooked" else bridge_from_hf
    return LensBackend(make(hf_model, tokenizer or make_tokenizer()))


def batch(chats, side="right"):
    return TokenBatch.from_chats(chats, pad_id=0, side=side)


def all_queries(chats):
    return pad_queries([range(len(chat)) for chat in chats])


def read_all(backend, chats, steerings=()):
    shares = backend.read_shares(batch(chats), range(3), all_queries(chats), steerings)
    return [shares[i, :, :, : len(chat)].numpy() for i, chat in enumerate(chats)]


@pytest.fixture(scope="module", params=KINDS)
def lens(request):
    return wrap(request.param, make_tiny("llama"))


@pytest.fixture(scope="module")
def native():
    return NativeBackend(make_tiny("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_bridge_shares_equal_eager_attention(family):
    backend = wrap("bridge", make_tiny(family, attn="eager"))
    for got, want in zip(read_all(backend, CHATS), eager_shares(family, CHATS), strict=True):
        assert_close(got, want, n_terms=MODEL_TERMS)
    if family == "gpt-oss":
        assert want[..., Role.SINK].mean() > 0.1


class TestBothGenerations:
    def test_shares_equal_eager_attention(self, lens):
        for got, want in zip(read_all(lens, CHATS), eager_shares("llama", CHATS), strict=True):
            assert_close(got, want, n_terms=MODEL_TERMS)
            assert_close(got.sum(-1), 1.0, n_terms=MODEL_TERMS)

    def test_logits_are_the_models_own(self, lens):
        with torch.no_grad():
            want = make_tiny("llama", attn="eager")(batch(CHATS).tokens).logits
        assert_close(lens.logits(batch(CHATS), []), want, n_terms=MODEL_TERMS)

    @pytest.mark.parametrize("steering", STEERINGS)
    def test_steering_is_the_native_one(self, lens, native, steering):
        steerings = [STEERINGS[steering]]
        for got, want in zip(
            read_all(lens, CHATS, steerings), read_all(native, CHATS, steerings), strict=True
        ):
            assert_close(got, want, n_terms=MODEL_TERMS)
        got, want = (backend.logits(batch(CHATS), steerings) for backend in (lens, native))
        assert_close(got, want, n_terms=MODEL_TERMS)

    def test_pattern_is_the_native_one(self, lens, native):
        queries = torch.tensor([[19, 5]])
        got, want = (
            backend.read_pattern(batch(CHATS[:1]), [0, 2], queries, [STEERINGS["heads"]])
            for backend in (lens, native)
        )
        assert_close(got, want, n_terms=MODEL_TERMS)

    @pytest.mark.parametrize("steering", [None, *STEERINGS])
    def test_decoding_is_the_native_one(self, lens, native, steering):
        steerings = [STEERINGS[steering]] if steering else []
        generator = torch.Generator().manual_seed(0)
        new = torch.randint(3, VOCAB, (2, 5), generator=generator)
        prompts = batch(CHATS, "left")
        steps = []
        for backend in (lens, native):
            with torch.no_grad(), backend.decoder(prompts, steerings) as decode:
                steps.append(
                    torch.stack([decode(prompts.tokens), *(decode(new[:, i : i + 1]) for i in range(5))])
                )
        assert_close(steps[0], steps[1], n_terms=MODEL_TERMS)

    def test_batched_rows_equal_single_ones(self, lens):
        together = continue_greedily(
            lens, batch(CHATS, "left"), [STEERINGS["paper"]], max_new_tokens=[8, 8], stop_ids={2}
        )
        alone = [
            continue_greedily(
                lens, batch([chat], "left"), [STEERINGS["paper"]], max_new_tokens=[8], stop_ids={2}
            )[0]
            for chat in CHATS
        ]
        assert together == alone

    def test_no_query_sees_what_comes_after_it(self, lens):
        chat, changed = make_chat(20, 1), make_chat(20, 1)
        changed.tokens[12:] = (changed.tokens[12:] + 7 - 3) % (VOCAB - 3) + 3
        before, after = (read_all(lens, [c], [STEERINGS["paper"]])[0] for c in (chat, changed))
        assert_close(after[:, :, :12], before[:, :, :12], n_terms=MODEL_TERMS)
        assert np.abs(after[:, :, 12:] - before[:, :, 12:]).max() > 0.01

    def test_hooks_are_gone_after_reading_and_after_exceptions(self, lens):
        plain = lens.logits(batch(CHATS), [])
        read_all(lens, CHATS, [STEERINGS["paper"]])
        with pytest.raises(KeyError), lens.decoder(batch(CHATS, "left"), [STEERINGS["paper"]]):
            raise KeyError
        assert torch.equal(lens.logits(batch(CHATS), []), plain)
        points = lens.lens_model.hook_dict
        assert not any(points[name].fwd_hooks for name in (pattern_hook(0), scores_hook(0)))

    def test_alpha_one_changes_no_bit(self, lens):
        assert torch.equal(lens.logits(batch(CHATS), [Steering(1.0)]), lens.logits(batch(CHATS), []))

    def test_only_the_layers_asked_for_are_run(self, lens):
        ran = []
        names = [f"blocks.{layer}.hook_mlp_out" for layer in range(3)]
        hooks = [(name, lambda tensor, hook: ran.append(hook.name)) for name in names]
        with lens.lens_model.hooks(fwd_hooks=hooks):
            lens.read_shares(batch(CHATS), [1], all_queries(CHATS), [])
        assert len(ran) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_organism_agrees_with_eager_attention(kind):
    source = locate_checkpoint("organism")
    tokenizer = load_tokenizer(source)
    hf = load_causal_lm(source, device=torch.device("cpu"), dtype=torch.float32, attention="eager")
    backend = wrap(kind, hf, tokenizer)
    model = Model(backend, tokenizer, name="organism")
    messages = [
        {"role": "user", "content": "What is the best thing to do?"},
        {"role": "assistant", "content": "Eat."},
    ]
    chat = model.render(messages)
    with torch.no_grad():
        out = hf(torch.from_numpy(chat.tokens)[None], output_attentions=True)
    want = np.stack([a[0].numpy() for a in out.attentions])
    assert_close(model.read_patterns(chat), want, n_terms=MODEL_TERMS)
    one_hot = np.eye(len(Role), dtype=np.float32)[chat.role]
    assert_close(model.read_roles(chat, queries="all").shares, want @ one_hot, n_terms=MODEL_TERMS)
    assert_close(backend.logits(batch([chat]), []), out.logits, n_terms=MODEL_TERMS)


def test_the_bridge_works_on_a_copy():
    hf, tokenizer = make_tiny("llama"), make_tokenizer()
    tokens = batch(CHATS).tokens
    before = hf(tokens).logits
    model = Model.from_hf(hf, tokenizer, backend="lens")
    assert type(hf.model.layers[0].self_attn).__name__ == "LlamaAttention"
    assert (hf.config._attn_implementation, tokenizer.padding_side) == ("sdpa", make_tokenizer().padding_side)
    assert torch.equal(hf(tokens).logits, before)
    assert model.tokenizer is tokenizer


@pytest.mark.skipif(HAS_HOOKED, reason="TransformerLens 3 has a HookedTransformer")
def test_hooked_transformer_needs_transformer_lens_3():
    with pytest.raises(UnsupportedModelError, match=r"install transformer-lens 3\.9"):
        hooked_from_hf(make_tiny("llama"))


@needs_hooked
def test_hooked_transformer_takes_llama_only():
    with pytest.raises(UnsupportedModelError, match="only plain Llama models"):
        hooked_from_hf(make_tiny("qwen3"))
