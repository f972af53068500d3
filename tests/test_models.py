"""`load_model` and `Model`: what they take, what they refuse, and that both backends agree."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from numerics import MODEL_TERMS, assert_close, near
from tiny_models import VOCAB, make_chat, make_tiny, make_tokenizer

from ctxlens.chat.roles import Role
from ctxlens.errors import InputError
from ctxlens.models import Model, load_model

CHATS = [make_chat(20, 1, prompt=14), make_chat(13, 2, prompt=9), make_chat(17, 3)]
STORY = [
    {"role": "user", "content": "Once upon a time there was a little girl. What did she do?"},
    {"role": "assistant", "content": "She played with a ball."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "She went home."},
]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tiny float16 checkpoint and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tiny("llama").half().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["native", "lens"])
def model(request):
    return Model.from_hf(make_tiny("llama"), make_tokenizer(), backend=request.param, name="tiny")


class TestLoading:
    @pytest.mark.parametrize("backend", ["native", "lens"])
    def test_a_folder(self, checkpoint, backend):
        model = load_model(checkpoint, backend=backend, device="cpu")
        assert (model.n_layers, model.n_heads, model.n_key_value_heads) == (3, 4, 2)
        assert (model.d_model, model.d_head, model.n_ctx) == (32, 8, 64)
        assert model.device == torch.device("cpu")
        assert model.identity["dtype"] == "float32"
        assert model.identity["backend"] == backend
        assert len(model.identity["sha256"]) == 16
        assert json.dumps(model.identity)

    def test_identity_follows_the_weights(self, checkpoint, tmp_path):
        first = load_model(checkpoint, backend="native", device="cpu").identity["sha256"]
        shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
        assert load_model(tmp_path, backend="native", device="cpu").identity["sha256"] == first
        make_tiny("llama", seed=1).half().save_pretrained(tmp_path)
        assert load_model(tmp_path, backend="native", device="cpu").identity["sha256"] != first

    def test_a_template_of_the_users_own(self, checkpoint, tmp_path):
        (tmp_path / "mine.jinja").write_text(TEMPLATE)
        messages = [{"role": "user", "content": "w7 w8"}]
        for given in (tmp_path / "mine.jinja", str(tmp_path / "mine.jinja"), TEMPLATE):
            model = load_model(checkpoint, backend="native", device="cpu", chat_template=given)
            assert model.render(messages).text == "user: w7 w8\n"

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"backend": "other"}, "unknown backend 'other'"),
            ({"device": "abacus"}, "unknown device 'abacus'"),
            ({"dtype": "float8"}, "unknown dtype 'float8'; choose one of float32"),
            ({"chat_template": "missing.jinja"}, r"there is no chat template 'missing\.jinja'"),
        ],
    )
    def test_bad_options(self, checkpoint, options, words):
        with pytest.raises(InputError, match=words):
            load_model(checkpoint, **{"device": "cpu", "backend": "native", **options})

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_cuda_without_cuda(self, checkpoint):
        with pytest.raises(InputError, match="torch sees no CUDA device"):
            load_model(checkpoint, device="cuda")

    @pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "a/b/c", "./here", "owner/na me"])
    def test_no_such_model(self, name):
        with pytest.raises(InputError, match="neither a folder here nor a Hub id of the form owner/name"):
            load_model(name)

    def test_a_hub_id_that_cannot_be_had(self):
        with pytest.raises(InputError, match="can be loaded from no-such-owner/no-such-model"):
            load_model("no-such-owner/no-such-model", device="cpu")

    @pytest.mark.parametrize(
        ("missing", "words"),
        [
            ("config.json", r"no config\.json"),
            ("*.safetensors", "no safetensors weights.*save_pretrained"),
            ("tokenizer*", "no tokenizer can be loaded"),
        ],
    )
    def test_incomplete_folders(self, checkpoint, tmp_path, missing, words):
        shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
        for path in tmp_path.glob(missing):
            path.unlink()
        with pytest.raises(InputError, match=words):
            load_model(tmp_path, backend="native", device="cpu")

    def test_indicator_is_found_in_the_tokenizer(self):
        tokenizer = make_tokenizer()
        assert Model.from_hf(make_tiny("llama"), tokenizer).indicator is None
        tokenizer.add_tokens(["[IND]"])
        assert Model.from_hf(make_tiny("llama"), tokenizer).indicator == "[IND]"
        assert Model.from_hf(make_tiny("llama"), tokenizer, indicator="w9").indicator == "w9"


class TestReading:
    def test_one_or_several(self, model):
        several = model.read_roles(CHATS, turn=None, queries="all")
        for chat, allocation in zip(CHATS, several, strict=True):
            alone = model.read_roles(chat, queries="all")
            assert_close(alone.shares, allocation.shares, n_terms=MODEL_TERMS)
            assert allocation.shares.shape == (3, 4, len(chat), len(Role))
            np.testing.assert_array_equal(alone.key_counts.sum(-1), np.arange(1, len(chat) + 1))
            assert allocation.queries == "positions"

    def test_a_small_budget_gives_the_same(self, model):
        small = model.read_roles(CHATS, queries="response_mean", batch_tokens=1)
        for one, other in zip(small, model.read_roles(CHATS, queries="response_mean"), strict=True):
            assert_close(one.shares, other.shares, n_terms=MODEL_TERMS)

    def test_response_mean_and_first_answer(self, model):
        everything = model.read_roles(CHATS[0], queries="all")
        mean = model.read_roles(CHATS[0], queries="response_mean", turn=3)
        assert_close(mean.shares[:, :, 0], everything.shares[:, :, 14:].mean(2), n_terms=MODEL_TERMS)
        assert_close(mean.key_counts[0], everything.key_counts[14:].mean(0), n_terms=MODEL_TERMS)
        first = model.read_roles(CHATS[0], turn=3)
        assert_close(first.shares[:, :, 0], everything.shares[:, :, 13], n_terms=MODEL_TERMS)
        assert (mean.queries, first.queries, first.query_labels) == (
            "response_mean",
            "first_answer",
            ("0:13",),
        )
        assert first.meta["condition"] == "template"

    def test_response_shares_are_the_rows_of_the_response(self, model):
        by_turn = model.read_response_shares(CHATS, layers=[2, 0])
        for chat, turns in zip(CHATS, by_turn, strict=True):
            everything = model.read_roles(chat, queries="all").shares
            assert tuple(turns) == chat.response_turns()
            for turn, shares in turns.items():
                want = everything[[2, 0]][:, :, chat.response_positions(turn)]
                assert_close(shares, want, n_terms=MODEL_TERMS)
                assert shares.dtype == np.float32

    def test_patterns_reduce_to_shares(self, model):
        pattern = model.read_patterns(CHATS[0], layers=[1], queries=[13, 2])
        assert pattern.shape == (1, 4, 2, 20)
        want = model.read_roles(CHATS[0], layers=[1], queries=[13, 2]).shares
        one_hot = np.eye(len(Role), dtype=np.float32)[CHATS[0].role]
        assert_close(pattern @ one_hot, want, n_terms=MODEL_TERMS)

    def test_logprobs_are_those_of_the_loss(self, model):
        got = model.logprobs(CHATS[:2], turn=3)
        for chat, logprobs in zip(CHATS, got, strict=False):
            labels = torch.from_numpy(np.where((chat.role == 3) & (chat.turn == 3), chat.tokens, -100))[None]
            with torch.no_grad():
                loss = make_tiny("llama")(torch.from_numpy(chat.tokens)[None], labels=labels).loss
            assert -logprobs.mean() == near(loss.item(), MODEL_TERMS)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"layers": [3]}, "layer 3 does not exist: the model has layers 0 to 2"),
            ({"layers": [-1]}, "layer -1 does not exist"),
            ({"queries": [99]}, "query position 99 does not exist"),
            ({"queries": "last"}, "unknown queries 'last'"),
            ({"turn": 0}, "no response in turn 0"),
        ],
    )
    def test_what_is_not_there_is_named(self, model, change, words):
        with pytest.raises(InputError, match=words):
            model.read_roles(CHATS[0], **change)

    def test_conversations_that_do_not_fit(self, model):
        with pytest.raises(InputError, match="65 tokens, but the model's window is 64"):
            model.read_roles(make_chat(65), queries="all")
        with pytest.raises(InputError, match="window is 64 and must also hold an answer"):
            model.generate(make_chat(64))
        foreign = make_chat(5)
        foreign.tokens[2] = VOCAB
        with pytest.raises(InputError, match="rendered with another tokenizer"):
            model.read_roles(foreign, queries="all")


class TestSteering:
    def test_nested_and_restored(self, model):
        plain = model.read_roles(CHATS[0], queries="all").shares

        def fail():
            with model.steer(0.1):
                raise KeyError

        with model.steer(0.5, roles="user"), model.steer(0.4, roles="user"):
            nested = model.read_roles(CHATS[0], queries="all")
        with model.steer(0.2, roles=Role.USER) as steering:
            once = model.read_roles(CHATS[0], queries="all")
        with pytest.raises(KeyError):
            fail()
        assert_close(nested.shares, once.shares, n_terms=MODEL_TERMS)
        assert once.meta["steering"] == [steering.describe()]
        np.testing.assert_array_equal(model.read_roles(CHATS[0], queries="all").shares, plain)

    def test_refusals(self, model):
        def steer(*args, **kwargs):
            with model.steer(*args, **kwargs):
                pass

        with pytest.raises(InputError, match="alpha"):
            steer(1.5)
        with pytest.raises(InputError, match=r"head 3\.0 does not exist: the model has layers 0 to 2"):
            steer(0.5, heads="3.0")


class TestGenerating:
    def test_batched_is_one_by_one_in_order(self, model):
        for alpha in (1.0, 0.1):
            with model.steer(alpha):
                together = model.generate(CHATS, max_new_tokens=12)
                assert together == [model.generate(chat, max_new_tokens=12) for chat in CHATS]
                assert together == model.generate(CHATS, max_new_tokens=12, batch_tokens=1)

    def test_the_window_ends_the_text(self, model):
        text = model.generate(make_chat(60, 4), max_new_tokens=100)
        assert len(text.split()) <= 4

    def test_both_backends_write_the_same(self):
        written = [
            Model.from_hf(make_tiny("llama"), make_tokenizer(), backend=backend).generate(
                CHATS, max_new_tokens=20
            )
            for backend in ("native", "lens")
        ]
        assert written[0] == written[1]

    def test_a_stop_token_ends_the_text(self):
        hf, tokenizer = make_tiny("llama"), make_tokenizer()
        whole = Model.from_hf(hf, tokenizer).generate(CHATS[0], max_new_tokens=10).split()
        hf.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids(whole[3])]
        cut = Model.from_hf(hf, tokenizer).generate(CHATS[0], max_new_tokens=10).split()
        assert cut == whole[: whole.index(whole[3])]


@pytest.mark.parametrize("name", ["organism", "stories"])
def test_real_weights_on_both_backends(name, request):
    """The packaged model, and a third party's with a template given by the user."""
    if name == "stories":
        name = request.getfixturevalue("test_data") / "stories260K" / "hf"
    native, lens = (
        load_model(name, backend=b, device="cpu", chat_template=TEMPLATE) for b in ("native", "lens")
    )
    chats = [native.render(STORY), native.render(STORY[:2])]
    for kwargs in ({"alpha": 1.0}, {"alpha": 0.2}):
        with native.steer(**kwargs), lens.steer(**kwargs):
            for one, other in zip(
                native.read_roles(chats, queries="all"), lens.read_roles(chats, queries="all"), strict=True
            ):
                assert_close(one.shares, other.shares, n_terms=MODEL_TERMS)
            assert native.generate(chats, max_new_tokens=15) == [
                lens.generate(chat, max_new_tokens=15) for chat in chats
            ]
    mean = native.logprobs(chats)[0].mean()
    assert math.isfinite(mean)
    assert mean < 0


