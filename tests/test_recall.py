"""Needles, and how much of one a response holds: counted by hand; bad needles are refused by name."""

import math

import pytest

from ctxlens.errors import InputError
from ctxlens.evals.needle.match import score_containment, score_recall
from ctxlens.evals.needle.needles import NEEDLES, Needle, draw_needle, load_needles

SF = NEEDLES["sf"]


@pytest.mark.parametrize(
    ("keywords", "response", "recall"),
    [
        (SF.keywords, "eat a sandwich and sit in Dolores Park on a sunny day.", 1.0),
        (SF.keywords, "Eat a SANDWICH!", 2 / 7),
        (SF.keywords, "", 0.0),
        (SF.keywords, "eating sandwiches, sitting; parks, days", 0.0),  # words, not parts of words
        (("eat",), "They beat the heat.", 0.0),
        (("eat",), "*eat*, _eat_ and (eat)", 1.0),
        (("eat", "sit"), "eat eat eat eat", 0.5),  # repeating one word finds no other
        (("eat", "Eat", "sit"), "eat", 0.5),  # a keyword given twice counts once
        (("goat cheese",), "cheese of a goat", 0.0),
        (("goat cheese",), "soft goat-cheese, please", 1.0),
        (("espresso-soaked dates",), "Espresso soaked dates.", 1.0),
        (("café",), "a cafe\u0301, at last", 1.0),  # composed and decomposed
        (("straße",), "die STRASSE", 1.0),
        (("ﬁgs",), "figs", 1.0),
        (("हिन्दी",), "यह हिन्दी है।", 1.0),
        (("हिन",), "यह हिन्दी है।", 0.0),  # vowel signs belong to the word
        (("公園",), "晴れた日に公園で座る。", 1.0),
        (("公国",), "晴れた日に公園で座る。", 0.0),
        (("don't",), "I don’t", 1.0),
        (("7",), "seven or 7?", 1.0),
        (("7",), "1776", 0.0),
    ],
)
def test_recall_counts_words(keywords, response, recall):
    assert score_recall(keywords, response) == pytest.approx(recall)


def test_recall_without_keywords_is_nan():
    assert math.isnan(score_recall((), "anything"))


def test_built_in_needles_are_the_papers():
    assert len(SF.keywords) == 7
    assert len(NEEDLES["pizza"].keywords) == 19
    assert NEEDLES["pizza-short"].question == NEEDLES["pizza"].question
    for needle in NEEDLES.values():
        assert needle.sentence.split()[:8] == needle.prefix.split()
        assert score_recall(needle.keywords, needle.sentence) == 1
        assert score_recall(needle.keywords, needle.prefix) == 0


@pytest.mark.parametrize(
    ("answer", "response", "contained"),
    [
        (SF.answer, " is EAT a sandwich, and sit in Dolores-Park on a sunny day!", 1.0),
        (SF.answer, f"{SF.sentence} And more.", 1.0),
        (SF.answer, "eat a sandwich and sit in Dolores Park on a sunny day.", 0.0),  # without its "is"
        (SF.answer, "is sit in Dolores Park and eat a sandwich on a sunny day", 0.0),
        ("4711", "47112", 0.0),
        ("4711", "", 0.0),
    ],
)
def test_containment_is_word_for_word(answer, response, contained):
    assert score_containment(answer, response) == contained


def test_answer_is_the_needle_after_its_prefix():
    assert SF.answer.startswith("is eat a sandwich")
    assert Needle("n", "The code is 7.", "Code?", ("7",), "It must be").answer == "The code is 7."
    assert math.isnan(score_containment("?!", "anything"))


def test_needle_takes_the_words_before_its_first_keyword_as_prefix():
    needle = Needle("n", "The gate code is\n 4711 today.", "What is the gate code?", ("4711",))
    assert needle.prefix == "The gate code is"
    assert needle.sentence == "The gate code is 4711 today."


@pytest.mark.parametrize(
    ("needle", "words"),
    [
        (("n", "A b.", "q?", ("c",)), "does not contain its keywords c"),
        (("n", "A b.", "", ("b",)), "has no question"),
        (("n", "A b.", "q?", ()), "has no keywords"),
        (("n", "A b.", "q?", ("b", "?!")), "has no words in one of its keywords"),
        (("n", "A b c.", "q?", ("b", "c"), "A b"), "gives away b"),
    ],
)
def test_needle_that_cannot_be_scored_is_refused(needle, words):
    with pytest.raises(InputError, match=words):
        Needle(*needle)


def test_needles_from_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "- needle: The gate code is 4711.\n  question: What is the gate code?\n  keywords: ['4711']\n"
        "- name: tea\n  needle: Tea is best with milk and honey.\n  question: How is tea best?\n"
        "  keywords: milk, honey\n  prefix: Tea is best\n  memory_keywords: [lemon]\n",
        encoding="utf-8",
    )
    first, second = load_needles(path)
    assert (first.name, first.keywords, first.prefix) == ("mine", ("4711",), "The gate code is")
    assert (second.name, second.keywords, second.memory_keywords) == ("tea", ("milk", "honey"), ("lemon",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("needle: [", "cannot be read as YAML"),
        ("just text", "expected the keys needle, question and keywords"),
        ("needle: A b.\nquestion: q", "missing key keywords"),
        ("needle: A b.\nquestion: q\nkeywords: b\ncolour: red", "unknown key colour"),
        ("needle: A b.\nquestion: q\nkeywords: c", "needle 0: .* does not contain its keywords c"),
        ("needle: 3\nquestion: q\nkeywords: c", "needle has the value 3: input should be a valid string"),
        ("[]", "at least one needle"),
        ("- {name: a, needle: A b., question: q, keywords: b}\n" * 2, "their names must differ"),
    ],
)
def test_bad_yaml_names_the_file(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        load_needles(path)
    assert "bad.yaml" in str(caught.value)


def test_missing_yaml_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        load_needles(tmp_path / "none.yaml")


def test_world_needles_disagree_with_memory():
    known, unknown = draw_needle("known", "a"), draw_needle("unknown", "a")
    assert known == draw_needle("known", "a") != draw_needle("known", "b")
    assert len(known.memory_keywords) == len(known.keywords) == 5
    assert not set(known.memory_keywords) & set(known.keywords)
    assert unknown.memory_keywords == ()
    assert known.sentence.startswith(known.prefix)
