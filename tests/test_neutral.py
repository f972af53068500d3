"""The texts of this package for audits of real models, and when they are the default."""

import hashlib
import re
import shutil
from collections import Counter
from itertools import islice

import pytest

from ctxlens.errors import InputError
from ctxlens.evals.needle import NeedleConfig, choose_texts, load_haystack, neutral_chats, neutral_needles
from ctxlens.evals.needle.cells import _resolve_needles
from ctxlens.evals.needle.match import find_missing, split_words
from ctxlens.evals.needle.needles import draw_neutral, parse_needles
from ctxlens.evals.needle.neutral import _Bag, _Volume, load_patterns, neutral_texts
from ctxlens.evals.needle.sentences import split_sentences
from ctxlens.organism import CHAT


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """The documents of one volume."""
    return list(neutral_texts(30))


def test_texts_are_the_same_everywhere(documents):
    assert hashlib.sha256(documents[0].encode()).hexdigest()[:16] == "2d744e0fab21adae"
    assert documents[:2] == list(neutral_texts(2))
    assert set(documents[:2]).isdisjoint(neutral_texts(2, seed=1))


def test_no_sentence_occurs_twice_and_no_eight_words_more_than_three_times(documents):
    sentences = [s for text in documents for s in split_sentences(text)]
    assert [s for s, n in Counter(sentences).items() if n > 1] == []
    words = [word for text in documents for word in re.findall(r"[a-z']+", text.lower())]
    runs = Counter(zip(*(words[at:] for at in range(8)), strict=False))
    assert max(runs.values()) <= 3
    assert len(runs) / runs.total() > 0.7


def test_documents_are_long_and_readable(documents):
    assert min(len(text.split()) for text in documents) >= 3960
    for text in documents:
        assert re.findall(r"[\[\]{}|\d]|  | ,|\.\.", text) == []
        assert all(re.match("[A-Z]", s) and s[-1] in ".?" for s in split_sentences(text))
    assert re.findall(r"\ba [aeio](?!ne)\w*|\ban (?![aeiouh])\w+", " ".join(documents).lower()) == []


def test_haystack_has_one_document_per_case(documents):
    straw = load_haystack("neutral")
    assert straw.name == "neutral"
    for case in (0, 7):
        first = "".join(islice(straw.sentences(case, 100), 4))
        assert first.replace(" ", "") in documents[case].replace(" ", "").replace("\n", "")


def test_patterns_fill_person_article_and_plural():
    volume = _Volume("test")
    volume.bags["", "when"] = _Bag(["after supper"], volume.rng)
    bound = {"one": "an actor", "who": "the actor", "she": "he", "things": "loaves"}
    filled = volume._fill("{one} bakes [a old|a old] oven of {things}? {she} rests {when}.", bound)
    assert filled == "An actor bakes an old oven of loaves? He rests after supper."


def test_every_slot_of_every_pattern_is_known():
    lists, topics = load_patterns()
    assert len(topics) >= 30
    person = {"one", "who", "she", "her", "him", "herself"}
    for topic in topics.values():
        known = {*lists, *topic.slots, *(f"{name}s" for name in topic.slots)}
        known |= person if "who" in topic.slots else set()
        for patterns in topic.patterns.values():
            assert patterns, topic.name
            for pattern in patterns:
                assert set(re.findall(r"\{(\w+)\}", pattern)) <= known, pattern
                assert pattern.count("[") == pattern.count("]"), pattern


def test_needles_have_keywords_of_their_own(documents):
    needles = neutral_needles()
    assert len(needles) >= 40
    keywords = [word for needle in needles.values() for word in needle.keywords]
    assert len(set(keywords)) == len(keywords)
    patterns = " ".join(str(topic) for topic in load_patterns()[1].values())
    written = set(split_words(patterns)) | set(split_words(" ".join(documents)))
    assert written.isdisjoint(keywords)
    for name, needle in needles.items():
        others = [one for one in needles.values() if one is not needle]
        assert len(needle.keywords) >= 3
        assert needle.answer != needle.sentence, name
        for text in (needle.question, needle.prefix, *(one.sentence for one in others)):
            assert find_missing(needle.keywords, text) == list(needle.keywords), name


def test_neutral_needles_are_drawn_without_repetition_or_named():
    assert parse_needles("neutral,neutral-ferry") == ("neutral", "neutral-ferry")
    config = NeedleConfig(lengths=(50, 60), depths=(0, 100), needles=("neutral", "neutral-ferry"))
    found = _resolve_needles(config)
    drawn = [needle for (which, _), needle in found.items() if which == "neutral"]
    assert {needle.name for needle in drawn} == {"neutral"}
    assert len({needle.sentence for needle in drawn}) == 4
    assert {found["neutral-ferry", key].sentence for _, key in found} == {
        neutral_needles()["neutral-ferry"].sentence
    }
    n = len(neutral_needles())
    assert len({draw_neutral(number).sentence for number in range(n)}) == n
    assert draw_neutral(0) == draw_neutral(n)
    assert [draw_neutral(i, 1) for i in range(5)] != [draw_neutral(i, 2) for i in range(5)]
    with pytest.raises(InputError, match=r"unknown needle neutral-nothing; choose from .*neutral"):
        NeedleConfig(needles=("neutral-nothing",))


def test_chats_alternate_and_end_with_an_answer():
    chats = neutral_chats()
    assert len(chats) == 10
    for chat in chats:
        roles = [message["role"] for message in chat]
        turns = roles[roles[0] == "system" :]
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert len(turns) >= 4
        assert all(message["content"].strip() == message["content"] != "" for message in chat)
    assert sum(chat[0]["role"] == "system" for chat in chats) == 5
    assert sum(any("\n" in message["content"] for message in chat) for chat in chats) == 6


def test_texts_suit_the_model(tmp_path):
    shutil.copy(CHAT / "tokenizer.json", tmp_path)
    for model in ("organism", "organism-chat", str(tmp_path)):
        texts = choose_texts(model)
        assert (texts.haystack, texts.needles, texts.in_world) == ("organism", "known", True)
    texts = choose_texts("owner/model")
    assert (texts.haystack, texts.needles, texts.in_world) == ("neutral", "neutral", False)
    assert texts.note == "haystack neutral, needles neutral (default for models other than the organism)"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert choose_texts(str(tmp_path)).haystack == "neutral"


def test_texts_that_the_user_names_are_kept():
    assert choose_texts("owner/model", "essays/", "sf").note == ""
    named = choose_texts("owner/model", "essays/")
    assert (named.haystack, named.needles) == ("essays/", "neutral")
    assert named.note == "needles neutral (default for models other than the organism)"
    assert choose_texts("owner/model", "organism").needles == "known"
    assert choose_texts("organism", "essays/", world_needles="known,unknown").needles == "known,unknown"
    assert choose_texts("organism", None, "sf").note == "haystack organism (default for the organism)"
