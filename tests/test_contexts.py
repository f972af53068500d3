"""Contexts are as long as requested, whatever the script and layout of the haystack."""

import re
from itertools import islice

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from needle_models import UNPUNCTUATED, WordTokenizer, check_lengths

from ctxlens.errors import InputError
from ctxlens.evals.needle import NEEDLES, NeedleConfig, Window, build_cells, load_haystack
from ctxlens.evals.needle.contexts import gather_straw, place_needle, tolerance
from ctxlens.evals.needle.haystack import TextHaystack
from ctxlens.evals.needle.sentences import split_keeping_lines

SF = NEEDLES["sf"]
NEEDLE = "N n n n."


class CharacterTokenizer:
    """One token a code point, so that lengths can be counted by hand."""

    def __call__(self, text, **options):
        return {"input_ids": [0] * len(text), "offset_mapping": [(i, i + 1) for i in range(len(text))]}


def cut(text, length, depth=0.0, tokenizer=None, sentence=NEEDLE):
    """The context, and how much text stands before and after the needle."""
    tokenizer = tokenizer or WordTokenizer()
    straw = gather_straw(tokenizer, TextHaystack(tuple(split_keeping_lines(text)), "hay"), 0, length)
    context = place_needle(tokenizer, straw, sentence, context_tokens=length, depth_percent=depth)
    start, end = context.needle_span
    assert context.text[start:end] == sentence
    return context, context.text[:start].strip(), context.text[end:].strip()


def words(number, per_line=None):
    named = [f"w{i}" for i in range(number)]
    if per_line is None:
        return " ".join(named)
    return "\n".join(" ".join(named[i : i + per_line]) for i in range(0, number, per_line))


def test_tolerance_is_5_percent_but_at_least_16_tokens():
    assert [tolerance(length) for length in (1, 320, 400, 10_000)] == [16, 16, 20, 500]


@pytest.mark.parametrize(
    ("text", "length", "depth", "tokens", "before"),
    [
        # One sentence of 300 words; 100 of them and the needle's 4 are wanted.
        (words(300), 104, 0.0, 104, 0),
        (words(300), 104, 25.0, 104, 25),
        (words(300), 104, 100.0, 104, 100),
        # Lines of 9 words: the cut after 99 is near enough, and the needle stands at a line's end.
        (words(300, per_line=9), 104, 0.0, 103, 0),
        (words(300, per_line=9), 104, 50.0, 103, 45),  # wanted: 49.5; 45 and 54 are as near
        # Lines of 70 words: cut after 70 + 30. A line is short enough not to be divided for the needle.
        (words(300, per_line=70), 104, 50.0, 104, 70),
        (words(300, per_line=70), 104, 30.0, 104, 0),
        # Lines of 150 words: divided.
        (words(300, per_line=150), 104, 50.0, 104, 50),
        # Sentences of 17 words: after 5 of them 15 tokens are missing, which is tolerated.
        (". ".join(words(17) for _ in range(20)), 104, 0.0, 89, 0),
        # Sentences of 45 words: after 2 of them 10 tokens are missing; then 45 + 45 + 17 words.
        (". ".join(words(45) for _ in range(20)), 104, 50.0, 94, 45),
        (". ".join(words(45) for _ in range(20)), 111, 50.0, 111, 45),
    ],
)
def test_context_ends_with_the_largest_unit_that_reaches_the_length(text, length, depth, tokens, before):
    context, above, _ = cut(text, length, depth)
    assert (context.tokens, len(above.split())) == (tokens, before)
    assert context.depth_percent == pytest.approx(100 * before / (tokens - 4))
    assert "\n" not in context.text


def test_words_are_divided_between_whole_characters():
    # Every character is 2 code points; the needle has 8 and a blank before or after it.
    accented = "e\u0301"
    text = accented * 300
    context, above, below = cut(text, 108, 50.0, CharacterTokenizer())
    assert (context.tokens, len(above), len(below)) == (108, 48, 50)
    assert context.text == f"{accented * 24} {NEEDLE} {accented * 25}"
    longer, *_ = cut(text, 109, 0.0, CharacterTokenizer())
    assert longer.tokens == 109
    assert cut(text, 110, 0.0, CharacterTokenizer())[0].tokens == 109


def test_context_that_cannot_be_cut_is_refused_in_one_sentence():
    with pytest.raises(InputError) as caught:
        cut("e" + "\u0301" * 500, 120, 0.0, CharacterTokenizer())
    assert str(caught.value) == (
        "the haystack hay cannot be cut to a context of 120 tokens: the nearest has 8, because the character "
        "that follows is too long; give another text or other lengths."
    )
    with pytest.raises(InputError, match=r"hay already contains the needle 'N n n n\.'; give other texts"):
        cut(f"{words(30)} {NEEDLE} {words(300)}", 104)


@pytest.mark.parametrize("script", UNPUNCTUATED)
@pytest.mark.parametrize("repeat", [False, True])
def test_built_length_is_the_requested_one_in_every_script(organism_tokenizer, tmp_path, script, repeat):
    path = tmp_path / "hay.txt"
    path.write_bytes(UNPUNCTUATED[script].encode("utf-16"))
    haystack = load_haystack(path, repeat=repeat)
    config = NeedleConfig(lengths=(64, 200, 1000), depths=(0, 10, 50, 100), needles=("sf",), cases_per_cell=2)
    cells = build_cells(Window("m", organism_tokenizer, 4000), config, haystack)
    check_lengths(cells)
    for cell in cells:
        assert cell.context.text.count(SF.sentence) == 1
        if cell.context_tokens == 1000:
            assert abs(cell.context.depth_percent - cell.depth_percent) <= 7  # half of 128 tokens


