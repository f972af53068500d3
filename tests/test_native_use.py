"""The native path in use: sampling, emphasised spans, 16-bit read-out, compiled and dispatched models."""

import importlib.util

import numpy as np
import pytest
import torch
from family_checks import CHATS, all_queries, furthest, left, read_all, right
from numerics import MODEL_TERMS, assert_close, near, tolerance
from tiny_models import VOCAB, make_chat, make_tiny, make_tokenizer

from ctxlens.chat.roles import Role
from ctxlens.errors import InputError, UnsupportedModelError
from ctxlens.models import Model
from ctxlens.models.attention.steering import Steering, emphasise
from ctxlens.models.backends.batch import TokenBatch
from ctxlens.models.backends.lens import LensBackend, bridge_from_hf
from ctxlens.models.backends.native import NativeBackend, attend
from ctxlens.models.generation import continue_greedily

SHARES = tolerance(torch.float32, 1.0, MODEL_TERMS)
STEERINGS = [Steering(0.2), Steering(target_share=0.6, heads=((1, 0), (2, 3)))]


@pytest.fixture(scope="module")
def llama():
    return NativeBackend(make_tiny("llama"))


@pytest.fixture(scope="module", params=["native", "lens"])
def backend(request):
    hf = make_tiny("llama", attn="eager" if request.param == "lens" else None)
    return (
        NativeBackend(hf) if request.param == "native" else LensBackend(bridge_from_hf(hf, make_tokenizer()))
    )


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_target_share_is_reached_in_the_chosen_heads_and_no_others(backend, share):
    plain = read_all(backend, CHATS)
    heads = ((0, 1), (0, 2))
    for before, after in zip(
        plain, read_all(backend, CHATS, [Steering(target_share=share, heads=heads)]), strict=True
    ):
        own, given = before[0, 1:3, :, Role.USER], after[0, 1:3, :, Role.USER]
        free = (own > 0) & (own < 1)
        whole = {"n_terms": MODEL_TERMS, "magnitude": 1.0}
        assert_close(given[free], np.full_like(given[free], share), **whole)
        assert_close(given[~free], own[~free], **whole)
        assert_close(after[0, [0, 3]], before[0, [0, 3]], **whole)
        # What is not the user's keeps its proportions. Dividing by the small rest enlarges rounding errors.
        others = [Role.SYSTEM, Role.ASSISTANT, Role.TEMPLATE, Role.BOS]
        old, new = before[0, 1:3][..., others][free], after[0, 1:3][..., others][free]
        proportions = [x / x.sum(-1, keepdims=True) for x in (new, old)]
        assert_close(*proportions, n_terms=MODEL_TERMS, magnitude=1 / (1 - share))


def test_every_conversation_has_its_own_emphasised_tokens(backend):
    marks = [[3, 4, 9], [1, 6]]
    chats = [emphasise(chat, *[(p, p + 1) for p in at]) for chat, at in zip(CHATS, marks, strict=True)]
    steering = Steering(0.1, emphasised=True)
    # The reference: a role of their own for the same tokens.
    roles = []
    for chat, at in zip(CHATS, marks, strict=True):
        role = chat.role.copy()
        role[at] = int(Role.TOOL)
        roles.append(make_chat(len(chat), 1 if len(chat) == 20 else 2))
        roles[-1].role[:] = role
    by_role = Steering(0.1, roles=(Role.TOOL,))
    limits = {"max_new_tokens": [6, 6], "stop_ids": set()}
    together = continue_greedily(backend, left(chats), [steering], **limits)
    assert together == continue_greedily(backend, left(roles), [by_role], **limits)
    logits = [backend.logits(right(given), [s]) for given, s in ((chats, steering), (roles, by_role))]
    assert_close(logits[0], logits[1], n_terms=MODEL_TERMS)
    assert (logits[0] - backend.logits(right(CHATS), [])).abs().max() > 1e-3


def test_unmarked_conversations_are_refused_under_emphasis():
    model = Model.from_hf(make_tiny("llama"), make_tokenizer())
    marked = emphasise(CHATS[0], (3, 5))
    with model.steer(0.1, emphasised=True):
        model.read_roles(marked, queries="all")
        with pytest.raises(InputError, match="conversation 1 has no emphasised tokens; mark them"):
            model.read_roles([marked, CHATS[1]], queries="all")


def test_model_steers_to_a_share():
    model = Model.from_hf(make_tiny("llama"), make_tokenizer())
    with model.steer(target_share=0.5) as steering:
        read = model.read_roles(CHATS[0], layers=[0])
    assert read.share(Role.USER)[0].tolist() == [near([0.5], MODEL_TERMS)] * 4
    assert read.meta["steering"] == [steering.describe()]


