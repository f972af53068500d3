"""Haystacks from folders, data sets and the built-in world; needles placed by token."""

from itertools import islice

import pytest
from needle_models import WordTokenizer

from ctxlens.errors import InputError
from ctxlens.evals.needle.contexts import gather_straw, place_needle
from ctxlens.evals.needle.haystack import TextHaystack, load_haystack
from ctxlens.evals.needle.sentences import split_sentences


def test_sentences_are_split_at_their_ends():
    text = 'One line\nbroken. "Two?" Three!) 3.5 is a number.\n\nA heading\n\n四です。五。'
    assert split_sentences(text) == [
        "One line broken.", '"Two?"', "Three!)", "3.5 is a number.", "A heading", "四です。", "五。",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("नदी है। पुल है।नया", ["नदी है।", "पुल है।", "नया"]),
        ("هل هذا؟ نعم۔ لا", ["هل هذا؟", "نعم۔", "لا"]),
        ("Գետ։ Կամուրջ", ["Գետ։", "Կամուրջ"]),
        ("ሰላም። እንዴት", ["ሰላም።", "እንዴት"]),
        ("「本当？！」と言った。終わり", ["「本当？！」", "と言った。", "終わり"]),
        ("他说：“好。”他走了。", ["他说：“好。”", "他走了。"]),
        ("約３．５です．次", ["約３．５です．", "次"]),
        ("Er sagt »Nein.« Dann »Ja.» Ende", ["Er sagt »Nein.«", "Dann »Ja.»", "Ende"]),
        ("Wait…what… Then", ["Wait…what…", "Then"]),
        ("He is (here.)) Now", ["He is (here.)) Now"]),
        ("a.\r\nb\rc\r\n\r\nd", ["a.", "b c", "d"]),
    ],
)
def test_sentence_ends_of_many_scripts_are_known(text, sentences):
    assert split_sentences(text) == sentences


def test_folder_is_read_in_sorted_order_without_its_licence(tmp_path):
    for name, text in (
        ("b.txt", "Third."),
        ("a.txt", "First.\nSecond."),
        ("LICENSE.txt", "Legal."),
        ("README.md", "About."),
        (".hidden.txt", "Hidden."),
        ("._a.txt", "\0\5"),
        ("c.csv", "No."),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
    haystack = load_haystack(tmp_path)
    assert list(haystack.sentences(0, 10)) == ["First.", "Second.", "Third."]
    assert sorted(haystack.sentences(3, 10)) == ["First.", "Second.", "Third."]
    assert len(list(islice(load_haystack(tmp_path, repeat=True).sentences(0, 10), 7))) == 7


def test_bad_haystacks_are_refused(tmp_path):
    with pytest.raises(InputError, match="There is no file or folder"):
        load_haystack(tmp_path / "none")
    nothing = r"haystack folder .* contains no texts; put \.txt or \.md files there\."
    with pytest.raises(InputError, match=nothing):
        load_haystack(tmp_path)
    for name in (".DS_Store", "LICENSE.txt", "readme.md"):
        (tmp_path / name).write_text("About the texts.", encoding="utf-8")
    with pytest.raises(InputError, match=nothing):
        load_haystack(tmp_path)
    (tmp_path / "blank.txt").write_text(" \n\n", encoding="utf-8")
    with pytest.raises(InputError, match="is empty"):
        load_haystack(tmp_path)
    with pytest.raises(InputError, match="is empty"):
        load_haystack([])


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.md", "notes.Md"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_files_are_read_by_their_byte_order_mark(tmp_path, name, encoding):
    (tmp_path / name).write_bytes("Ein Café.\r\n“Zwei.” สาม".encode(encoding))
    for source in (tmp_path, tmp_path / name):
        assert list(load_haystack(source).sentences(0, 10)) == ["Ein Café.", "“Zwei.”", "สาม"]


def test_file_that_is_not_text_is_refused_by_its_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"First. Caf\xe9.")
    with pytest.raises(InputError, match=r"a\.txt is not a text file in UTF-8: byte 0xe9 at offset 10 "):
        load_haystack(tmp_path)


def test_data_set_with_a_page_about_it_stays_a_data_set(tmp_path):
    (tmp_path / "card.md").write_text("About the data.", encoding="utf-8")
    (tmp_path / "train.jsonl").write_text('{"text": "First."}\n', encoding="utf-8")
    assert list(load_haystack(tmp_path).sentences(0, 10)) == ["First."]
    (tmp_path / "train.jsonl").rename(tmp_path / "train.old")
    assert list(load_haystack(tmp_path).sentences(0, 10)) == ["About the data."]


