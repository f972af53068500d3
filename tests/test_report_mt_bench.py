"""MT-Bench on the page: answers and judgments in FastChat's layout, by whatever tool they were written."""

import json
import math

import numpy as np
import pytest
from judge_stub import QUESTIONS, write_jsonl
from test_report import EVIL, Page

from ctxlens.errors import InputError
from ctxlens.report import write_report
from ctxlens.report.answers import ways_of_asking
from ctxlens.report.collect import collect_runs
from ctxlens.report.plots import rating_means
from ctxlens.results import Ratings
from ctxlens.results.fastchat import read_dialogues, read_questions, read_ratings
from ctxlens.runs import Run

SCORES = {
    "vanilla": {1: (6, 4), 2: (2, -1), 3: (7, 5)},
    "vanilla+indicator": {1: (7, 6), 2: (5, 3), 3: (8, 6)},
}
"""By model and question: a rating a turn; −1 where the judge has failed."""


def settings(model, *, indicator=False, alpha=1.0):
    return {"model": {"name": model}, "indicator": indicator, "steering": {"alpha": alpha}}


def answer(model, question, text=""):
    return {
        "question_id": question,
        "model_id": model,
        "choices": [
            {"index": 0, "turns": [f"{model} says {question}{text}", "" if question == 3 else "yes"]}
        ],
        "truncated": [False, question == 2],
    } | ({"cut": [question == 1, question == 2]} if "+" in model else {})


def judgment(model, question, turn, score, *, judge="j", at=1.0, text=""):
    return {
        "question_id": question, "model": model, "judge": [judge, "single-v1"], "user_prompt": "…",
        "judgment": f"It is worth {score}.{text}", "score": score, "turn": turn, "tstamp": at,
        "error": f"it hung{text}" if score == -1 else "",
    }  # fmt: skip


def make(folder, *, scores=None, questions=QUESTIONS, judge="j", text=""):
    """A run folder with answers of two ways of asking and, by default, their judgments."""
    run = Run.open(folder, study="mt-bench", config={"n_questions": 3})
    if questions:
        write_jsonl(folder / "question.jsonl", questions)
    for place in ("model_answer", "models", "model_judgment"):
        (folder / place).mkdir()
    for model in SCORES:
        write_jsonl(folder / f"model_answer/{model}.jsonl", [answer(model, n, text) for n in (1, 2, 3)])
        told = settings("vanilla" + text, indicator="+" in model)
        (folder / f"models/{model}.json").write_text(json.dumps(told))
    rows = [
        judgment(model, question, turn, score, judge=judge, text=text)
        for model, of_model in (SCORES if scores is None else scores).items()
        for question, pair in of_model.items()
        for turn, score in enumerate(pair, start=1)
    ]
    if rows:
        write_jsonl(folder / "model_judgment/j_single.jsonl", rows)
    return run.folder


def page_of(folder):
    return Page(write_report([folder], folder.parent / "report.html").read_text(encoding="utf-8"))


def section(page):
    return page.words[page.words.index("Ratings by j") : page.words.rindex("How it was made")]


def test_ratings_are_shown_by_turn_and_category_with_differences(tmp_path):
    words = section(page_of(make(tmp_path / "run")))
    # vanilla: (6 + 2 + 7) / 3 and, without the failed one, (4 + 5) / 2; the other: 20 / 3, 15 / 3, 35 / 6
    for text in (
        "vanilla 5.00 [2.00, 7.00] 4.50 [4.00, 5.00] 4.80 [2.00, 6.00] 5 of 6 1 failed 3",
        "vanilla+indicator 6.67 [5.00, 8.00] 5.00 [3.00, 6.00] 5.83 [4.00, 7.00] 6 of 6 3",
        "vanilla+indicator minus vanilla all turns 5 answers, 3 questions 4.80 → 6.40 +1.60 [1.00, 3.00]",
        "writing 1 question 5.00 too few 6.50 too few +1.50",
        "Answers that j failed to rate: 1 reason vanilla vanilla+indicator it hung 1 0",
    ):
        assert text in words, text
    assert words.count("too few to tell") >= 2