def test_cases_of_a_text_without_sentences_start_inside_of_it():
    haystack = TextHaystack((words(3000),), seed=1)
    starts = [next(iter(haystack.sentences(case, 100))).split()[0] for case in range(5)]
    assert starts[0] == "w0"
    assert len(set(starts)) == 5
    for case in range(5):
        assert sorted(" ".join(haystack.sentences(case, 100)).split()) == sorted(words(3000).split())
    lines = TextHaystack((words(3000, per_line=10),))
    assert all(int(next(iter(lines.sentences(case, 9))).split()[0][1:]) % 10 == 0 for case in range(5))
    family = "👩\u200d👩\u200d👧"
    emoji = TextHaystack((family * 1000,), repeat=True)
    for case in range(1, 9):
        once = list(islice(emoji.sentences(case, 9), 2))
        assert [set(regex.findall(r"\X", part)) for part in once] == [{family}] * 2
        assert "".join(once) == family * 1000


def test_repeated_text_is_told_from_one_that_was_long_enough():
    haystack = TextHaystack((words(400),), repeat=True)
    straw = gather_straw(WordTokenizer(), haystack, 0, 500)
    for length, repeated in ((404, False), (430, True), (500, True)):
        context = place_needle(WordTokenizer(), straw, NEEDLE, context_tokens=length, depth_percent=0.0)
        assert (context.tokens, context.repeated) == (length, repeated)


def test_no_more_of_a_long_text_is_read_than_needed():
    read = []

    class Counting(WordTokenizer):
        def __call__(self, text, **options):
            read.append(len(text))
            return super().__call__(text, **options)

    gather_straw(Counting(), TextHaystack((words(200_000),)), 0, 100)
    assert max(read) < 20_000


GIANT = "e" + "\u0301" * 80
PARTS = [
    *("river", "stone ", "market, ", "x = f(y)", "แม่น้ำ", "สะพานไม้ ", "नदी ", "क्षि", "河水", "،مدينة "),
    *("।", "؟ ", "。", "👩\u200d👩\u200d👧", "🇹🇭", "e\u0301", "\u0600"),
    *("\n", "\r\n", "\r", "\n\n", "\u2028", "\t", "  ", "\u3000"),
    *("0123456789abcdef" * 30, "word " * 60, "河" * 200, "line\n" * 40, GIANT),
]
texts = st.builds(
    lambda parts, times: "".join(parts) * times,
    st.lists(st.sampled_from(PARTS) | st.text(max_size=5), min_size=1, max_size=8),
    st.sampled_from([1, 30]),
)


def build_or_refuse(tokenizer, straw, length, depth):
    """The context, or why there is none."""
    try:
        return place_needle(tokenizer, straw, SF.sentence, context_tokens=length, depth_percent=depth)
    except InputError as error:
        return str(error)


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(24, 500), st.booleans(), st.integers(0, 2))
def test_built_length_is_tolerable_or_the_cell_is_refused(toy_tokenizer, text, length, repeat, case):
    sentences = tuple(split_keeping_lines(text)) or ("river",)
    straw = gather_straw(toy_tokenizer, TextHaystack(sentences, "hay", 0, repeat), case, length)
    longest = max(len(character.encode()) for character in regex.findall(r"\X", straw.text))
    whole = {0, *(match.end() for match in regex.finditer(r"\X", straw.text))}
    earlier = 0
    for depth in (0.0, 20.0, 50.0, 80.0, 100.0):
        context = build_or_refuse(toy_tokenizer, straw, length, depth)
        if isinstance(context, str):
            assert re.fullmatch(r"(the haystack hay|a context of) [^\n]*\.", context)
            assert "cannot be cut" not in context or longest > 16
            continue
        assert context.tokens == len(toy_tokenizer(context.text, add_special_tokens=False)["input_ids"])
        assert 0 <= length - context.tokens <= max(16, 0.05 * length)
        assert context.text.count(SF.sentence) == 1
        start, end = context.needle_span
        assert context.text[start:end] == SF.sentence
        # Around the needle is the haystack, divided and cut between whole characters.
        before, after = context.text[:start].removesuffix(" "), context.text[end:].removeprefix(" ")
        rest = straw.text[len(before) :].removeprefix(" ")
        assert straw.text.startswith(before)
        assert rest.startswith(after)
        stop = len(straw.text) - len(rest) + len(after) if after else len(before)
        assert {len(before), stop} <= whole
        # Every cell is cut for itself, so one may end a little before the place of the one above.
        assert len(before) >= min(earlier, stop)
        earlier = len(before)


def test_place_is_monotone_in_the_depth():
    for per_line in (None, 9, 170):
        text = ". ".join((words(200, per_line), words(40), words(150, per_line)))
        places = [len(cut(text, 380, depth)[1]) for depth in np.linspace(0, 100, 21)]
        assert places == sorted(places)
        assert len(set(places)) > 15
