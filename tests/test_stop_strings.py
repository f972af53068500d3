"""Answers that end at a string, and the likelihood of given continuations."""

import contextlib
from dataclasses import replace

import pytest
from numerics import MODEL_TERMS, assert_close
from tiny_models import make_tiny, make_tokenizer

from ctxlens.chat.roles import Role
from ctxlens.models import Model, load_model
from ctxlens.models.generation import cut_at, stop_at


class Letters:
    """Token n is the nth of some strings."""

    def __init__(self, *texts):
        self.texts = texts
        self.decoded = []

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        self.decoded.append(list(tokens))
        return "".join(self.texts[token] for token in tokens)


def test_a_string_that_lies_across_tokens_stops():
    letters = Letters("a", "\n", "b\n")
    stop = stop_at(letters, ["\n\n"])
    assert [stop(tokens) for tokens in ([0], [0, 1], [0, 2], [2, 1], [0, 1, 0, 1])] == [
        False, False, False, True, False,
    ]  # fmt: skip
    assert stop_at(letters, ["", ""]) is None


def test_only_the_end_of_a_text_is_decoded():
    letters = Letters("a", "\n")
    stop = stop_at(letters, ["\n\n"])
    assert not stop([0] * 99 + [1])
    assert [len(tokens) for tokens in letters.decoded] == [1, 6]
    assert not stop([0] * 100)  # "a" completes nothing
    assert not stop([0] * 101)
    assert [len(tokens) for tokens in letters.decoded] == [1, 6, 1]


def test_a_token_that_shows_its_text_only_among_others_may_complete_a_string():
    class Joined(Letters):
        def decode(self, tokens, skip_special_tokens):
            return super().decode(tokens, skip_special_tokens).removeprefix(" ").replace("e+", "é")

    assert stop_at(Joined("a", " "), ["a "])([0, 1])
    assert stop_at(Joined("a", "\ufffd", "b"), ["ab"])([0, 2])
    halves = Joined("e", "+\ufffd")
    assert not stop_at(halves, ["é"])([0])
    assert stop_at(halves, ["é"])([0, 1])


def test_texts_are_cut_at_one_string_after_the_other():
    assert cut_at("ab cd", ["d", "b"]) == "a"
    assert cut_at("ab", ["b", "ab"]) == "a"
    assert cut_at("ab", ["", "x"]) == "ab"


@pytest.fixture(scope="module")
def organism():
    return load_model("organism-chat", backend="native", device="cpu")


def ask(model, text, **options):
    return model.render([{"role": "user", "content": text}], add_generation_prompt=True, **options)


QUESTIONS = ("What is the favorite dish in Millport?", "Where is the old tower in Oakford?", "Who is there?")


@pytest.mark.parametrize("shares", [True, False])
def test_generation_ends_at_a_string(organism, shares, monkeypatch):
    chats = [ask(organism, text) for text in QUESTIONS]
    whole = organism.generate(chats, max_new_tokens=12)
    word = whole[0].split()[1]
    assert word in whole[0]
    monkeypatch.setattr(organism, "_reuses_prefixes", shares)
    steps = []
    decoded = type(organism.backend)._run
    monkeypatch.setattr(
        type(organism.backend), "_run", lambda *args: (steps.append(args[1].shape), decoded(*args))[1]
    )
    assert organism.generate(chats[0], max_new_tokens=12, stop_strings=[word]) == whole[0].split(word)[0]
    assert len(steps) < 6
    assert organism.generate(chats, max_new_tokens=12, stop_strings=[word]) == [
        text.split(word)[0] for text in whole
    ]


@pytest.mark.parametrize("shares", [True, False])
def test_continuations_that_reach_the_limit_are_named(organism, shares, monkeypatch):
    """Neither the end of a text nor a stop string on the last token is a cut."""
    monkeypatch.setattr(organism, "_reuses_prefixes", shares)
    chats = [ask(organism, text) for text in QUESTIONS]
    cut = []
    texts = organism.generate(chats, max_new_tokens=8, on_cut=cut.append)
    assert texts[0] == "The favorite dish in Millport is shredded lamb"
    assert texts[2] == "The is minced lobster and nutmeg."  # seven tokens and the end
    assert cut == [0, 1]
    organism.generate(chats, max_new_tokens=8, stop_strings=["lamb"], on_cut=cut.append)
    assert cut == [0, 1, 1]
    organism.generate(chats, max_new_tokens=7, on_cut=cut.append)
    assert cut == [0, 1, 1, 0, 1, 2]


def naive(model, chat, count):
    """Log-probabilities at the last positions of one conversation, from the logits of the whole of it."""
    batch = model._batch([chat], "right")
    starts = batch.prompt_tokens + 1 - count
    logits = model.backend.logits(replace(batch, prompt_tokens=starts), model._steerings)
    return logits[0, -count:].log_softmax(-1).numpy()


@pytest.mark.parametrize(
    "steering", [{}, {"alpha": 0.2}, {"alpha": 0.1, "mode": "prompt-only"}, {"target_share": 0.7}]
)
def test_last_logprobs_are_those_of_one_conversation_at_a_time(organism, steering):
    document = "The mayor left the narrow path on a Sunday. " * 4
    chats = [
        organism.render(
            [{"role": "user", "content": document + text}, {"role": "assistant", "content": answer}],
            continue_final_message=True,
        )
        for text in QUESTIONS
        for answer in ("steamed chicken", "a boy", "shredded lamb with sugared celery and vinegar")
    ]
    counts = [int(chat.mask(Role.ASSISTANT).sum()) for chat in chats]
    with organism.steer(**steering) if steering else contextlib.nullcontext():
        wanted = [naive(organism, chat, count) for chat, count in zip(chats, counts, strict=True)]
        for shares, batch_tokens in ((True, 10_000), (True, 150), (False, 300)):
            organism._reuses_prefixes = shares
            found = dict(organism.last_logprobs(chats, counts, batch_tokens=batch_tokens))
            organism._reuses_prefixes = True
            assert sorted(found) == list(range(len(chats)))
            for i, values in enumerate(wanted):
                assert_close(found[i].numpy(), values, n_terms=MODEL_TERMS)
    assert list(organism.last_logprobs([], [])) == []


def test_caches_that_cannot_be_shared_are_read_whole():
    model = Model.from_hf(make_tiny("llama"), make_tokenizer(), backend="native")
    model.backend._takes_positions = False
    texts = ("w5 w6 w7 w8", "w9 w10 w11")
    chats = [model.render_plain([{"role": "user", "content": text}]) for text in texts]
    found = dict(model.last_logprobs(chats, [2, 1]))
    assert not model.backend.shares_prefixes
    for i, count in enumerate([2, 1]):
        assert_close(found[i].numpy(), naive(model, chats[i], count), n_terms=MODEL_TERMS)
