"""A checkpoint delivered with its evaluation: the numbers, the files, the card, and going on after a stop."""

import json
import math
import xml.etree.ElementTree as ET
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
from needle_models import UNPUNCTUATED, check_lengths
from sft_cases import ARGUMENTS, make_data, tiny
from typer.testing import CliRunner

from ctxlens.cli import app
from ctxlens.errors import InputError, RunExistsError
from ctxlens.models.checkpoint import hash_checkpoint
from ctxlens.organism import load_world
from ctxlens.report.collect import collect_runs
from ctxlens.report.plots.still import drift_still
from ctxlens.results import Ability, Drift, NeedleGrid
from ctxlens.results.markdown import code_block, code_span
from ctxlens.sft import before_after, train
from ctxlens.sft import evaluation as of_training
from ctxlens.sft.before_after import Row, insert_section, load_questions, plan_evaluation
from ctxlens.sft.before_after.section import make_section
from ctxlens.sft.keys import EvaluationKeys
from ctxlens.stats import Interval, PairedComparison

SMALL = ("evaluate_lengths=64,96", "evaluate_depths=0,100", "evaluate_cases=1")
SVG = "{http://www.w3.org/2000/svg}"


def run_cli(*words):
    result = CliRunner().invoke(app, ["train", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The organism's data in small, three steps, and a file of closed-book questions."""
    folder = tmp_path_factory.mktemp("delivered")
    talks = load_world().conversations(12, seed=0, document=0.6, memory=0.2, max_fillers=1)
    lines = [json.dumps({"id": talk.id, "messages": list(talk.messages)}) for talk in talks]
    (folder / "data.jsonl").write_text("\n".join(lines))
    facts = load_world().closed_book(4, seed=0)
    asked = [{"question": f.question, "keywords": list(f.keywords), "prefix": f.prefix} for f in facts]
    (folder / "questions.json").write_text(json.dumps(asked))
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: organism\ndataset: {folder / 'data.jsonl'}\noutput_dir: {folder / 'out'}\nmax_steps: 3\n"
        "indicator: '[IND]'\nper_device_train_batch_size: 4\nuse_cpu: true\nlearning_rate: 1e-2\n"
        f"evaluate_questions: {folder / 'questions.json'}\n"
    )
    return path


@pytest.fixture(scope="module")
def delivered(recipe):
    """A finished training to which the evaluation is added afterwards; its weights as they were before."""
    run_cli("--config", recipe, *SMALL)
    folder = recipe.parent / "out"
    before = hash_checkpoint(folder)
    assert not (folder / "evaluation").exists()
    assert "Before and after" not in (folder / "README.md").read_text()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    result = run_cli("--config", recipe, "--evaluate", *SMALL)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert hash_checkpoint(folder) == before
    return folder, result


def find(record, measure, first, second):
    rows = [Row.of(row) for row in (*record["rows"], *record["treatments"])]
    return next(row for row in rows if (row.measure, row.first, row.second) == (measure, first, second))


def test_the_tables_numbers_are_those_of_the_grids(delivered):
    folder, result = delivered
    record = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    frame = NeedleGrid.load(folder / "evaluation" / "needle.parquet").frame
    assert (
        len(frame) == 2 * 2 * 2 * 2 * 3
    )  # needles, lengths, depths, conditions; base, trained with, without

    def mean(needle, model, condition, indicator, column="recall"):
        rows = frame[(frame["needle"] == needle) & (frame["model"] == model)]
        rows = rows[(rows["condition"] == condition) & (rows["indicator"] == indicator)]
        assert len(rows) == 4
        return rows[column].mean()

    names = ("plain+prefix", "template+prefix")
    for needle in ("known", "unknown"):
        for name in names:
            for indicator in (False, True):
                second = f"trained, {name}{'+indicator' if indicator else ''}"
                found = find(record, f"needle recall: {needle}", f"base, {name}", second).found
                wanted = (
                    mean(needle, "base", name, False), mean(needle, "trained", name, indicator)
                )  # fmt: skip
                assert (found.first.estimate, found.second.estimate) == pytest.approx(wanted)
                assert found.difference.estimate == pytest.approx(wanted[1] - wanted[0])
                assert (found.pairs, found.difference.n) == (4, 2)  # two texts, each with two depths
    cost = find(record, "needle recall: known", "trained, plain+prefix", "trained, template+prefix").found
    wanted = mean("known", "trained", "template+prefix", False) - mean(
        "known", "trained", "plain+prefix", False
    )
    assert cost.difference.estimate == pytest.approx(wanted)
    memory = find(
        record, "answered from memory: known", "base, template+prefix", "trained, template+prefix"
    ).found
    assert memory.second.estimate == pytest.approx(
        mean("known", "trained", "template+prefix", False, "memory_recall")
    )
    ability = Ability.load(folder / "evaluation" / "ability.parquet").frame
    assert len(ability) == 4 * 2 * 3
    closed = find(record, "closed-book recall", "base, template", "trained, template+indicator").found
    kept = ability[(ability["of"] == "trained") & ability["template"] & ability["indicator"]]
    assert closed.second.estimate == pytest.approx(kept["recall"].mean())
    assert (
        find(
            record, "needle recall: known", "base, plain+prefix", "base, template+prefix"
        ).found.first.estimate
        > 0.9
    )
    assert "→trained,template+prefix+indicator" in "".join(result.stdout.split())  # cells wrap


def test_what_lies_beside_the_checkpoint(delivered):
    folder, _ = delivered
    inside = folder / "evaluation"
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    page = (inside / "report.html").read_text(encoding="utf-8")
    assert "Attention drift" in page
    assert "Content-Security-Policy" in page
    results = collect_runs([folder])[0].results
    assert {
        "evaluation/needle",
        "evaluation/ability",
        "evaluation/drift",
        "evaluation/drift-indicator",
    } == set(results)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "](evaluation/drift.svg)" in card
    assert "ctxlens generate --model" in card
    assert "--indicator" in card
    assert f"ctxlens train --config {folder.parent / 'recipe.yaml'}" in card
    assert "evaluate=true" in card
    drift = Drift.load(inside / "drift-indicator.safetensors")
    assert drift.sides == ("base, template", "trained, template+indicator")
    change = drift.by_layer("user", "without sinks")[0]
    assert f"| {drift.layers[0]} | {change[0].format()} | {change[1].format()} |" in card


def test_a_finished_evaluation_is_left_alone_and_another_is_refused(delivered, recipe, monkeypatch):
    folder, _ = delivered

    def fail(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(of_training, "load_model", fail)
    monkeypatch.setattr(of_training, "_load_base", fail)
    stamp = (folder / "README.md").stat().st_mtime_ns
    run_cli("--config", recipe, "--evaluate", *SMALL)
    assert (folder / "README.md").stat().st_mtime_ns == stamp
    result = CliRunner().invoke(app, ["train", "--config", str(recipe), "--evaluate", "evaluate_lengths=64"])
    assert result.exit_code == 2
    assert "already holds another run" in result.stderr
    assert "give another evaluate_folder" in result.stderr


class Stopped(Exception):
    pass


@pytest.fixture
def no_page(monkeypatch):
    """Leave the page out, which takes the longest and is looked at elsewhere."""
    monkeypatch.setattr("ctxlens.sft.before_after.evaluate.write_report", lambda *_, **__: None)


def test_an_evaluation_that_stopped_goes_on(delivered, recipe, no_page):
    """Stopped while the second model answers: the first is not asked again, and the figures are the same."""
    from ctxlens.sft import train_from_config

    folder, _ = delivered
    given = {"evaluate": True, "evaluate_folder": "again", **dict(word.split("=") for word in SMALL)}

    def stop(stage, done, total):
        if stage == "needle trained":
            raise Stopped

    with pytest.raises(Stopped):
        train_from_config(recipe, given, evaluation_progress=stop)
    seen = []
    train_from_config(recipe, given, evaluation_progress=lambda stage, *_: seen.append(stage))
    assert "needle base" not in seen
    assert {"needle trained", "ability", "drift"} <= set(seen)
    first, second = (
        json.loads((folder / name / "evaluation.json").read_text()) for name in ("evaluation", "again")
    )
    assert first["rows"] == second["rows"]
    assert first["drift"] == second["drift"]
    assert (folder / "README.md").read_text().count("## Before and after") == 1


def test_an_adapter_with_plain_text_and_a_model_without_indicator(tmp_path, no_page):
    pytest.importorskip("peft")
    data = make_data()
    args = {"per_device_train_batch_size": 4, "max_steps": 1, "use_cpu": True}
    (tmp_path / "questions.yaml").write_text("- question: What is two plus two?\n  keywords: four\n")
    asked = {
        "lengths": "64", "depths": "50", "cases": 1, "needles": "unknown", "new_tokens": 4,
        "questions": str(tmp_path / "questions.yaml"),
    }  # fmt: skip
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"}
    for name, options in (
        ("text", {"indicator": "use the text", "indicator_as": "text", "selection": {("c1", 1)}}),
        ("none", {}),
    ):
        adapter = lora if options else None
        folder = train(data, out=tmp_path / name, args=args, model_args=adapter, evaluate=asked, **options)
        frame = NeedleGrid.load(folder / "evaluation" / "needle.parquet").frame
        assert (
            sorted(set(frame[frame["model"] == "trained"]["indicator"])) == [False, True][: 1 + bool(options)]
        )
        assert (folder / "evaluation" / "drift-indicator.safetensors").exists() == bool(options)
        assert "1 questions" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"haystack": "nowhere-at-all/"}, "haystack nowhere-at-all/ cannot be read"),
        ({"haystack": "organism", "needles": "pin"}, "pin"),
        ({"haystack": "organism", "lengths": "90"}, "window of 96 tokens"),
        ({"haystack": "organism", "lengths": "many"}, "evaluate_lengths got 'many'"),
        ({"haystack": "organism", "folder": "../out"}, "must be the name of a folder, without a path"),
        ({"haystack": "organism", "questions": "none.yaml"}, "questions none.yaml cannot be read"),
        ({"haystacks": "organism"}, "evaluate has unknown keys: evaluate_haystacks"),
    ],
)
def test_what_cannot_be_asked_is_told_before_the_training(tmp_path, toy_tokenizer, asked, complaint):
    start = tmp_path / "start"
    tiny(toy_tokenizer).save_pretrained(start)
    toy_tokenizer.save_pretrained(start)
    with pytest.raises(InputError, match=complaint):
        train(make_data(), out=tmp_path / "r", model=start, args=ARGUMENTS, evaluate=asked)
    assert not (tmp_path / "r").exists()


