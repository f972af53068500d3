"""Attention of a conversation that was read once, against patterns and shares of forward passes."""

import numpy as np
import pytest
import torch
from family_checks import CHATS, right
from tiny_models import make_tiny

import ctxlens as cl
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.native import NativeBackend
from ctxlens.models.rows import likely_tokens, read_rows, stream_answer, tokens_of_mass

QUESTION = [{"role": "user", "content": "The mayor of Oakford is Ada. " * 8 + "Who is the mayor of Oakford?"}]


@pytest.fixture(scope="module")
def organism():
    return cl.load_model("organism-chat", backend="native", device="cpu")


@pytest.fixture(scope="module")
def chat(organism):
    return organism.render(QUESTION, add_generation_prompt=True)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss", "gemma2"])
@pytest.mark.parametrize("steerings", [[], [Steering(0.3, heads=((1, 1),))]], ids=["plain", "steered"])
def test_held_rows_and_shares_are_those_of_forward_passes(family, steerings):
    backend, tokens = NativeBackend(make_tiny(family)), right([CHATS[0]])
    held = backend.hold(tokens, steerings)
    layers, queries = range(backend.shape.n_layers), [3, CHATS[0].n_tokens - 1]
    asked = torch.tensor([queries])
    pattern = backend.read_pattern(tokens, layers, asked, steerings)[0]
    torch.testing.assert_close(held.pattern(layers, queries), pattern, atol=2e-6, rtol=1e-4)
    want = backend.read_resting(tokens, layers, asked, steerings)
    shares, resting = held.shares(queries)
    torch.testing.assert_close(shares, want.shares[0], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(resting, want.resting[0], atol=1e-5, rtol=1e-3)
    logits = backend.logits(tokens, steerings)[0, -1]
    torch.testing.assert_close(held.next_logits, logits.float(), atol=1e-4, rtol=1e-3)


def test_rows_of_a_conversation(organism, chat):
    rows = read_rows(organism, chat)
    assert rows.query == chat.n_tokens - 1
    assert rows.holds(5)
    pattern = organism.read_patterns(chat, layers=[2], queries=[5])
    np.testing.assert_allclose(rows.row(2, 1, 5), pattern[0, 1, 0], atol=1e-6)
    assert rows.row(2, 1, 5)[6:].sum() == 0
    read = organism.read_roles(chat)
    found = rows.allocation(chat.n_tokens - 1)
    for view in ("raw", "renormalised", "without sinks"):
        np.testing.assert_allclose(found.share("user", view=view), read.share("user", view=view), atol=1e-5)
    assert np.exp(rows.next_logprobs).sum() == pytest.approx(1, abs=1e-4)
    first = likely_tokens(rows, organism.tokenizer, 3)
    assert [p for _, p in first] == sorted((p for _, p in first), reverse=True)


def test_held_bytes_are_queries_and_keys(organism, chat):
    rows = read_rows(organism, chat)
    width = (organism.n_heads + organism.n_key_value_heads) * organism.d_head
    least = 4 * organism.n_layers * chat.n_tokens * width
    assert least <= rows.nbytes < 1.6 * least + 2**18


def test_rows_follow_the_steering(organism, chat):
    plain = read_rows(organism, chat).allocation(chat.n_tokens - 1).share("user").mean()
    with organism.steer(0.1):
        steered = read_rows(organism, chat)
    assert steered.allocation(chat.n_tokens - 1).share("user").mean() > plain + 0.05
    assert steered.meta["steering"][0]["alpha"] == 0.1


def test_another_backend_knows_the_rows_of_one_query(chat):
    lens = cl.load_model("organism-chat", backend="lens", device="cpu")
    native = cl.load_model("organism-chat", backend="native", device="cpu")
    rows, held = read_rows(lens, chat, 20), read_rows(native, chat)
    assert rows.holds(20)
    assert not rows.holds(21)
    np.testing.assert_allclose(rows.row(1, 2, 20), held.row(1, 2, 20), atol=1e-5)
    np.testing.assert_allclose(rows.allocation(20).shares, held.allocation(20).shares, atol=1e-4)
    np.testing.assert_allclose(rows.next_logprobs, held.next_logprobs, atol=1e-3)


def test_reading_tells_its_progress_and_ends_when_asked(organism, chat):
    seen = []
    read_rows(organism, chat, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, organism.n_layers) for i in range(1, organism.n_layers + 1)]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_rows(organism, chat, progress=stop)
    assert organism.read_roles(chat).shares.shape[0] == organism.n_layers


def test_a_query_that_does_not_exist_is_refused(organism, chat):
    with pytest.raises(cl.InputError, match="query position 9999 does not exist"):
        read_rows(organism, chat, 9999)


def test_an_answer_grows_token_by_token(organism, chat):
    seen = []
    answer = stream_answer(organism, chat, seen.append, max_new_tokens=6)
    assert answer == organism.generate(chat, max_new_tokens=6)
    assert seen[-1] == answer
    assert [len(text) for text in seen] == sorted(len(text) for text in seen)


def test_the_fewest_tokens_that_hold_a_part():
    row = np.array([0.1, 0.5, 0.05, 0.35])
    assert tokens_of_mass(row, 0.8) == [(1, 0.5), (3, 0.35)]
    assert tokens_of_mass(row, 0.5) == [(1, 0.5)]
    assert [at for at, _ in tokens_of_mass(row, 1.0)] == [1, 3, 0, 2]