def test_the_numbers_of_the_figures_are_those_of_the_table(tmp_path):
    [run] = collect_runs([make(tmp_path / "run")])
    figure = rating_means(run.ratings()["j"], "turn")
    assert list(figure.layout.yaxis.ticktext) == ["turn 1", "turn 2", "all turns"]
    np.testing.assert_allclose(figure.data[0].x, [5, 4.5, 4.8])
    np.testing.assert_allclose(figure.data[1].x, [20 / 3, 5, 35 / 6], atol=1e-4)
    by_category = rating_means(run.ratings()["j"], "category")
    assert list(by_category.layout.yaxis.ticktext) == ["writing", "math", "extraction"]
    np.testing.assert_allclose(by_category.data[0].x, [5, 2, 6])


def test_questions_answers_and_judgments_stand_side_by_side_and_folded(tmp_path):
    page = page_of(make(tmp_path / "run"))
    words = page.words
    assert page.tags.count("details") == 3
    # math differs most (2 against 4), then 1.5, then 1
    places = [words.index(f"{n}, {kind}:") for n, kind in ((2, "math"), (1, "writing"), (3, "extraction"))]
    assert places == sorted(places)
    assert "How much is 6 times 7? vanilla 2.00 · vanilla+indicator 4.00" in words
    for text in ("turn 1, the user How much is 6 times 7?",
                 "vanilla says 2 j: 2 of 10 It is worth 2.",
                 "vanilla, prompt truncated yes j: no rating, it hung It is worth -1.",
                 "vanilla+indicator, prompt truncated, answer cut yes",
                 "(empty)"):  # fmt: skip
        assert text in words, text


def test_answers_without_a_judge_are_counted_and_shown(tmp_path):
    page = page_of(make(tmp_path / "run", scores={}))
    words = page.words
    assert "No judge has rated these answers" in words
    assert "Mean ratings" not in words
    assert "empty prompt truncated answer cut" in words
    assert "vanilla 6 3 questions 3 [3, 3] 1 [0, 1] 1 1 – –" in words  # its file does not say what was cut
    assert "vanilla+indicator with the indicator 6 3 questions 3 [3, 3] 1 [0, 1] 1 1 2 3 of 6" in words
    assert page.tags.count("details") == 3
    places = [words.index(f"{n}, {kind}:") for n, kind in ((1, "writing"), (2, "math"), (3, "extraction"))]
    assert places == sorted(places)


def test_answers_that_were_not_judged_yet_are_told_from_failures(tmp_path):
    scores = {"vanilla": {1: (6, 4), 2: (2, -1)}}
    assert "3 of 6 1 failed, 2 not yet judged" in section(page_of(make(tmp_path / "run", scores=scores)))


def test_no_text_of_the_files_becomes_markup(tmp_path):
    questions = [{**one, "category": one["category"] + EVIL, "turns": [t + EVIL for t in one["turns"]]}
                 for one in QUESTIONS]  # fmt: skip
    page = page_of(make(tmp_path / "run", questions=questions, judge="j" + EVIL, text=EVIL))
    assert "img" not in page.tags
    assert len([1 for kind, _ in page.scripts if kind is None]) == 2
    assert not any(name.startswith("on") for _, attributes in page.attributes for name in attributes)
    assert f"vanilla says 1{EVIL}" in page.words
    assert f"j{EVIL}: no rating, it hung{EVIL} It is worth -1.{EVIL}" in page.words