def test_texts_are_neutral_for_a_model_that_is_not_the_organism(organism_tokenizer):
    keys = EvaluationKeys(evaluate_lengths="400", evaluate_depths="50", evaluate_cases=1)
    plan = plan_evaluation(keys, model="owner/model", tokenizer=organism_tokenizer, n_ctx=2000)
    assert (plan.haystack, plan.config.needles, plan.questions) == ("neutral", ("neutral",), ())


def test_a_loaded_model_has_no_before(tmp_path, organism_tokenizer):
    with pytest.raises(InputError, match="loads the model as it was before the training; give model="):
        train(
            make_data(), out=tmp_path / "r", model=tiny(organism_tokenizer), tokenizer=organism_tokenizer,
            args=ARGUMENTS, evaluate={},
        )  # fmt: skip


def test_questions_from_a_file(tmp_path):
    path = tmp_path / "questions.yaml"
    path.write_text("- question: What is two plus two?\n  keywords: four\n  prefix: It is\n")
    (one,) = load_questions(path)
    assert (one.question, one.keywords, one.prefix) == ("What is two plus two?", ("four",), "It is")
    for text, complaint in (
        ("- question: What?\n", "question 0: missing key keywords"),
        ("- question: What?\n  keywords: a\n  answer: a\n", "unknown key answer"),
        ("- question: What?\n  keywords: [1]\n", "must be texts"),
        ("- question: What?\n  keywords: four\n  prefix: It is four\n", "the prefix gives away four"),
        ("- question: What?\n  keywords: a\n" * 2, "contains the question 'What\\?' twice"),
        ("question: What?\n", "must contain a list"),
        ("- [\n", "cannot be read as YAML or JSON"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=complaint):
            load_questions(path)


def make_row(measure):
    interval = Interval(0.5, 0.25, 0.75, 7)
    return Row(
        measure, "a", "b", PairedComparison(interval, interval, Interval(-0.25, -0.5, 0.0, 7), 0.04, 9)
    )


def test_a_row_as_json_and_back():
    row = make_row("x")
    assert Row.of(json.loads(json.dumps(row.as_dict()))) == row
    none = Interval(0.5, math.nan, math.nan, 1)
    record = Row("x", "a", "b", PairedComparison(none, none, none, math.nan, 1)).as_dict()
    record["difference"]["low"] = record["p_value"] = None
    assert math.isnan(Row.of(record).found.difference.low)
    assert Row.of(record).found.reading == "too few to tell"


@pytest.mark.parametrize(
    ("measure", "written", "read"),
    [
        ("needle recall: known", "base, no template", "base, plain+prefix"),
        ("needle recall: known", "trained, template + indicator", "trained, template+prefix+indicator"),
        ("answered from memory: known", "trained, template", "trained, template+prefix"),
        ("closed-book recall", "base, no template", "base, plain"),
        ("closed-book recall", "trained, template + indicator", "trained, template+indicator"),
        ("closed-book recall", "trained, template", "trained, template"),
        ("needle recall: known", "trained, plain+prefix+indicator", "trained, plain+prefix+indicator"),
    ],
)
def test_rows_of_earlier_versions_are_read_in_the_one_spelling(measure, written, read):
    record = {**make_row(measure).as_dict(), "first": "base, template+prefix", "second": written}
    row = Row.of(record)
    assert (row.first, row.second) == ("base, template+prefix", read)


@pytest.mark.parametrize("script", ["transcript", "lines", "thai", "hindi", "chinese"])
def test_contexts_are_as_long_as_they_say_in_every_script(tmp_path, organism_tokenizer, script):
    (tmp_path / "hay.txt").write_text(UNPUNCTUATED[script], encoding="utf-8")
    keys = EvaluationKeys(
        evaluate_haystack=str(tmp_path), evaluate_lengths="100,384", evaluate_depths="0,50",
        evaluate_needles="known", evaluate_new_tokens=16,
    )  # fmt: skip
    plan = plan_evaluation(keys, model="m", tokenizer=organism_tokenizer, n_ctx=576)
    check_lengths(plan.cells)
    built = {
        length: round(fmean(cell.context.tokens for cell in plan.cells if cell.context_tokens == length))
        for length in (100, 384)
    }
    named = [f"{n}" if n == length else f"{n} ({length} requested)" for length, n in built.items()]
    assert f"contexts of {', '.join(named)} tokens" in make_section(plan, "b", [], [], [], no_drift="x")


def test_names_in_the_card_are_text(organism_tokenizer):
    """A model or needle name can neither end a table's cell nor become markup."""
    keys = EvaluationKeys(evaluate_lengths="64", evaluate_depths="50", evaluate_cases=1)
    plan = plan_evaluation(keys, model="organism", tokenizer=organism_tokenizer, n_ctx=576)
    drift = make_drift()
    text = make_section(plan, "a|b<img src=x>", [make_row("recall: `p|q`")], [], [drift])
    assert r"a\|b&lt;img src=x\>" in text
    assert (
        r"| recall\: \`p\|q\` | a | b | 0.50 [0.25, 0.75] | 0.50 [0.25, 0.75] | -0.25 [-0.50, 0.00] |" in text
    )
    assert r"second \<s\> against" in text.replace("&lt;s", r"\<s")
    assert "not measured" in make_section(
        plan_evaluation(
            EvaluationKeys(evaluate_haystack="organism", evaluate_lengths="64", evaluate_depths="50"),
            model="organism", tokenizer=organism_tokenizer, n_ctx=576,
        ).__class__(plan.config, plan.cells, "x", (), "evaluation", {}),
        "a", [], [], [], no_drift="too long",
    )  # fmt: skip
    assert code_span("a`b") == "``a`b``"
    assert code_block("x\n```\ny", "bash") == ["````bash", "x\n```\ny", "````"]


def make_drift():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(9), size=(2, 2, 3, 6)).astype(np.float32)
    return Drift(
        shares, np.ones((2, 6, 9), dtype=np.float32), np.arange(6), (0, 1), np.array([2, 0]), "first_answer",
        {"sides": ["first", "second <s>"]},
    )  # fmt: skip


