"""Prompts that begin alike: the tree of what they have in common, and the same texts as one by one."""

import contextlib
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_models import make_tiny, make_tokenizer

import ctxlens.models.backends.native.backend as native_backend
import ctxlens.models.sharing as sharing
from ctxlens.chat.roles import RenderedChat
from ctxlens.errors import InputError, ModelFailureError
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.prompts import render_cell
from ctxlens.models import Model, load_model
from ctxlens.models.prefix_tree import count_read, plan_branches


def conversation(tokens, roles=None):
    size = len(tokens)
    roles = [1] * size if roles is None else roles
    return RenderedChat(
        "", np.asarray(tokens, dtype=np.int64), np.asarray(roles, dtype=np.int8),
        np.zeros(size, dtype=np.int32), np.zeros((size, 2), dtype=np.int32), (), False, {},
    )  # fmt: skip


def test_depths_of_one_length_hang_on_one_of_them():
    # Straw 1 to 9 with a needle 0 at 2, 5 and 9: one is read whole, the others from where they part from it.
    straw = list(range(1, 10))
    chats = [conversation([*straw[:at], 0, *straw[at:]]) for at in (5, 9, 2)]
    branches = {branch.index: branch for branch in plan_branches(chats, least=2)}
    assert [(branches[i].parent, branches[i].shared, branches[i].round) for i in range(3)] == [
        (None, 0, 0), (0, 5, 1), (0, 2, 1),
    ]  # fmt: skip
    assert count_read(chats, list(branches.values())) == 10 + 5 + 8
    alone = plan_branches(chats, least=6)
    assert all(branch.parent is None and branch.round == 0 for branch in alone)


def test_tokens_of_another_role_are_not_shared():
    chats = [conversation([1, 2, 3, 4]), conversation([1, 2, 3, 5], [1, 1, 2, 1])]
    assert {branch.shared for branch in plan_branches(chats, least=1)} == {0, 2}


def test_every_node_of_the_tree_is_read_once():
    rng = random.Random(0)
    for _ in range(200):
        texts = [[rng.randint(0, 1) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 12))]
        branches = plan_branches([conversation(text) for text in texts], least=1)
        rounds = {branch.index: branch.round for branch in branches}
        assert sorted(rounds) == list(range(len(texts)))
        assert max(rounds.values()) <= np.log2(len(texts))
        for branch in branches:
            text = texts[branch.index]
            assert branch.shared < len(text)
            if branch.parent is not None:
                assert rounds[branch.parent] < branch.round
                assert texts[branch.parent][: branch.shared] == text[: branch.shared]
        nodes = {tuple(text[:end]) for text in texts for end in range(1, len(text) + 1)}
        order = sorted(texts)
        swallowed = sum(b[: len(a)] == a for a, b in pairwise(order))
        read = count_read([conversation(text) for text in texts], branches)
        assert len(nodes) <= read <= len(nodes) + swallowed  # whose last token is read for its logits


@pytest.fixture(scope="module")
def organism():
    return load_model("organism-chat", backend="native", device="cpu")


@pytest.fixture(scope="module")
def prompts(organism):
    config = NeedleConfig(
        lengths=(50, 90),
        depths=3,
        needles=("known",),
        conditions=("plain+prefix", "template+prefix", "template"),
    )
    cells = build_cells(organism, config, load_haystack("organism"))
    return [
        render_cell(organism, cell, config, condition) for cell in cells for condition in config.conditions
    ]


@pytest.mark.parametrize("steering", [{}, {"alpha": 0.2}, {"alpha": 0.1, "mode": "prompt-only"}])
def test_texts_are_those_of_one_prompt_at_a_time(organism, prompts, steering):
    with organism.steer(**steering) if steering else contextlib.nullcontext():
        organism._reuses_prefixes = False
        alone = [organism.generate(chat, max_new_tokens=7) for chat in prompts]
        organism._reuses_prefixes = True
        for batch_tokens in (300, 100_000):
            assert organism.generate(prompts, max_new_tokens=7, batch_tokens=batch_tokens) == alone
    assert organism._reuses_prefixes
    assert len(set(alone)) > 4


def test_each_token_of_the_tree_goes_through_the_model_once(organism, prompts, monkeypatch):
    read = []
    prefill = type(organism.backend).prefill

    def counted(self, batch, past, known, steerings, n_logits=1):
        read.append(int(batch.attention_mask[:, known:].sum()))
        return prefill(self, batch, past, known, steerings, n_logits)

    # Where prompts share a batch, the shorter ones read a part of their prefix again in place of padding.
    monkeypatch.setattr(sharing, "_ON_CPU", sharing.Tolerance(0, 1.0, 512))
    monkeypatch.setattr(type(organism.backend), "prefill", counted)
    organism.generate(prompts, max_new_tokens=1)
    planned = count_read(prompts, plan_branches(prompts))
    assert sum(read) == planned < 0.75 * sum(map(len, prompts))


