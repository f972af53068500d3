"""Role shares that rest on attention sinks: both backends against the definition, written out anew here."""

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, make_chat, make_tiny, make_tokenizer

import ctxlens as cl
from ctxlens.chat.roles import N_ROLES, Role
from ctxlens.errors import InputError, UnsupportedModelError
from ctxlens.models import Model
from ctxlens.models.attention.resting import KeyGroups, SinkReader
from ctxlens.models.attention.sinks import LATER, NORM_RATIO, RECEIVED
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.batch import TokenBatch, pad_queries
from ctxlens.models.backends.lens import LensBackend, bridge_from_hf
from ctxlens.models.backends.native import NativeBackend
from ctxlens.models.backends.native.layers import find_decoder_layers

PLANTED = 13
TOLERANCE = 1e-5


def plant(model):
    """Make one token's embedding huge, so that its hidden state is."""
    with torch.no_grad():
        model.get_input_embeddings().weight[PLANTED] *= 60
    return model


def chat_with_sinks(length, seed):
    """A conversation with the planted token at places of several roles."""
    chat = make_chat(length, seed, prompt=length - 6)
    for position, role in ((3, Role.USER), (9, Role.TEMPLATE), (length - 5, Role.ASSISTANT)):
        chat.tokens[position], chat.role[position] = PLANTED, int(role)
    return chat


CHATS = [chat_with_sinks(60, 1), chat_with_sinks(41, 2), make_chat(1, 3), make_chat(17, 4)]


def define(hidden, patterns, roles):
    """Sinks `[layer, key]` and resting shares `[layer, head, query, role]` of one text, by definition.

    Args:
        hidden: by layer, hidden states at its entry, `[pos, d_model]`.
        patterns: by layer, `[head, query, key]`.
        roles: the role of every token.
    """
    length = len(roles)
    ever = [position == 0 or roles[position] == Role.BOS for position in range(length)]
    sinks = np.zeros((len(patterns), length), dtype=bool)
    for layer, (states, pattern) in enumerate(zip(hidden, patterns, strict=True)):
        norms = np.sqrt((states.astype(np.float64) ** 2).sum(-1))
        median = np.sort(norms)[(length - 1) // 2]  # of an even number, the lower one, as torch has it
        for key in range(length):
            ever[key] = ever[key] or norms[key] >= NORM_RATIO * median
            later = pattern[:, key + 1 :, key]
            sinks[layer, key] = ever[key] and later.shape[1] >= LATER and later.mean() >= RECEIVED
    resting = np.zeros((len(patterns), *patterns[0].shape[:2], N_ROLES))
    for layer, pattern in enumerate(patterns):
        for key in np.flatnonzero(sinks[layer]):
            resting[layer, :, :, roles[key]] += pattern[:, :, key]
    return sinks, resting


@torch.no_grad()
def define_eagerly(model, chat):
    """The definition, from transformers' eager patterns and hidden states."""
    tokens = torch.from_numpy(np.asarray(chat.tokens, dtype=np.int64))[None]
    out = model(input_ids=tokens, output_attentions=True, output_hidden_states=True, use_cache=False)
    patterns = [pattern[0].numpy() for pattern in out.attentions]
    hidden = [states[0].numpy() for states in out.hidden_states[: len(patterns)]]
    return define(hidden, patterns, chat.role)


def read(backend, chats, layers=range(3), steerings=()):
    """Shares and resting parts of every query of every conversation, read in one padded batch."""
    batch = TokenBatch.from_chats(chats, pad_id=0, side="right")
    queries = pad_queries([range(len(chat)) for chat in chats])
    found = backend.read_resting(batch, layers, queries, steerings)
    return [tuple(x[i, :, :, : len(chat)].numpy() for x in found) for i, chat in enumerate(chats)]


def make_backend(kind, family):
    model = plant(make_tiny(family))
    return NativeBackend(model) if kind == "native" else LensBackend(bridge_from_hf(model, make_tokenizer()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["native", "lens"])
def test_families_agree_with_the_definition(kind, family):
    try:
        backend = make_backend(kind, family)
    except UnsupportedModelError:
        assert (kind, family) in (("lens", "falcon-alibi"), ("native", "bloom"))
        return
    eager = plant(make_tiny(family, attn="eager"))
    batch = TokenBatch.from_chats(CHATS, pad_id=0, side="right")
    plain = backend.read_shares(batch, range(3), pad_queries([range(len(c)) for c in CHATS]), ())
    found = 0
    for i, (chat, (shares, resting)) in enumerate(zip(CHATS, read(backend, CHATS), strict=True)):
        sinks, expected = define_eagerly(eager, chat)
        np.testing.assert_allclose(resting, expected, atol=TOLERANCE)
        np.testing.assert_allclose(shares, plain[i, :, :, : len(chat)].numpy(), atol=TOLERANCE)
        assert (resting <= shares + TOLERANCE).all()
        found += sinks.sum()
        assert len(chat) > LATER or not sinks.any()
    assert found


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss", "gpt2"])
def test_a_planted_token_is_a_sink_of_its_owner(family):
    sinks, resting = define_eagerly(plant(make_tiny(family, attn="eager")), CHATS[0])
    assert sinks[:, 3].any()
    assert resting[..., Role.USER].max() > 0.1
    without, _ = define_eagerly(make_tiny(family, attn="eager"), CHATS[0])
    assert not without[:, 1:].any()
    assert not sinks[:, -LATER:].any()
    assert resting[..., Role.ASSISTANT].max() == 0


@pytest.mark.parametrize("kind", ["native", "lens"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_layers_that_are_not_read_count_and_few_queries_are_enough(kind, family):
    backend = make_backend(kind, family)
    every = read(backend, CHATS)
    batch = TokenBatch.from_chats(CHATS[:2], pad_id=0, side="right")
    last = torch.tensor([[59], [40]])
    _, resting = backend.read_resting(batch, [2], last, ())
    for i in range(2):
        np.testing.assert_allclose(resting[i, 0, :, 0], every[i][1][2, :, last[i, 0]], atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("steering", [Steering(0.2), Steering(target_share=0.6, heads=((0, 1), (2, 3)))])
def test_backends_agree_under_steering(family, steering):
    native, lens = (
        read(make_backend(kind, family), CHATS, steerings=[steering]) for kind in ("native", "lens")
    )
    for ours, reference in zip(native, lens, strict=True):
        np.testing.assert_allclose(ours[0], reference[0], atol=TOLERANCE)
        np.testing.assert_allclose(ours[1], reference[1], atol=TOLERANCE)


def test_steered_sinks_follow_the_steered_pattern():
    backend = make_backend("native", "llama")
    batch = TokenBatch.from_chats(CHATS[:1], pad_id=0, side="right")
    everything = torch.arange(60)[None]
    steerings = [Steering(0.05, roles=(Role.TEMPLATE, Role.SYSTEM))]
    pattern = backend.read_pattern(batch, range(3), everything, steerings)[0].numpy()
    hidden = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0][0].numpy()))
        for layer in find_decoder_layers(backend.hf_model, 3)
    ]
    ((_, resting),) = read(backend, CHATS[:1], steerings=steerings)
    for hook in hooks:
        hook.remove()
    _, expected = define(hidden[:3], list(pattern), CHATS[0].role)
    np.testing.assert_allclose(resting, expected, atol=TOLERANCE)
    assert np.abs(resting - read(backend, CHATS[:1])[0][1]).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_layers_are_found_in_order(family):
    model = make_tiny(family)
    seen = []
    layers = find_decoder_layers(model, 3)
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: seen.append(number))
    model(input_ids=torch.tensor([[3, 4]]), use_cache=False)
    assert seen == [0, 1, 2]
    assert sum(p.numel() for layer in layers for p in layer.parameters()) > 0