def test_the_still_picture_shows_every_head_and_no_markup_of_names():
    drift = make_drift()
    picture = drift_still([drift, drift], title="a & b")
    root = ET.fromstring(picture)
    labels = [node.text for node in root.findall(f"{SVG}rect/{SVG}title")]
    assert len(labels) == 2 * 2 * 3
    values, sure = drift.difference("user").values, drift.difference("user").decided()
    text = f"{values[1, 2]:+.2f}"
    assert f"layer 1, head 2: {text if sure[1, 2] else f'({text})'}" in labels
    frames = [node for node in root.findall(f"{SVG}rect") if node.get("fill") == "none"]
    assert len(frames) == 2 * 2
    texts = [node.text for node in root.findall(f"{SVG}text")]
    assert "second <s> minus first" in texts
    assert any(text.startswith("a & b (raw shares: the view without sinks is not") for text in texts)
    measured = replace(drift, resting=drift.shares / 2)
    root = ET.fromstring(drift_still([measured], title="a"))
    assert "a (without sinks)" in [node.text for node in root.iter()]
    assert "script" not in picture


def test_the_section_takes_the_place_of_an_earlier_one():
    card = "# card\n\nmine\n"
    once = insert_section(card, "one")
    assert once.startswith(card.rstrip())
    more = once + "\nafter\n"
    twice = insert_section(more, "two")
    assert "one" not in twice
    assert twice == more.replace("one", "two")


@pytest.mark.slow
def test_of_two_processes_the_first_evaluates(recipe, tmp_path):
    import subprocess
    import sys

    launch = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29737",
        "-m", "ctxlens.sft", "--config", str(recipe), "--output_dir", str(tmp_path / "out"),
        "--per_device_train_batch_size", "2", "--evaluate",
        *(part for word in SMALL for part in f"--{word}".split("=")),
    ]  # fmt: skip
    subprocess.run(launch, check=True, capture_output=True, timeout=300)
    assert (tmp_path / "out" / "evaluation" / before_after.RESULT).is_file()
    assert "## Before and after" in (tmp_path / "out" / "README.md").read_text()


def test_evaluation_keys_are_no_part_of_the_training(recipe, delivered):
    config = json.loads((delivered[0] / "manifest.json").read_text())["config"]
    assert not [key for key in config if key.startswith("evaluate")]
    with pytest.raises(RunExistsError):
        train(make_data(), out=delivered[0], args={"max_steps": 1, "use_cpu": True}, evaluate={})