def test_sampling_equals_a_loop_by_hand(llama):
    prompts = left(CHATS)
    inputs = {"input_ids": prompts.tokens, "attention_mask": prompts.attention_mask}
    with attend(llama.hf_model, prompts, steerings=STEERINGS):
        torch.manual_seed(3)
        sampled = llama.hf_model.generate(
            **inputs, max_new_tokens=10, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0
        )
    torch.manual_seed(3)
    tokens, by_hand = prompts.tokens, []
    with llama.decoder(prompts, STEERINGS) as decode:
        for _ in range(10):
            tokens = torch.multinomial(decode(tokens).softmax(-1), 1)
            by_hand.append(tokens)
    assert sampled[:, prompts.tokens.shape[1] :].tolist() == torch.cat(by_hand, 1).tolist()


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "gpt-oss"])
def test_a_window_that_fills_while_decoding(family):
    chat = make_chat(5, 1, prompt=4)
    backend = NativeBackend(make_tiny(family))
    new = torch.randint(3, VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))
    with backend.decoder(left([chat]), STEERINGS) as decode:
        steps = [decode(left([chat]).tokens), *(decode(new[:, i : i + 1]) for i in range(12))]
    roles = torch.cat([torch.from_numpy(chat.role).long(), torch.full((12,), int(Role.ASSISTANT))])[None]
    tokens = torch.cat([torch.from_numpy(chat.tokens)[None], new], 1)
    whole = TokenBatch(tokens, roles, torch.ones_like(tokens), torch.tensor([5]))
    assert_close(torch.cat(steps), backend.logits(whole, STEERINGS)[0, 4:], n_terms=MODEL_TERMS)


@pytest.mark.parametrize("readout", ["model", "float32"])
def test_bfloat16_shares_against_exact_ones_of_the_same_queries_and_keys(readout):
    model = make_tiny("llama", scale=6.0).to(torch.bfloat16)
    backend = NativeBackend(model, readout=readout)
    one_hot = [np.eye(9, dtype=np.float32)[chat.role] for chat in CHATS]
    patterns = backend.read_pattern(right(CHATS), range(3), all_queries(CHATS), STEERINGS[:1])
    exact = [patterns[i, :, :, : len(chat), : len(chat)].numpy() @ one_hot[i] for i, chat in enumerate(CHATS)]
    error = furthest(read_all(backend, CHATS, STEERINGS[:1]), exact)
    assert error < SHARES if readout == "float32" else 1e-4 < error < 0.01


def test_readout_needs_the_native_backend():
    with pytest.raises(InputError, match="readout 'float32' needs backend=\"native\""):
        Model.from_hf(make_tiny("llama"), make_tokenizer(), backend="lens", readout="float32")
    with pytest.raises(InputError, match="unknown readout 'exact'"):
        Model.from_hf(make_tiny("llama"), make_tokenizer(), readout="exact")


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_numbers(llama):
    model = make_tiny("llama")
    model.compile(backend="eager")
    compiled = NativeBackend(model)
    assert furthest(read_all(compiled, CHATS), read_all(llama, CHATS)) < tolerance(
        torch.float32, 1.0, MODEL_TERMS
    )
    for steerings in ([], STEERINGS[:1], STEERINGS[1:], []):  # nothing of one may be left in the next
        got, want = (backend.logits(right(CHATS), steerings) for backend in (compiled, llama))
        assert_close(got, want, n_terms=MODEL_TERMS)


def test_what_is_no_transformers_model_is_refused():  # such as the wrapper that torch.compile returns
    with pytest.raises(
        UnsupportedModelError, match=r"a Linear is not a transformers model.* model.compile\(\)"
    ):
        Model.from_hf(torch.nn.Linear(2, 2), make_tokenizer())


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
@pytest.mark.parametrize("offload", [False, True])
def test_a_dispatched_model_gives_the_same_numbers(llama, offload, tmp_path):
    from accelerate import cpu_offload, dispatch_model

    model = make_tiny("llama")
    model = cpu_offload(model, torch.device("cpu")) if offload else dispatch_model(model, {"": "cpu"})
    backend = NativeBackend(model)
    assert furthest(read_all(backend, CHATS, STEERINGS), read_all(llama, CHATS, STEERINGS)) < tolerance(
        torch.float32, 1.0, MODEL_TERMS
    )
    limits = {"max_new_tokens": [6, 6], "stop_ids": set()}
    texts = [continue_greedily(b, left(CHATS), STEERINGS, **limits) for b in (backend, llama)]
    assert texts[0] == texts[1]


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None or not torch.cuda.is_available(),
    reason="needs bitsandbytes and CUDA",
)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_read(bits, tmp_path):
    import transformers

    make_tiny("llama", hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)
    options = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options)
    backend = NativeBackend(model)
    batch = TokenBatch.from_chats(CHATS, pad_id=0, side="right", device=backend.device)
    shares = backend.read_shares(batch, range(3), all_queries(CHATS).to(backend.device), STEERINGS)
    for i, chat in enumerate(CHATS):
        sums = shares[i, :, :, : len(chat)].sum(-1)
        assert_close(sums, 1.0, dtype=torch.float16, n_terms=1, room=20)
