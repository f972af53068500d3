"""The cure at a tiny size: every stage, resumed after a stop, its plan by hand, and what it refuses."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import ctxlens as cl
from ctxlens.auditing import ready
from ctxlens.auditing import run as auditing_run
from ctxlens.auditing.speed import Speed
from ctxlens.chat.data import Conversation
from ctxlens.cli import app
from ctxlens.curing import run as curing_run
from ctxlens.curing.plan import Plan, head_share, make_plan
from ctxlens.curing.request import LAYERS, METHODS, RULES, Request, check_request
from ctxlens.errors import InputError, RunExistsError
from ctxlens.organism import load_world
from ctxlens.organism.recipe import SHARES
from ctxlens.results import Checkpoints, NeedleGrid, Scores, Selection
from ctxlens.scoring.layers import LAYER_RULES
from ctxlens.scoring.selection import THRESHOLD_RULES
from ctxlens.sft import room

TINY = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
ASKED = ["before", "after", "after-indicator"]


SPEED = Speed(per_token=1e-5, per_square=0.0, answers=0.01, repeats=1.0, steered=1.0)


def make_audits_tiny(patch):
    """Audits of four short texts, whose speed is not measured."""
    patch.setattr(auditing_run, "make_plan", tiny_plan)
    patch.setattr(ready, "measure_speed", lambda model, words: SPEED)


def tiny_plan(frame, lengths=None):
    return replace(frame.plan([140], 4, alphas=(), draws=0, controls=False), role_texts=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty conversations of the embedded model's world, as a file."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    talks = load_world().conversations(40, seed=0, **SHARES)
    path.write_text("".join(json.dumps({"id": t.id, "messages": list(t.messages)}) + "\n" for t in talks))
    return path


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A cure that was stopped before its audit after the training, and then started again."""
    out = tmp_path_factory.mktemp("cure") / "run"
    told, seen = [], []
    given = {"out": out, "budget": 60, "top_share": 0.3, "overrides": TINY, "device": "cpu"}

    def stop_after_training(stage, done, total):
        if stage == "after":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        make_audits_tiny(patch)
        with pytest.raises(KeyboardInterrupt):
            cl.cure("organism", data, progress=stop_after_training, **given)
        written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
        found = cl.cure(
            "organism", data, tell=told.append,
            progress=lambda stage, done, total: seen.append((stage, done, total)), **given,
        )  # fmt: skip
    return SimpleNamespace(out=out, found=found, written=written, told=told, seen=seen, given=given)


# The whole.


def test_every_stage_leaves_its_results(finished):
    out, found = finished.out, finished.found
    scores, selection = Scores.load(out / "scores.parquet"), Selection.load(out / "selection.parquet")
    turns = scores.frame.drop_duplicates(["conversation", "turn"])
    assert selection.meta["selected"] == round(0.3 * len(turns)) == found.selection["selected"]
    record = json.loads((out / "train" / "train.json").read_text())
    assert record["steps"] == 2
    assert record["recipe"]["indicator"] == "[IND]"
    assert list(found.audits) == ASKED
    for name in ASKED:
        assert (out / "audits" / name / "report.html").is_file()
        assert found.audits[name].verdicts[0].claim == "loss"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "audits/after-indicator/report.html" in page
    assert "Each checkpoint against before" in page


def test_the_comparison_is_with_before(finished):
    table = Checkpoints.load(finished.out / "cure.parquet")
    assert table.models == ASKED
    values = [one.estimate for one in table.values("recall with template")]
    changes = [one.estimate for one, _ in table.changes("recall with template")]
    assert changes == pytest.approx([values[1] - values[0], values[2] - values[0]])
    assert finished.found.to_frame().equals(table.frame)
    assert "recall with template" in finished.found.describe()


def test_the_last_audit_asks_with_the_indicator(finished):
    tokens = {}
    for name in ASKED[1:]:
        frame = NeedleGrid.load(finished.out / "audits" / name / "needle.parquet").frame
        tokens[name] = frame.pivot(index="cell", columns="condition", values="prompt_tokens")
    more = tokens["after-indicator"] - tokens["after"]
    assert set(more["plain+prefix"]) == {0}
    assert set(more["template+prefix"]) == {2}  # a space and the indicator