def tiny_prompts(family):
    """A tiny model, and prompts with prefixes of several lengths in common, longer than the windows of 8."""
    model = Model.from_hf(make_tiny(family), make_tokenizer(), backend="native")
    rng = random.Random(1)
    words = [f"w{rng.randint(5, 63)}" for _ in range(30)]
    return model, [
        model.render_plain([{"role": "user", "content": " ".join([*words[:at], *more, *words[at:]])}])
        for at, more in ((18, ["w7"]), (20, ["w7"]), (22, ["w9", "w8", "w5"]), (30, ["w7"]))
    ]


@pytest.mark.parametrize("family", ["falcon-alibi", "gemma2", "gemma3", "gpt2", "gpt-oss", "mistral"])
@pytest.mark.parametrize("alpha", [1.0, 0.2])
def test_logits_are_those_of_one_prompt_at_a_time(family, alpha, monkeypatch):
    monkeypatch.setattr(native_backend, "_PASS_COLUMNS", 7)
    model, chats = tiny_prompts(family)
    assert model.backend.shares_prefixes
    with model.steer(alpha):
        together = dict(model.last_logprobs(chats, [3, 1, 9, 2]))
        texts = model.generate(chats, max_new_tokens=6)
        model._reuses_prefixes = False
        for i, (chat, count) in enumerate(zip(chats, [3, 1, 9, 2], strict=True)):
            ((_, alone),) = model.last_logprobs([chat], [count])
            assert torch.allclose(together[i], alone, atol=1e-5)
        assert texts == [model.generate(chat, max_new_tokens=6) for chat in chats]


def test_logprobs_of_answers_share_their_text_and_equal_those_of_whole_passes(organism, monkeypatch):
    text = "The mayor left the narrow path on a Sunday. " * 12
    answers = ("It is a path.", "A Sunday in May, and a boy.", "Nobody knows.")
    chats = [
        organism.render([{"role": "user", "content": text + asked}, {"role": "assistant", "content": said}])
        for asked, said in zip(("When?", "What is it?", "Who?"), answers, strict=True)
    ]
    with organism.steer(1.0):  # changes nothing, but every conversation is read whole
        whole = organism.logprobs(chats)
    read = []
    prefill = type(organism.backend).prefill

    def counted(self, batch, past, known, steerings, n_logits=1):
        read.append(int(batch.attention_mask[:, known:].sum()))
        return prefill(self, batch, past, known, steerings, n_logits)

    monkeypatch.setattr(type(organism.backend), "prefill", counted)
    shared = organism.logprobs(chats)
    for one, other, chat in zip(shared, whole, chats, strict=True):
        assert one.shape == chat.response_positions().shape
        assert np.allclose(one, other, atol=1e-5)
    assert 0 < sum(read) < 0.6 * sum(chat.n_tokens for chat in chats)
    with pytest.raises(InputError, match="no assistant turn"):
        organism.logprobs([organism.render([{"role": "user", "content": "Hi"}])])


def test_models_that_take_no_positions_read_every_prompt_whole():
    model, chats = tiny_prompts("llama")
    model.backend._takes_positions = False
    assert not model.backend.shares_prefixes
    together = model.generate(chats, max_new_tokens=6)
    assert together == [model.generate(chat, max_new_tokens=6) for chat in chats]


@pytest.mark.parametrize(
    ("first", "last", "n_logits", "parts"),
    [
        (0, 700, 1, [(0, 700)]),
        (0, 1300, 1, [(0, 433), (433, 866), (866, 1300)]),
        (100, 1124, 1, [(100, 612), (612, 1124)]),
        (0, 1024, 600, [(0, 1024)]),
        (5, 6, 1, [(5, 6)]),
    ],
)
def test_long_prompts_are_read_in_equal_passes(organism, first, last, n_logits, parts):
    assert list(organism.backend._split(first, last, n_logits)) == parts


def test_long_prompts_are_read_alone_on_a_cpu():
    chats = [conversation(range(size)) for size in (600, 590, 40, 30, 20)]
    branches = plan_branches(chats, least=1000)
    tolerance = sharing.Tolerance(short=16, alike=0.75, long=512)
    parts = [[b.index for b in part] for part in sharing._alike(chats, branches, tolerance)]
    assert parts == [[0], [1], [2, 3], [4]]


def test_logits_that_are_no_numbers_are_refused():
    assert sharing.choose(torch.tensor([[0.0, 2.0, 1.0]])) == [1]
    with pytest.raises(ModelFailureError, match="not numbers"):
        sharing.choose(torch.tensor([[0.0, 2.0], [float("nan"), 1.0]]))
