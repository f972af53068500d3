"""Evaluations: means, pairs and McNemar counts by hand, and how they are drawn."""

import json
import re

import pytest
from evaluation_cases import evaluation

from ctxlens.errors import InputError
from ctxlens.report import write_report
from ctxlens.report.collect import collect_runs
from ctxlens.report.empties import describe_faults, explain_empties
from ctxlens.report.evaluation import evaluation_blocks
from ctxlens.report.plots import evaluation_means
from ctxlens.results import Evaluation, load_result
from ctxlens.runs import Run

BASE, TUNED = ("base", "template"), ("tuned", "template+steered:0.5")
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


def test_means_and_pairs_are_over_texts():
    found = evaluation()
    assert found.variants == (BASE, ("base", "template+steered:0.5"), ("tuned", "template"), TUNED)
    mean = found.mean("quiz", "contains", BASE)
    assert (mean.estimate, mean.n) == (0.75, 2)
    pair = found.compare("quiz", "contains", BASE, TUNED)
    assert (pair.difference.estimate, pair.difference.n, pair.pairs) == (0.0, 2, 4)
    assert found.compare("quiz", "f1", BASE, ("tuned", "template")).difference.estimate == -0.375
    test = found.mcnemar("quiz", "contains", BASE, TUNED)
    assert (test.only_first, test.only_second, test.p_value) == (1, 1, 1.0)
    test = found.mcnemar("quiz", "contains", BASE, ("tuned", "template"))
    assert (test.only_first, test.only_second, test.p_value) == (3, 0, 0.25)
    assert found.count("truncated", "quiz", BASE) == 1


def test_only_examples_that_both_have_are_compared():
    right = {("a", "template"): (1, 1), ("b", "template"): (0, 1, 0, 0)}
    pair = evaluation(right=right).compare("quiz", "contains", ("a", "template"), ("b", "template"))
    assert (pair.pairs, pair.difference.estimate) == (2, -0.5)


def test_what_does_not_fit_is_refused():
    found = evaluation()
    with pytest.raises(InputError, match="no task other; it has quiz"):
        found.mean("other", "contains", BASE)
    with pytest.raises(InputError, match="no metric recall; it has contains, f1"):
        found.mean("quiz", "recall", BASE)
    assert not found.is_binary("quiz", "f1")
    with pytest.raises(InputError, match="not only 0 or 1"):
        found.mcnemar("quiz", "f1", BASE, TUNED)


def test_a_saved_evaluation_comes_back(tmp_path):
    found = evaluation()
    found.save(tmp_path / "evaluation.parquet")
    again = load_result(tmp_path / "evaluation.parquet")
    assert isinstance(again, Evaluation)
    assert again.frame.equals(found.frame)
    assert again.meta == found.meta


def test_conditions_of_earlier_versions_are_translated_when_a_file_is_read(tmp_path):
    now = evaluation()
    earlier = {"template": "vanilla", "template+steered:0.5": "steered:0.50"}
    meta = {
        **now.meta,
        "conditions": [
            {"name": "vanilla", "template": True, "indicator": False, "steering": None},
            {"name": "steered:0.50", "template": True, "indicator": False, "steering": {"alpha": 0.5}},
        ],
        "left_out": [{**now.meta["left_out"][0], "condition": "indicator"}],
    }
    frame = now.frame.assign(condition=now.frame["condition"].replace(earlier))
    assert set(frame["condition"]) == {"vanilla", "steered:0.50"}
    Evaluation(frame, meta).save(tmp_path / "evaluation.parquet")
    for read in (Evaluation.load, load_result):
        again = read(tmp_path / "evaluation.parquet")
        assert again.frame.equals(now.frame)
        assert again.meta["conditions"] == ["template", "template+steered:0.5"]
        assert again.meta["left_out"] == now.meta["left_out"]


def test_text_that_is_no_condition_stays_when_a_file_is_read(tmp_path):
    foreign = evaluation(right={("a", "chain of thought"): (1, 0), ("a", "vanilla"): (1, 1)})
    foreign.save(tmp_path / "evaluation.parquet")
    again = Evaluation.load(tmp_path / "evaluation.parquet")
    assert again.variants == (("a", "chain of thought"), ("a", "template"))


def test_the_figure_holds_every_variant_and_metric():
    figure = evaluation_means(evaluation(), "quiz")
    assert [trace.name for trace in figure.data] == ["contains", "f1"]
    assert list(figure.data[0].x) == [0.75, 0.5, 0.0, 0.75]
    assert list(figure.layout.yaxis.ticktext)[3] == "tuned<br>template+steered:0.5"


def report_on(tmp_path, found):
    run = Run.open(tmp_path / "run", study="eval", config={"model": "base"})
    run.save("evaluation.parquet", found)
    return write_report([run.folder], tmp_path / "report.html").read_text(encoding="utf-8"), run