def test_a_stopped_cure_goes_on_from_its_finished_stages(finished):
    kept = ("scores.parquet", "selection.parquet", "train/model.safetensors", "audits/before/verdicts.json")
    for name in kept:
        path = finished.out / name
        assert path.stat().st_mtime_ns == finished.written[path], f"{name} was made again"
    assert not [path for path in finished.written if "audits/after" in str(path)]
    assert list(dict.fromkeys(stage for stage, _, _ in finished.seen)) == list(curing_run.STAGES)
    for name in ASKED[1:]:
        done = [one for stage, one, total in finished.seen if stage == name]
        assert done == sorted(done)
        assert len(done) > 3


def test_the_plan_is_told_before_the_first_stage_and_kept(finished):
    (plan,) = finished.told
    assert plan == Plan.from_dict(json.loads((finished.out / "plan.json").read_text()))
    assert (plan.conversations, plan.steps, plan.rows, plan.recipe) == (40, 2, 4, "organism")
    assert plan.tokens > 40 * 10
    assert plan.audits == tuple(ASKED)
    assert plan.disk is not None
    said = " ".join(plan.describe())
    assert "40 conversations" in said
    assert "expected minutes: score" in said


def test_the_command_prints_a_finished_cure(finished, data, monkeypatch):
    make_audits_tiny(monkeypatch)
    words = [
        "cure", "organism", "--dataset", str(data), "--budget", "60m", "--top-share", "0.3", "--device",
        "cpu", "--out", str(finished.out), *(f"{key}={value}" for key, value in TINY.items()),
    ]  # fmt: skip
    result = CliRunner().invoke(app, [*words, "--json", "--quiet"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert result.stderr == ""
    assert document["verb"] == "cure"
    assert document["method"] == "indicator"
    assert set(document["audits"]) == set(ASKED)
    assert document["selection"]["selected"] == finished.found.selection["selected"]
    assert len(document["table"]["rows"]) == 3 * 4
    assert "asked with the indicator" in document["summary"]
    shown = CliRunner().invoke(app, words)
    assert "after-indicator" in shown.stdout
    assert "change from before" in shown.stdout
    monkeypatch.setattr("ctxlens.results.audit.failed", lambda verdicts, names: names == ("loss",))
    assert CliRunner().invoke(app, [*words, "--fail-on", "loss"]).exit_code == 1


def test_another_cure_in_the_same_folder_is_refused(finished, data):
    with pytest.raises(RunExistsError, match="already holds another run"):
        cl.cure("organism", data, **{**finished.given, "budget": 7})


def test_finished_scores_are_used_and_nothing_to_select_is_said(finished, data, tmp_path, monkeypatch):
    make_audits_tiny(monkeypatch)
    monkeypatch.setattr(curing_run, "score_conversations", None)
    given = {key: value for key, value in finished.given.items() if key != "top_share"}
    given |= {"out": tmp_path / "other", "scores": finished.out, "threshold": 1.0}
    with pytest.raises(InputError) as found:
        cl.cure("organism", data, **given)
    turns = len(Scores.load(finished.out / "scores.parquet").frame.drop_duplicates(["conversation", "turn"]))
    said = str(found.value)
    for fragment in (f"none of {turns} scored answers", "1.000", "--top-share", f"--scores {tmp_path}"):
        assert fragment in said, said
    assert not (tmp_path / "other" / "train").exists()


def test_scores_of_other_data_are_refused_before_a_model_is_loaded(finished, data, tmp_path, monkeypatch):
    monkeypatch.setattr(curing_run, "load_model", None)
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace("the", "thee"))
    with pytest.raises(InputError, match="not those that were scored"):
        cl.cure("organism", other, **{**finished.given, "out": tmp_path / "o", "scores": finished.out})
    assert not (tmp_path / "o").exists()


def test_only_the_plan(data, tmp_path, monkeypatch):
    make_audits_tiny(monkeypatch)
    given = {"method": "vanilla", "out": tmp_path / "v", "only_plan": True, "device": "cpu"}
    found = cl.cure("organism", data, **given)
    assert found.plan.audits == ("before", "after")
    assert found.plan.seconds["score"] == 0
    assert "planned" in repr(found)
    with pytest.raises(InputError, match="only planned"):
        found.to_frame()
    assert not (tmp_path / "v" / "scores.parquet").exists()


# The request.


def request(tmp_path, data, **given):
    return Request(model="organism", dataset=str(data), out=tmp_path / "out", **given)


def test_what_each_method_trains(tmp_path, data):
    keys = {name: request(tmp_path, data, method=name).training() for name in METHODS}
    selection = tmp_path / "out" / "selection.parquet"
    assert [keys[name]["selection"] for name in METHODS] == [selection, selection, selection, "null"]
    assert [keys[name]["indicator"] for name in METHODS] == ["[IND]", "null", "[IND]", "null"]
    assert keys["random"]["selection_control"] == "random"
    assert keys["upsample"]["upsample_selected"] == 3
    assert request(tmp_path, data, overrides={"indicator": "<look>"}).training()["indicator"] == "<look>"
    recipes = {name: request(tmp_path, data, method=name).read_recipe().config for name in METHODS}
    assert [recipes[name].indicator for name in METHODS] == ["[IND]", None, "[IND]", None]
    assert recipes["vanilla"].selection is None


def test_rules_are_those_of_the_selection():
    assert set(RULES) == set(THRESHOLD_RULES)
    assert set(LAYERS) <= set(LAYER_RULES)


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    asked = Request(
        model="nowhere", dataset="none.jsonl", out=tmp_path / "o", method="magic", budget=0, threshold=3,
        top_share=2, scores=tmp_path, seed_model="neither", overrides={"max_steps": "x"}, lengths=(0,),
    )  # fmt: skip
    with pytest.raises(InputError) as found:
        check_request(asked)
    said = str(found.value)
    for fragment in (
        "'magic' is not known; choose from indicator", "minutes above 0", "threshold must be a number",
        "top share", "scores.parquet does not exist", "seed model has no use", "'neither'", "'nowhere'",
        "none.jsonl", "max_steps", "lengths must be",
    ):  # fmt: skip
        assert fragment in said, (fragment, said)
    assert not (tmp_path / "o").exists()


def test_a_full_disk_is_refused_before_anything_is_loaded(tmp_path, data, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda folder: 1000)
    monkeypatch.setattr(curing_run, "load_model", None)
    with pytest.raises(InputError, match="MB free, but this training writes about"):
        cl.cure("organism", data, out=tmp_path / "o")


def test_a_base_model_without_template_is_offered_one(tmp_path, data):
    from test_shipped_recipes import write_checkpoint

    model = write_checkpoint(tmp_path / "base", 1000, 10, template=None)
    with pytest.raises(InputError, match=r"chatml, which comes with ctxlens.*--chat-template"):
        cl.cure(model, data, out=tmp_path / "o")


def test_a_budget_that_is_too_small_leaves_no_folder(tmp_path, data, monkeypatch):
    monkeypatch.setattr(ready, "measure_speed", lambda model, words: SPEED)
    with pytest.raises(InputError, match="too small"):
        cl.cure("organism", data, out=tmp_path / "o", budget=1e-5, device="cpu")
    assert not (tmp_path / "o").exists()


# The plan.


def test_expected_times_by_hand():
    speed = Speed(per_token=0.01, per_square=0.0, answers=1.0, repeats=1.0, steered=1.0)
    talks = [Conversation(id=str(k), messages=(), source="", labels={}) for k in range(100)]
    args = SimpleNamespace(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, world_size=1, max_steps=-1,
        num_train_epochs=2.0,
    )  # fmt: skip

    def plan(args, **given):
        return make_plan(
            talks, [100, 300], speed, args=args, head=0.5, audits=("before", "after"), audit_seconds=60.0,
            lengths=(500,), recipe="full", disk=None, **{"adapter": False, "scores": True, **given},
        )  # fmt: skip

    found = plan(args)
    assert (found.tokens, found.steps, found.rows) == (200 * 100, 25, 8)  # 200 rows of 8
    assert found.trained_tokens == 200 * 200
    # Reading a conversation takes 2 s; the score stops at depth 15 of 22.
    assert found.seconds["score"] == pytest.approx(100 * 2 * 15 / 22)
    assert found.seconds["train"] == pytest.approx(200 * 2 * 1.5 * 3)
    assert found.total_seconds == pytest.approx(100 * 2 * 15 / 22 + 200 * 2 * 1.5 * 3 + 120)
    fewer = plan(SimpleNamespace(**{**vars(args), "max_steps": 5}), adapter=True, scores=False)
    assert (fewer.steps, fewer.trained_tokens) == (5, 5 * 8 * 200)
    assert fewer.seconds["train"] == pytest.approx(5 * 8 * 2 * 1.5 * 2.3)
    assert fewer.seconds["score"] == 0
    assert "score" not in " ".join(fewer.describe())


def test_the_output_head_by_hand():
    # 18 layers of 12 x 640 x 640 weights, and a head of 640 x 262,144.
    assert head_share(640, 18, 262_144) == pytest.approx(262_144 * 640 / (18 * 12 * 640**2))
