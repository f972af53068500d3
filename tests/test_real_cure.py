"""The experiment on a real base model: its data, and its verdicts by hand."""

import argparse
import functools
import json

import pandas as pd
import pytest

from ctxlens.results import Selection
from experiments.real_cure import design
from experiments.real_cure.answers import is_kept, keep, read_answers
from experiments.real_cure.figures import draw_recall
from experiments.real_cure.judge import difference, judge_all, make_claims, make_table
from experiments.real_cure.run import name_part, narrow


def write_part(folder, name, values, *, asked="template", measure="needles"):
    """Answers of a model: values by text, each text with two questions."""
    rows = [
        {
            "measure": measure,
            "asked": asked,
            "item": f"{text}-{question}",
            "text": text,
            "length": 300,
            "value": value,
        }
        for text, pair in values.items()
        for question, value in enumerate(pair)
    ]
    (folder / name).mkdir(exist_ok=True)
    path = folder / name / "measured.json"
    known = json.loads(path.read_text()) if path.is_file() else []
    path.write_text(json.dumps(known + rows))


def texts(first, second, n=12):
    return {f"t{k}": (first, second) for k in range(n)}


def test_differences_are_paired_by_question_over_seeds(tmp_path):
    write_part(tmp_path, "base", texts(1.0, 0.5))
    write_part(tmp_path, "vanilla-0", texts(0.5, 0.5))
    write_part(tmp_path, "vanilla-1", texts(0.0, 0.5))
    frame = read_answers(tmp_path)
    assert set(frame["seed"]) == {-1, 0, 1}
    found = difference(frame, ("base", "template"), ("vanilla", "template"), "needles")
    # The seeds' mean is .25 and .5, so a text loses .75 and 0.
    assert found.estimate == pytest.approx(-0.375)
    assert found.n == 12
    assert difference(frame, ("base", "template"), ("upsample", "template"), "needles") is None
    write_part(tmp_path, "indicator-1", texts(0.5, 0.5))
    # Only seed 1 has both models: its vanilla run has 0 and .5.
    paired = difference(read_answers(tmp_path), ("vanilla", "template"), ("indicator", "template"), "needles")
    assert paired.estimate == pytest.approx(0.25)


def test_verdicts_by_the_rules(tmp_path):
    write_part(tmp_path, "base", texts(1.0, 0.5))
    write_part(tmp_path, "base", texts(1.0, 0.5), asked="plain")
    write_part(tmp_path, "vanilla-0", texts(0.5, 0.5))
    write_part(tmp_path, "vanilla-0", texts(1.0, 0.5), asked="plain")
    write_part(tmp_path, "indicator-0", texts(0.9, 0.5), asked="template+indicator")
    write_part(tmp_path, "random-0", texts(0.9, 0.5), asked="template+indicator")
    write_part(tmp_path, "vanilla-0", texts(1.0, 1.0), measure="closed book")
    write_part(tmp_path, "indicator-0", texts(1.0, 1.0), measure="closed book")
    found = judge_all(tmp_path)
    assert found["seeds"] == [0]
    assert {name: one["verdict"] for name, one in found["hypotheses"].items()} == {
        "1 vanilla loses context": "supported",
        "2 the indicator gives context": "supported",
        "3 selection matters": "not supported",  # no difference at all
        "1b loss by the template": "supported",
        "5a the indicator's training costs": "not supported",
    }
    table = make_table(found["levels"]).splitlines()
    assert table[0].startswith("| model, asked | needles | squad")
    assert "| vanilla, template | 0.50 [0.50, 0.50] | – | – | 1.00" in "\n".join(table)
    assert "| 1 vanilla loses context | −0.25 [−0.25, −0.25] | – | – | – | – | supported |" in make_claims(
        found["hypotheses"]
    )
    bars = draw_recall(found["levels"]).data
    assert [bar.name for bar in bars] == [
        "without template", "with template", "with template and indicator",
    ]  # fmt: skip
    assert list(bars[1].x) == ["base", "vanilla"]
    assert list(bars[1].y) == [0.75, 0.5]