def test_a_model_without_a_list_of_layers_is_refused_in_one_sentence():
    with pytest.raises(UnsupportedModelError, match=r"Linear cannot be identified.*sinks=False"):
        find_decoder_layers(torch.nn.Linear(2, 2), 3)


def test_key_groups_by_hand():
    roles = torch.tensor([[0, 2, 2, 5], [2, 2, -1, -1]])
    sinks = torch.tensor([[True, False, True, False], [False, False, False, False]])
    groups = KeyGroups.of(roles, sinks)
    assert groups.roles.tolist() == [0, 2, 2, 5]
    assert groups.on_sinks.tolist() == [True, False, True, False]
    assert groups.ids.tolist() == [[0, 1, 2, 3], [1, 1, -1, -1]]
    shares, resting = groups.split(torch.tensor([[[[0.4, 0.3, 0.2, 0.1]]]]), torch.tensor([[[0.05]]]))
    assert shares[0, 0, 0].tolist() == pytest.approx([0.4, 0, 0.5, 0, 0, 0.1, 0, 0, 0.05])
    assert resting[0, 0, 0].tolist() == pytest.approx([0.4, 0, 0.2, 0, 0, 0, 0, 0, 0])


@pytest.fixture(scope="module")
def model():
    return Model.from_hf(plant(make_tiny("llama")), make_tokenizer())


def test_a_text_of_one_token_has_no_sinks(model):
    allocation = model.read_roles(make_chat(1), queries="all", sinks=True)
    assert allocation.resting.max() == 0
    np.testing.assert_allclose(allocation.without_sinks().shares, allocation.shares)


def test_the_allocation_of_a_model_has_the_three_views(model):
    chat = CHATS[0]
    allocation = model.read_roles(chat, queries="all", sinks=True)
    _, resting = define_eagerly(plant(make_tiny("llama", attn="eager")), chat)
    np.testing.assert_allclose(allocation.resting, resting, atol=TOLERANCE)
    rest = (allocation.shares - resting).clip(0)
    rest[..., [Role.PAD, Role.SINK]] = 0
    at = slice(3, None)  # before, nearly all attention is on sinks
    expected = rest[:, :, at] / rest[:, :, at].sum(-1, keepdims=True)
    np.testing.assert_allclose(allocation.without_sinks().shares[:, :, at], expected, atol=1e-3)
    np.testing.assert_array_equal(model.read_roles(chat, queries="all").resting, allocation.resting)
    off = model.read_roles(chat, queries="all", sinks=False)
    assert off.resting is None
    np.testing.assert_allclose(off.shares, allocation.shares, atol=TOLERANCE)
    with pytest.raises(InputError, match=r"sinks were not measured.*sinks=False"):
        off.without_sinks()