@pytest.mark.parametrize(
    ("place", "row"),
    [
        ("question.jsonl", {"question_id": 1}),
        ("model_answer/vanilla.jsonl", {"question_id": 1, "choices": [{"turns": "no list"}]}),
        ("model_judgment/j_single.jsonl", {"question_id": 1, "judge": "alone"}),
        ("model_judgment/j_single.jsonl", {**judgment("m", 1, 1, 5), "score": "high"}),
    ],
)
def test_a_broken_file_is_left_out_and_the_rest_is_shown(tmp_path, place, row):
    folder = make(tmp_path / "run")
    write_jsonl(folder / place, [row])
    words = page_of(folder).words
    assert f"{place.split('/')[-1]} is left out: " in words
    assert "row 1, is not " in words
    assert "vanilla+indicator says 1" in words


def test_settings_that_cannot_be_read_are_left_out(tmp_path):
    folder = make(tmp_path / "run")
    (folder / "models/vanilla.json").write_text("{")
    (folder / "models/vanilla+indicator.json").write_text('["no mapping"]')
    words = page_of(folder).words
    assert "models/vanilla.json is left out" in words
    assert "vanilla+indicator 6 3 questions" in words


def test_ratings_alone_are_drawn(tmp_path):
    run = Run.open(tmp_path / "run", study="mt-bench", config={})
    row = {"model": "m", "category": "stem", "turn": 1, "error": ""}
    rows = [{**row, "question_id": str(n), "score": 5.0 + n} for n in range(3)]
    run.save("ratings-j.parquet", Ratings.from_rows(rows, {"judge": "j"}))
    words = section(page_of(run.folder))
    assert "m 6.00 [5.00, 7.00] 3 of 3 3" in words


def test_categories_come_from_the_ratings_where_the_questions_are_missing(tmp_path):
    folder = make(tmp_path / "run", questions=None)
    rows = [{"model": "vanilla", "question_id": str(one["question_id"]), "category": one["category"],
             "turn": 1, "score": 5.0, "error": ""} for one in QUESTIONS]  # fmt: skip
    Run.read(folder).save("ratings-j.parquet", Ratings.from_rows(rows, {"judge": "j"}))
    words = section(page_of(folder))
    assert "2, math" in words
    assert "5 of 6" in words  # the file of judgments says more than the table


def test_of_two_judgments_the_latest_counts_and_judges_are_kept_apart(tmp_path):
    path = write_jsonl(
        tmp_path / "all_single.jsonl",
        [
            judgment("m", 1, 1, 9, at=5.0),
            judgment("m", 1, 1, 2, at=4.0),
            judgment("m", 1, 1, 3, judge="k"),
            judgment("m", 7, 1, math.nan),
        ],
    )
    found = read_ratings(path, {})
    assert list(found) == ["j", "k"]
    assert found["j"].frame["score"].tolist()[0] == 9
    assert found["j"].unrated["error"].tolist() == ["the judge gave no rating"]
    assert found["k"].mean().estimate == 3


def test_answers_stand_in_the_order_of_the_questions(tmp_path):
    questions = read_questions(write_jsonl(tmp_path / "question.jsonl", QUESTIONS))
    path = write_jsonl(tmp_path / "m.jsonl", [answer("m", n) for n in (9, 3, 1)])
    frame = read_dialogues(path, questions).frame
    assert frame["question_id"].tolist() == ["1", "1", "3", "3", "9", "9"]
    assert frame["asked"].tolist()[:2] == QUESTIONS[0]["turns"]
    assert frame["asked"].tolist()[-1] == ""
    assert read_questions(tmp_path / "none.jsonl") == {}
    with pytest.raises(InputError, match=r"row 1, is not an answer in FastChat"):
        read_dialogues(write_jsonl(tmp_path / "n.jsonl", [{"question_id": True}]), {})


def test_ways_of_asking_are_found_by_the_weights():
    told = {
        "cured+indicator": settings("cured", indicator=True),
        "cured": settings("cured"),
        "base": settings("base"),
        "base+alpha": settings("base", alpha=0.3),
        "alien": ["no mapping"],
    }
    assert ways_of_asking(told) == [("cured", "cured+indicator"), ("base", "base+alpha")]
    assert ways_of_asking(None) == []
