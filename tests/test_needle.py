"""Needle grids: recall by hand, places by token, pairs over conditions, resuming, bad input."""

import gzip
import json
import math
from dataclasses import replace
from itertools import islice

import pytest
from needle_models import CopyingModel, WordTokenizer

from ctxlens.cells import CONDITIONS, WORDINGS, NeedleConfig, build_cells, describe_cell, render_cell
from ctxlens.errors import InputError, ModelFailureError, RunExistsError
from ctxlens.haystack import TextHaystack, gather_straw, load_haystack, place_needle, split_sentences
from ctxlens.needle import Setting, plan_parts, run_needle, run_settings
from ctxlens.recall import (
    NEEDLES,
    Needle,
    draw_needle,
    load_needles,
    score_containment,
    score_recall,
)
from ctxlens.results import NeedleGrid
from ctxlens.runs import Run
from ctxlens.steering import Steering

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
        (("n", "A b.", "q?", ("c",)), "does not hold its keywords c"),
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
        ("needle: A b.\nquestion: q\nkeywords: c", "needle 0: .* does not hold its keywords c"),
        ("needle: 3\nquestion: q\nkeywords: c", "needle must be text"),
        ("[]", "at least one needle"),
        ("- {name: a, needle: A b., question: q, keywords: b}\n" * 2, "a name of its own"),
    ],
)
def test_bad_yaml_names_the_file(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        load_needles(path)
    assert "bad.yaml" in str(caught.value)


def test_missing_yaml_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_needles(tmp_path / "none.yaml")


def test_world_needles_disagree_with_memory():
    known, unknown = draw_needle("known", "a"), draw_needle("unknown", "a")
    assert known == draw_needle("known", "a") != draw_needle("known", "b")
    assert len(known.memory_keywords) == len(known.keywords) == 5
    assert not set(known.memory_keywords) & set(known.keywords)
    assert unknown.memory_keywords == ()
    assert known.sentence.startswith(known.prefix)


def test_sentences_are_split_at_their_ends():
    text = 'One line\nbroken. "Two?" Three!) 3.5 is a number.\n\nA heading\n\n四です。五。'
    assert split_sentences(text) == [
        "One line broken.", '"Two?"', "Three!)", "3.5 is a number.", "A heading", "四です。", "五。",
    ]  # fmt: skip


def test_folder_is_read_in_sorted_order_without_its_licence(tmp_path):
    for name, text in (
        ("b.txt", "Third."),
        ("a.txt", "First.\nSecond."),
        ("LICENSE.txt", "Legal."),
        ("c.md", "No."),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
    haystack = load_haystack(tmp_path)
    assert list(haystack.sentences(0, 10)) == ["First.", "Second.", "Third."]
    assert sorted(haystack.sentences(3, 10)) == ["First.", "Second.", "Third."]
    assert len(list(islice(load_haystack(tmp_path, repeat=True).sentences(0, 10), 7))) == 7


def test_bad_haystacks_are_refused(tmp_path):
    with pytest.raises(InputError, match="There is no file or folder"):
        load_haystack(tmp_path / "none")
    with pytest.raises(InputError, match="is empty; put the texts there as \\.txt files"):
        load_haystack(tmp_path)
    (tmp_path / "blank.txt").write_text(" \n\n", encoding="utf-8")
    with pytest.raises(InputError, match="is empty"):
        load_haystack(tmp_path)
    with pytest.raises(InputError, match="is empty"):
        load_haystack([])


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
        ('{"a": "x", "b": "y"}', {}, r"columns of text are a, b; name the one to read \(--haystack-column\)"),
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
    with pytest.raises(InputError, match="has 50 tokens, 76 are needed for a context of 80"):
        place_needle(tokenizer, straw, "N n n n.", context_tokens=80, depth_percent=0.0)
    repeated = gather_straw(tokenizer, TextHaystack(FIVES.text, repeat=True), 0, 80)
    context = place_needle(tokenizer, repeated, "N n n n.", context_tokens=80, depth_percent=0.0)
    assert context.tokens == 79
    assert context.repeated
    once = place_needle(tokenizer, repeated, "N n n n.", context_tokens=54, depth_percent=0.0)
    assert (once.tokens, once.repeated) == (54, False)
    with pytest.raises(InputError, match="cannot hold the needle, which has 4"):
        place_needle(tokenizer, straw, "N n n n.", context_tokens=3, depth_percent=0.0)


@pytest.fixture
def model(organism_tokenizer):
    return CopyingModel(organism_tokenizer)


HAYSTACK = load_haystack("organism")
CONFIG = NeedleConfig(
    lengths=(80, 150),
    depths=(0, 50, 100),
    needles=("known", SF),
    conditions=CONDITIONS,
    cases_per_cell=2,
    max_new_tokens=20,
)


def test_conditions_are_pairs_of_the_same_texts(model):
    cells = build_cells(model, CONFIG, HAYSTACK)
    assert [cell.number for cell in cells] == list(range(24))
    assert [c.needle.name for c in cells] == ["known"] * 12 + ["sf"] * 12
    assert [c.case for c in cells[:4]] == [0, 1, 0, 1]
    assert len({c.context.text for c in cells}) == 24
    for cell in cells:
        tokens = len(model.tokenizer(cell.context.text, add_special_tokens=False)["input_ids"])
        assert cell.context_tokens - 20 < tokens == cell.context.tokens <= cell.context_tokens
        chats = {c: render_cell(model, cell, CONFIG, c) for c in CONDITIONS}
        assert all(cell.context.text in chat.text for chat in chats.values())
        for condition in ("plain+prefix", "template+prefix", "template"):
            user = chats[condition].tokens[chats[condition].mask("user")]
            assert user.tolist() == chats["plain+prefix"].tokens[chats["plain+prefix"].mask("user")].tolist()
        for condition in ("plain+prefix", "template+prefix", "assistant+prefix"):
            assert chats[condition].text.endswith(f"\n{cell.needle.prefix}")
        held = chats["assistant+prefix"].response_positions()
        assert len(held) > cell.context.tokens


def test_same_haystack_at_every_depth_of_a_length(model):
    cells = [c for c in build_cells(model, CONFIG, HAYSTACK) if c.needle is SF and c.context_tokens == 150]
    for case in (0, 1):
        texts = {" ".join(c.context.text.replace(SF.sentence, "").split()) for c in cells if c.case == case}
        assert len(texts) == 1
    assert [round(c.context.depth_percent) for c in cells if c.case == 0][::2] == [0, 100]


def test_default_lengths_reach_from_200_to_the_window(organism_tokenizer):
    config = NeedleConfig(lengths=4, depths=1, max_new_tokens=50)
    wide = build_cells(CopyingModel(organism_tokenizer, n_ctx=2000), config, HAYSTACK)
    assert wide[0].context_tokens == 200
    assert 1800 < wide[-1].context_tokens < 1950
    longest = render_cell(CopyingModel(organism_tokenizer, n_ctx=2000), wide[-1], config, "template+prefix")
    assert 1900 < longest.n_tokens <= 1950
    narrow = build_cells(CopyingModel(organism_tokenizer, n_ctx=300), config, HAYSTACK)
    assert narrow[0].context_tokens < 60


@pytest.mark.parametrize("wording", [*WORDINGS, "Text: {context} Q: {question} {unknown}"])
def test_wordings_hold_context_and_question(model, wording):
    config = NeedleConfig(lengths=(60,), depths=(50,), wording=wording)
    braces = Needle("b", "The code of {question} is 42.", "What is the code of {context}?", ("42",))
    cell = build_cells(model, NeedleConfig(**{**vars(config), "needles": (braces,)}), HAYSTACK)[0]
    text = render_cell(model, cell, config, "template+prefix").text
    assert text.count(cell.context.text) == 1
    assert braces.question in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": ()}, "lengths must be"),
        ({"lengths": (0,)}, "lengths must be"),
        ({"lengths": 0}, "lengths must be a whole number of at least 1"),
        ({"depths": (101.0,)}, "depths must be percentages"),
        ({"conditions": ("chat",)}, "unknown condition chat; choose of plain"),
        ({"needles": ("tofu",)}, "unknown needle tofu; choose of sf"),
        ({"needles": (SF, "sf")}, "names of their own"),
        ({"cases_per_cell": 0}, "cases_per_cell must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"wording": "{context}"}, "unknown wording"),
        ({"lengths": (80, 150, 80)}, "lengths hold 80 twice"),
        ({"depths": (0, 50.0, 50)}, "depths hold 50 twice"),
        ({"conditions": ("template", "template")}, "conditions holds template twice"),
        ({"score": ("likes",)}, "unknown score likes; choose of recall, contains, logprob"),
        ({"score": ()}, "unknown score \\(none\\)"),
    ],
)
def test_bad_settings_are_refused_by_name(options, words):
    with pytest.raises(InputError, match=words):
        NeedleConfig(**options)


def test_window_too_small_is_refused(organism_tokenizer):
    with pytest.raises(InputError, match="window of 60 tokens is too small for needle 'sf'"):
        build_cells(CopyingModel(organism_tokenizer, n_ctx=60), NeedleConfig(), HAYSTACK)
    config = NeedleConfig(lengths=(100, 400))
    with pytest.raises(
        InputError, match=r"contexts of 400 tokens do not fit: the window of 300 .* at most \d+"
    ):
        build_cells(CopyingModel(organism_tokenizer, n_ctx=300), config, HAYSTACK)


def test_needle_without_prefix_is_refused_where_one_is_needed(model):
    bare = Needle("bare", "Tea is best hot.", "What is best hot?", ("tea",))
    with pytest.raises(InputError, match="needle 'bare' has no prefix"):
        build_cells(model, NeedleConfig(needles=(bare,), lengths=(60,)), HAYSTACK)
    cells = build_cells(
        model, NeedleConfig(needles=(bare,), lengths=(60,), conditions=("template",)), HAYSTACK
    )
    assert len(cells) == 20


def test_copying_model_finds_every_needle(model):
    told = []
    grid = run_needle(model, CONFIG, haystack=HAYSTACK, progress=lambda *at: told.append(at))
    assert len(grid) == 24 * 4
    assert grid.frame["recall"].eq(1).all()
    assert told[-1] == (96, 96)
    known = grid.where(needle="known").frame
    assert known["memory_recall"].eq(0).all()
    assert grid.where(needle="sf").frame["memory_recall"].isna().all()
    assert (grid.frame["prompt_tokens"] > grid.frame["built_context_tokens"]).all()
    assert set(grid.frame["model"]) == {"copier"}
    assert set(grid.frame["heads"]) == {"none"}
    assert grid.recall(condition="template").index.tolist() == list(range(24))


def test_forgetting_model_is_brought_back_by_steering_and_indicator(organism_tokenizer):
    model = CopyingModel(organism_tokenizer, knows="nothing at all", indicator="[IND]")
    config = NeedleConfig(lengths=(60,), depths=(0, 100), max_new_tokens=20)

    def mean(condition, **options):
        grid = run_needle(model, config, haystack=HAYSTACK, **options)
        return grid, grid.recall(condition=condition).mean()

    assert mean("plain+prefix")[1] == 1
    assert mean("template+prefix")[1] == 0
    steered, recall = mean("template+prefix", steering=Steering(0.05), label="steered")
    assert recall == 1
    assert set(steered.frame["alpha"]) == {0.05}
    assert set(steered.frame["heads"]) == {"all"}
    assert set(steered.frame["model"]) == {"steered"}
    assert model.steered == []
    marked, recall = mean("template+prefix", indicator=True)
    assert recall == 1
    assert marked.frame["indicator"].all()
    assert " [IND]" in model.batches[-1][0]


def test_indicator_without_token_is_refused(model):
    with pytest.raises(InputError, match="copier has no indicator token"):
        run_needle(model, CONFIG, haystack=HAYSTACK, indicator=True)


def test_longest_prompts_are_asked_first(model):
    run_needle(model, CONFIG, haystack=HAYSTACK, batch_tokens=1000)
    assert sum(map(len, model.batches)) == 96
    longest = [max(map(len, batch)) for batch in model.batches]
    assert min(longest[:6]) > max(longest[6:])  # 3 ways to begin x 2 cases of 150 tokens, then of 80


def open_run(folder, **options):
    return Run.open(folder, study="needle", config=CONFIG.as_dict(), **options)


def test_stopped_run_goes_on_and_ends_the_same(organism_tokenizer, tmp_path):
    options = {"haystack": HAYSTACK, "batch_tokens": 1000}
    straight = CopyingModel(organism_tokenizer)
    run_needle(straight, CONFIG, out=open_run(tmp_path / "a"), **options)
    stopped = CopyingModel(organism_tokenizer, stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        run_needle(stopped, CONFIG, out=open_run(tmp_path / "b"), **options)
    assert not (tmp_path / "b" / "needle.parquet").exists()
    resumed = CopyingModel(organism_tokenizer)
    grid = run_needle(resumed, CONFIG, out=open_run(tmp_path / "b"), **options)
    assert stopped.batches + resumed.batches == straight.batches
    for name in ("needle.parquet", "needle-cells.jsonl.gz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "manifest.json", "needle-cells.jsonl.gz", "needle.parquet",
    ]  # fmt: skip
    again = run_needle(
        CopyingModel(organism_tokenizer, stop_after=0), CONFIG, out=open_run(tmp_path / "b"), **options
    )
    assert again.frame.equals(grid.frame)
    assert NeedleGrid.load(tmp_path / "b" / "needle.parquet").frame.equals(grid.frame)


def test_saved_cells_say_what_was_built(model, tmp_path):
    grid = run_needle(model, CONFIG, haystack=HAYSTACK, out=open_run(tmp_path), name="stages/grid.parquet")
    lines = gzip.decompress((tmp_path / "stages" / "grid-cells.jsonl.gz").read_bytes()).decode().splitlines()
    cells = [json.loads(line) for line in lines]
    assert len(cells) == 24
    assert cells[0]["needle"]["sentence"] in cells[0]["context"]["text"]
    assert grid.meta["haystack"] == "organism"
    assert grid.meta["config"]["seed"] == 0


def test_parts_of_an_overwritten_run_are_not_used(organism_tokenizer, tmp_path):
    stopped = CopyingModel(organism_tokenizer, stop_after=1)
    run = open_run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_needle(stopped, CONFIG, haystack=HAYSTACK, out=run, batch_tokens=1000)
    fresh = Run(tmp_path, {**run.manifest, "created": "another time"})
    model = CopyingModel(organism_tokenizer)
    run_needle(model, CONFIG, haystack=HAYSTACK, out=fresh, batch_tokens=1000)
    assert sum(map(len, model.batches)) == 96


def test_another_grid_of_the_same_name_is_refused(model, tmp_path):
    run = open_run(tmp_path)
    run_needle(model, CONFIG, haystack=HAYSTACK, out=run)
    with pytest.raises(RunExistsError, match="already holds another needle grid"):
        run_needle(model, CONFIG, haystack=HAYSTACK, out=run, steering=Steering(0.5))


def test_probability_of_the_needle_needs_no_response(model):
    config = replace(CONFIG, needles=(SF,), score=("logprob",), max_new_tokens=400)
    grid = run_needle(model, config, haystack=HAYSTACK)
    assert model.batches == []
    assert grid.scores == ("needle_logprob",)
    assert grid.frame["response"].isna().all()
    assert grid.silent.empty
    words = SF.answer.split()
    answer = len(model.tokenizer(f" {SF.answer}", add_special_tokens=False)["input_ids"])
    assert answer >= len(words)
    for condition in CONDITIONS:
        chat = render_cell(
            model, build_cells(model, config, HAYSTACK)[0], config, condition, answer=SF.sentence
        )
        tokens = len(chat.response_positions())
        mean = -(tokens - answer + 1 + tokens) / 2  # of minus the numbers of the answer's tokens
        row = grid.where(condition=condition, cell=0).frame.iloc[0]
        assert row["needle_logprob"] == pytest.approx(mean)


def test_cell_that_fails_is_recorded_and_the_others_are_answered(organism_tokenizer, tmp_path):
    poison = Needle("poison", "The gate code of Brindlemoor is 4711.", "What is the gate code?", ("4711",))
    config = replace(CONFIG, needles=(SF, poison), score=("recall", "contains", "logprob"))
    model = CopyingModel(organism_tokenizer, fails_on="Brindlemoor")
    grid = run_needle(model, config, haystack=HAYSTACK, out=open_run(tmp_path))
    assert set(grid.failed["needle"]) == {"poison"}
    assert len(grid.failed) == len(grid) / 2
    assert set(grid.failed["error"]) == {"RuntimeError: no Brindlemoor please"}
    assert grid.failed[["recall", "contains", "needle_logprob"]].isna().all(axis=None)
    assert grid.where(needle="sf").frame[["recall", "contains"]].eq(1).all(axis=None)
    assert grid.mean(grid.recall(condition="template")).estimate == 1


def test_model_that_always_fails_ends_the_run(organism_tokenizer, tmp_path):
    model = CopyingModel(organism_tokenizer, fails_on="e")
    with pytest.raises(
        ModelFailureError, match=r"failed on each of the first \d+ cells \(RuntimeError: no e"
    ):
        run_needle(model, CONFIG, haystack=HAYSTACK, out=open_run(tmp_path))
    cured = CopyingModel(organism_tokenizer)
    grid = run_needle(cured, CONFIG, haystack=HAYSTACK, out=open_run(tmp_path))
    assert grid.failed.empty


def test_model_without_a_word_has_recall_0(organism_tokenizer):
    model = CopyingModel(organism_tokenizer, knows=" ")
    grid = run_needle(model, replace(CONFIG, conditions=("template+prefix",)), haystack=HAYSTACK)
    assert len(grid.silent) == len(grid) == 24
    assert grid.frame["recall"].eq(0).all()
    assert grid.failed.empty


def test_parts_keep_what_begins_alike_together(model):
    cells = build_cells(model, CONFIG, HAYSTACK)
    jobs = [(cell, condition) for cell in cells for condition in CONDITIONS]
    parts = plan_parts(jobs, CONFIG, 1)
    assert sorted(index for part in parts for index in part) == list(range(96))
    keys = [
        {
            (c.context_tokens, c.case, "template" if o.startswith("template") else o)
            for c, o in map(jobs.__getitem__, part)
        }
        for part in parts
    ]
    assert all(len(key) == 1 for key in keys)
    assert len(set.union(*keys)) == len(parts) == 12
    assert [len(part) for part in plan_parts(jobs, CONFIG, 10**6)] == [96]


def test_several_settings_measure_more_once_each(organism_tokenizer, tmp_path):
    model = CopyingModel(organism_tokenizer, knows="no", indicator="[IND]")
    config = NeedleConfig(lengths=(60,), depths=(0, 100), conditions=("template+prefix",), max_new_tokens=20)
    cells = build_cells(model, config, HAYSTACK)
    settings = [Setting("a"), Setting("a", indicator=True)]
    grid = run_settings(
        model, cells, config, settings, measure=lambda s: {"cost": 2.0 if s.indicator else 1.0},
        out=open_run(tmp_path),
    )  # fmt: skip
    assert grid.frame["cost"].tolist() == [1, 1, 2, 2]
    assert grid.frame["recall"].tolist() == [0, 0, 1, 1]


def test_dry_run_shows_the_whole_prompt(model):
    cell = build_cells(model, CONFIG, HAYSTACK)[1]
    text = describe_cell(model, cell, CONFIG, "template+prefix")
    assert cell.context.text in text
    assert "<|assistant|>" in text
    assert f"{cell.context.tokens} tokens (80 asked for)" in text
    assert ", ".join(cell.needle.keywords) in text


def test_essays_and_a_real_tokenizer(test_data):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(test_data / "stories260K" / "hf")
    haystack = load_haystack(test_data / "paul_graham")
    model = CopyingModel(tokenizer)
    config = NeedleConfig(
        lengths=(200, 440),
        depths=(0, 50, 100),
        needles=("sf",),
        conditions=("plain+prefix",),
        max_new_tokens=10,
    )
    cells = build_cells(model, config, haystack)
    for cell in cells:
        assert cell.context.tokens <= cell.context_tokens < cell.context.tokens + 120
        assert abs(cell.context.depth_percent - cell.depth_percent) < 30  # half a long sentence
        start, end = cell.context.needle_span
        assert cell.context.text[start:end] == SF.sentence
    assert run_needle(model, config, haystack=haystack).frame["recall"].eq(1).all()