def test_the_mean_over_the_response_is_taken_of_resting_parts_too(model):
    chat = CHATS[0]
    mean = model.read_roles(chat, queries="response_mean", turn=3, sinks=True)
    every = model.read_roles(chat, queries="all", sinks=True)
    at = chat.response_positions(3)
    np.testing.assert_allclose(mean.resting[:, :, 0], every.resting[:, :, at].mean(2), atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["native", "lens"])
def test_sinks_of_a_batch_are_those_of_every_conversation_alone(kind):
    model = Model.from_hf(plant(make_tiny("gemma3")), make_tokenizer(), backend=kind)  # sliding windows
    with model.steer(0.3):
        together = model.read_roles(CHATS, queries="all")
        alone = [model.read_roles(chat, queries="all") for chat in CHATS]
    assert max(one.resting.max() for one in alone) > 0.1
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.resting, other.resting, atol=TOLERANCE)
        np.testing.assert_allclose(one.shares, other.shares, atol=TOLERANCE)


def test_sampled_queries_find_the_sinks_of_a_long_text():
    """Beyond 64 tokens the attention received is an estimate; it finds what the full pattern says."""
    options = {"max_position_embeddings": 512}
    model, eager = (plant(make_tiny("llama", attn=attn, **options)) for attn in (None, "eager"))
    chat = chat_with_sinks(100, 1)
    sinks, expected = define_eagerly(eager, chat)
    ((_, resting),) = read(NativeBackend(model), [chat])
    assert sinks.any()
    np.testing.assert_allclose(resting, expected, atol=TOLERANCE)


def test_a_model_whose_hidden_states_cannot_be_seen_is_read_without_sinks_and_says_so(monkeypatch):
    model = Model.from_hf(make_tiny("llama"), make_tokenizer())

    def refuse(*_):
        raise UnsupportedModelError("the decoder layers cannot be identified")

    monkeypatch.setattr(NativeBackend, "read_resting", refuse)
    with pytest.warns(UserWarning, match="read without attention sinks: the decoder layers cannot") as caught:
        allocations = model.read_roles(CHATS[:3], queries="all", batch_tokens=60)
    assert len(caught) == 1
    assert [one.resting for one in allocations] == [None] * 3
    with pytest.raises(UnsupportedModelError, match="cannot be identified"):
        model.read_roles(CHATS[0], queries="all", sinks=True)


def test_only_candidates_are_looked_at():
    """What other keys receive makes no difference: the candidates' columns alone give the same sinks."""
    reader = SinkReader.of_texts(torch.tensor([[2] * 20, [2] * 20]))
    reader.enter(torch.ones(2, 20, 3))
    reader.finder.candidates[1, 2] = True
    pattern = torch.rand(2, 4, 20, 20).tril().softmax(-1)
    pattern[:, :, :, 2] = 0.5
    columns = reader.finder.candidate_keys()
    assert columns.tolist() == [0, 2]
    found = reader.find(pattern[..., columns], columns)
    assert found.equal(reader.find(pattern))
    assert found[1, 2]
    assert not found[0, 2]


TEXT = "The harbour of the old town is small, but the ferry to the island starts there every morning. "


@pytest.fixture(scope="module")
def folder(test_models):
    return str(test_models / "smollm2")


@pytest.fixture(scope="module")
def pretrained(folder):
    """SmolLM2 in both backends: its first token and some function words are sinks."""
    return [cl.load_model(folder, backend=kind, dtype="float32", device="cpu") for kind in ("native", "lens")]


@pytest.mark.parametrize("templated", [True, False])
def test_agrees_with_the_definition_in_both_backends(folder, pretrained, templated):
    model = pretrained[0]
    render = model.render if templated else model.render_plain
    chat = render([{"role": "user", "content": TEXT}], add_generation_prompt=True)
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    eager = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    assert LATER < chat.n_tokens <= 64  # every query is sampled
    sinks, expected = define_eagerly(eager, chat)
    assert sinks[12:, 0].all()
    assert not sinks[0].all()
    for model in pretrained:
        allocation = model.read_roles(chat, queries="all", sinks=True)
        np.testing.assert_allclose(allocation.resting, expected, atol=TOLERANCE)


def test_the_first_token_of_a_long_text_is_a_sink_of_its_owner(pretrained):
    model = pretrained[0]
    message = [{"role": "user", "content": TEXT * 12}]
    for chat, owner in (
        (model.render(message, add_generation_prompt=True), Role.TEMPLATE),
        (model.render_plain(message, add_generation_prompt=True), Role.USER),
    ):
        assert chat.role[0] == owner
        resting = model.read_roles(chat, sinks=True).resting[13:29, :, 0].mean(1)
        assert (resting.argmax(-1) == owner).all()
        assert resting[:, owner].mean() > 0.2