def scored():
    """Four turns, of which the first, third and fourth are selected, and two belong to a passage."""
    names = ["t0 with passage-0", "lima-0", "t0 with passage-1", "kto-0"]
    frame = pd.DataFrame({"conversation": names, "turn": 1, "score": [0.6, 0.1, 0.9, 0.7],
                          "selected": [True, False, True, True]})  # fmt: skip
    return Selection(frame, {"model": {"name": "a place", "path": "/a/place"}, "threshold": 0.5})


def test_a_stricter_selection_has_the_highest_scores(tmp_path):
    whole = scored().save(tmp_path / "selection.parquet")
    given = argparse.Namespace(
        top_share=0.5, out=tmp_path, model="model", dose="design", smoke=False, methods="random"
    )
    path = narrow(given, 0, whole)
    chosen = Selection.load(path)
    assert list(chosen.frame["selected"]) == [False, False, True, True]
    assert (chosen.meta["threshold"], chosen.meta["selected"]) == (0.7, 2)
    quality = json.loads(path.with_name("quality.json").read_text())
    assert (quality["precision"], quality["recall"]) == (0.5, 0.5)
    assert [name_part(given, method, 0) for method in ("random", "vanilla")] == [
        "random-top50-0",
        "vanilla-0",
    ]
    given.top_share = None
    assert narrow(given, 0, whole) == whole


def test_kept_answers_are_judged_as_the_run_is(tmp_path):
    run, to = tmp_path / "run", tmp_path / "kept"
    run.mkdir()
    write_part(run, "base", texts(1.0, 0.5))
    write_part(run, "vanilla-0", texts(0.5, 0.5))
    (run / "scores-0").mkdir()
    (run / "scores-0" / "quality.json").write_text('{"precision": 0.5}')
    scored().save(run / "scores-0" / "selection.parquet")
    (run / "vanilla-0" / "trained" / "context").mkdir(parents=True)
    (run / "vanilla-0" / "trained" / "context" / "readings.jsonl").write_text('{"step": 1}\n')
    names = [path.name for path in keep(run, to)]
    assert names == ["base.jsonl", "vanilla-0.jsonl", "selection-0.parquet", "selections.json",
                     "vanilla-0.readings.jsonl"]  # fmt: skip
    assert judge_all(to) == judge_all(run)
    assert judge_all(to)["selection"] == {"scores-0": {"precision": 0.5}}
    assert Selection.load(to / "selection-0.parquet").meta["model"] == {"name": "vanilla-0", "path": None}
    assert [is_kept(to, "base"), is_kept(to, "indicator-0"), is_kept(None, "base")] == [True, False, False]


def test_contradicting_answers_belong_to_other_prompts():
    talks = [
        [{"role": "user", "content": f"q{k}"}, {"role": "assistant", "content": f"a{k}"}] for k in range(3)
    ]
    swapped = design.swap_questions(talks)
    assert [(talk[0]["content"], talk[1]["content"]) for talk in swapped] == [
        ("q0", "a1"), ("q1", "a2"), ("q2", "a0"),
    ]  # fmt: skip


def test_every_dose_has_as_many_conversations_as_its_steps_read():
    rows = design.TRAINING["per_device_train_batch_size"] * design.TRAINING["gradient_accumulation_steps"]
    for dose in design.DOSES.values():
        assert sum(dose.kinds.values()) == design.TRAINING["max_steps"] * rows
        assert set(dose.kinds) <= set(design.KINDS)
    assert set(design.PASSAGE) <= set(design.KINDS)


def test_the_mixture_is_drawn_from_real_data(test_data, monkeypatch):
    monkeypatch.setattr(design, "read_pools", functools.cache(design.read_pools))

    def count(talk):
        return sum(len(message["content"].split()) for message in talk)

    drawn = design.draw_mixture(test_data / "instruct", count)
    kinds = [row["kind"] for row in drawn]
    assert {kind: kinds.count(kind) for kind in design.KINDS} == dict(design.KINDS)
    assert len({row["id"] for row in drawn}) == len(drawn) == 800
    assert max(count(row["messages"]) for row in drawn) <= design.LONGEST
    assert drawn == design.draw_mixture(test_data / "instruct", count)
    closed = design.draw_mixture(test_data / "instruct", count, "closed")
    assert "t0 with passage" not in {row["kind"] for row in closed}