def test_the_page_shows_differences_and_answers(tmp_path):
    page, run = report_on(tmp_path, evaluation())
    rows = re.findall(r'<tr data-task="quiz".*?</tr>', page, re.DOTALL)
    assert len(rows) == 8
    tuned = next(row for row in rows if 'data-model="tuned"' in row and 'condition="template"' in row)
    for text in ("−0.75", "3 : 0", "p 0.250", "too few to tell", "1 truncated (25%)"):
        assert text in tuned
    assert "old was not asked under the condition template+indicator: it has no token." in page
    _, answers, _ = evaluation_blocks(collect_runs([run.folder])[0])
    first = answers.data["tasks"]["quiz"]["examples"][0]
    assert first["gold"] == "gold 0"
    assert [one["text"] for one in first["answers"]][2:] == ["tuned says 0"] * 2
    assert [one["name"] for one in answers.data["tasks"]["quiz"]["examples"]][-1] == "example 3"


def with_empties(found):
    """The first three answers of the base model with template are empty, and its last is cut."""
    frame = found.frame.assign()
    of_base = (frame["model"] == "base") & (frame["condition"] == "template")
    frame["empty"] = of_base & (frame["example"] < 3)
    frame["cut"] = of_base & (frame["example"] == 3)
    return Evaluation(frame, found.meta)


def test_shares_of_empty_answers_by_hand():
    found = with_empties(evaluation())
    assert found.share("empty", "quiz", BASE) == 0.75
    assert found.share("empty", "quiz", TUNED) == 0.0
    empty, cut = describe_faults(found, "quiz")
    assert empty.startswith("empty: base template 75%, base template+steered:0.5 0%, tuned template 0%")
    assert cut.startswith("cut off: base template 25%, ")
    assert describe_faults(evaluation(), "quiz") == []
    assert explain_empties(evaluation()) == ""
    assert explain_empties(found) == (
        "Conditions differ in their share of empty answers (quiz, base: template 75%, template+steered:0.5 "
        "0%), and an empty answer counts as wrong, so their difference is partly one of answering at all: "
        "ask with examples (--num-fewshot 2), which show under every condition that an answer follows."
    )
    with_examples = Evaluation(found.frame, {**found.meta, "num_fewshot": 2})
    assert explain_empties(with_examples).endswith(
        "let every answer begin with the same words "
        "(--conditions template+prefix,template+prefix+steered:0.5)."
    )


def test_conditions_with_a_prefix_are_not_advised_to_take_one():
    right = {("base", "plain+prefix"): (1, 1, 1, 0), ("base", "template+prefix"): (0, 0, 0, 0)}
    found = evaluation(right=right)
    frame = found.frame.assign(empty=found.frame["condition"] == "plain+prefix")
    told = explain_empties(Evaluation(frame, {**found.meta, "num_fewshot": 2}))
    assert told.endswith("read the answers before you compare means.")


def test_the_summary_has_a_row_for_every_mean():
    rows = with_empties(evaluation()).summary()
    assert len(rows) == 8  # two metrics of four variants
    first, second = (row for row in rows if row["model"] == "base" and row["metric"] == "contains")
    assert (first["examples"], first["truncated"], first["empty"], first["cut"]) == (4, 1, 3, 1)
    assert (second["mean"]["estimate"], second["difference"]["estimate"], second["empty"]) == (0.5, -0.25, 0)
    json.dumps(rows)


def test_the_page_warns_of_uneven_empty_answers_and_counts_what_was_cut(tmp_path):
    page, _ = report_on(tmp_path, with_empties(evaluation()))
    assert "Conditions differ in their share of empty answers (quiz, base: template 75%" in page
    rows = re.findall(r'<tr data-task="quiz".*?</tr>', page, re.DOTALL)
    base = next(row for row in rows if 'data-model="base"' in row and 'condition="template"' in row)
    assert "3 empty (75%), 1 cut (25%)" in base


def test_files_of_earlier_versions_do_not_say_what_was_cut(tmp_path):
    frame = evaluation().frame.drop(columns="cut")
    Evaluation(frame, evaluation().meta).save(tmp_path / "evaluation.parquet")
    again = Evaluation.load(tmp_path / "evaluation.parquet")
    assert again.count("cut", "quiz", BASE) == 0
    both = Evaluation.concat([again, with_empties(evaluation())])
    both.save(tmp_path / "both.parquet")
    assert Evaluation.load(tmp_path / "both.parquet").count("cut", "quiz", BASE) == 1


def test_a_long_evaluation_keeps_the_answers_that_differ_most(tmp_path):
    right = {("a", "template"): [1] * 200, ("b", "template"): [1] * 150 + [0] * 50}
    run = Run.open(tmp_path / "run", study="eval", config={})
    run.save("evaluation.parquet", evaluation(right=right))
    _, answers, _ = evaluation_blocks(collect_runs([run.folder])[0])
    task = answers.data["tasks"]["quiz"]
    assert (task["total"], len(task["examples"])) == (200, 80)
    assert all(one["answers"][1]["scores"][0] == 0 for one in task["examples"][:50])


def test_attacks_in_an_evaluation_stay_text(tmp_path):
    page, _ = report_on(tmp_path, evaluation(EVIL))
    assert "<img" not in page
    assert "<script>alert" not in page
    held = [json.loads(text) for text in re.findall(r"json\">(.*?)</script>", page, re.DOTALL)]
    data = next(one for one in held if isinstance(one, dict) and "tasks" in one)
    assert EVIL in data["tasks"]["quiz" + EVIL]["examples"][0]["answers"][0]["text"]