@pytest.mark.parametrize("kind", ["jsonl", "saved", "folder"])
def test_data_set_is_a_haystack(tmp_path, kind):
    from datasets import Dataset

    rows = [{"title": "one", "text": "First. Second."}, {"title": "two", "text": "Third."}]
    if kind == "saved":
        Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    else:  # what a data set repository on the Hub looks like: a folder of data files
        (tmp_path / "set").mkdir()
        Dataset.from_list(rows).to_json(tmp_path / "set" / "train.jsonl")
    source = tmp_path / "set" / "train.jsonl" if kind == "jsonl" else tmp_path / "set"
    assert list(load_haystack(source).sentences(0, 10)) == ["First.", "Second.", "Third."]
    assert list(load_haystack(source, column="title").sentences(0, 10)) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "options", "words"),
    [
        (
            '{"a": "x", "b": "y"}',
            {},
            r"columns of text are a, b; name the column to read \(--haystack-column\)",
        ),
        ('{"a": 1}', {}, "columns of text are none"),
        ('["a"]', {}, "rows must have named columns"),
        ('{"text": "x"}', {"column": "body"}, "row 0 has no text in column 'body'"),
        ('{"text": ""}', {}, "is empty"),
    ],
)
def test_data_set_without_texts_is_refused(tmp_path, line, options, words):
    path = tmp_path / "set.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=words):
        load_haystack(path, **options)


def test_world_haystack_is_another_text_for_every_case_and_length():
    haystack = load_haystack("organism", seed=1)
    draws = {tuple(islice(haystack.sentences(case, n), 3)) for case in range(2) for n in (100, 200)}
    assert len(draws) == 4
    assert list(islice(haystack.sentences(1, 100), 5)) == list(islice(haystack.sentences(1, 100), 5))


# Sentences of 5 words, one token a word: ends at 5, 10, 15, ... The needle has 4.
FIVES = TextHaystack(tuple(f"s{i} a b c d." for i in range(10)))


@pytest.mark.parametrize(
    ("length", "depth", "before", "tokens", "built"),
    [
        (24, 0, 0, 24, 0),  # budget 20: four sentences; boundaries 0 5 10 15 20
        (24, 50, 2, 24, 50),  # target 10
        (24, 30, 1, 24, 25),  # target 6, nearest 5
        (24, 40, 2, 24, 50),  # target 8, nearest 10
        (24, 100, 4, 24, 100),
        (28, 50, 2, 24, 50),  # budget 24: the fifth sentence does not fit
        (29, 50, 2, 29, 40),  # five sentences, target 12.5, halfway: the earlier
        (8, 50, 0, 4, 0),  # budget 4: no sentence fits
    ],
)
def test_needle_is_placed_by_tokens_at_a_sentence_end(length, depth, before, tokens, built):
    straw = gather_straw(WordTokenizer(), FIVES, 0, length)
    depth_percent = float(depth)
    context = place_needle(
        WordTokenizer(), straw, "N n n n.", context_tokens=length, depth_percent=depth_percent
    )
    start, end = context.needle_span
    assert context.text[start:end] == "N n n n."
    assert context.text[:start].count("s") == before
    assert (context.tokens, context.depth_percent) == (tokens, built)
    assert "\n" not in context.text


def test_short_haystack_is_refused_unless_it_may_repeat():
    tokenizer = WordTokenizer()
    straw = gather_straw(tokenizer, FIVES, 0, 80)
    with pytest.raises(InputError, match="has 50 tokens, but a context of 80 needs 76"):
        place_needle(tokenizer, straw, "N n n n.", context_tokens=80, depth_percent=0.0)
    repeated = gather_straw(tokenizer, TextHaystack(FIVES.text, repeat=True), 0, 80)
    context = place_needle(tokenizer, repeated, "N n n n.", context_tokens=80, depth_percent=0.0)
    assert context.tokens == 79
    assert context.repeated
    once = place_needle(tokenizer, repeated, "N n n n.", context_tokens=54, depth_percent=0.0)
    assert (once.tokens, once.repeated) == (54, False)
    with pytest.raises(InputError, match="cannot hold the needle, which has 4"):
        place_needle(tokenizer, straw, "N n n n.", context_tokens=3, depth_percent=0.0)