def test_what_does_not_fit_the_memory_is_refused_before_it_is_tried(model, monkeypatch):
    whole = model.read_roles(CHATS)
    monkeypatch.setattr("ctxlens.models.model.free_memory", lambda device: 1000)
    with pytest.raises(InputError, match="one conversation of 20 tokens needs about"):
        model.read_roles(CHATS)
    for one, other in zip(whole, model.read_roles(CHATS, batch_tokens=20), strict=True):
        assert_close(one.shares, other.shares, n_terms=MODEL_TERMS)


def test_attention_to_chosen_tokens_is_the_sum_of_the_pattern_over_them():
    model = load_model("organism", backend="native")
    chats = [
        model.render([{"role": "user", "content": text}, {"role": "assistant", "content": "The river."}])
        for text in ("A long story about a mayor.", "Where?")
    ]
    chosen = [np.arange(chat.n_tokens) % 3 == 1 for chat in chats]
    read = model.read_attention_to(chats, chosen)
    for chat, mask, found in zip(chats, chosen, read, strict=True):
        pattern = model.read_patterns(chat, queries="response_mean")
        expected = pattern[..., mask].sum(-1).mean(-1, keepdims=True)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    every = model.read_attention_to(chats[1:], chosen[1:], queries="all")[0]
    np.testing.assert_allclose(every, model.read_patterns(chats[1])[..., chosen[1]].sum(-1), atol=1e-5)
    with pytest.raises(InputError, match="but the mask of chosen tokens 3"):
        model.read_attention_to(chats[:1], [np.zeros(3, dtype=bool)])
    with model.steer(0.5), pytest.raises(InputError, match="while attention is steered"):
        model.read_attention_to(chats, chosen)
