"""Several checkpoints: steps in names, changes by hand, the figure, the page and the command."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import ctxlens as cl
from ctxlens.auditing import run, several
from ctxlens.auditing.plan import Frame
from ctxlens.auditing.ready import Ready
from ctxlens.auditing.speed import Speed
from ctxlens.chat.roles import N_ROLES, Role
from ctxlens.cli import app
from ctxlens.errors import InputError
from ctxlens.report.plots.checkpoints import checkpoint_curves
from ctxlens.results import Checkpoints, NeedleGrid, RoleAllocation
from ctxlens.results.audit import PLAIN, TEMPLATE
from ctxlens.results.checkpoints import Checkpoint, compare_checkpoints, read_change
from ctxlens.results.steps import Step, find_step, order_checkpoints
from ctxlens.stats import Interval

# Steps in names.


@pytest.mark.parametrize(
    ("name", "number", "unit"),
    [
        ("out/checkpoint-500", 500, "step"),
        ("step_1000", 1000, "step"),
        ("global_step2000", 2000, "step"),
        ("step1000-unsharded", 1000, "step"),
        ("ckpt-10k", 10_000, "step"),
        ("ckpt-1.5k/hf", 1500, "step"),
        ("epoch-3", 3, "epoch"),
        ("iter_0001000", 1000, "step"),
        ("owner/repo@step1000", 1000, "step"),
        ("stage1-step1000-tokens5B", 1000, "step"),
        ("epoch-3-step-1000", 1000, "step"),
        ("checkpoint-10/checkpoint-20", 20, "step"),
    ],
)
def test_steps_are_recognised(name, number, unit):
    assert find_step(name) == Step(float(number), unit)


@pytest.mark.parametrize("name", ["final", "llama-3", "SmolLM2-135M", "footstep5", "step", "step5b"])
def test_names_without_steps(name):
    assert find_step(name) is None


def test_checkpoints_are_ordered_by_step_and_not_by_letters():
    assert order_checkpoints(["c-step-1000", "a-step-200", "b-step-30"]) == [
        "b-step-30", "a-step-200", "c-step-1000",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "names", [["step-2", "final", "step-1"], ["step-2", "epoch-1"], ["b/step-2", "a/step-2", "a/step-1"]]
)
def test_names_whose_steps_cannot_be_compared_keep_their_order(names):
    assert order_checkpoints(names) == names


def test_folders_tell_checkpoints_apart():
    assert several.name_folders(["x/step-1", "x/step_2"]) == {"x/step-1": "step-1", "x/step_2": "step-2"}
    assert list(several.name_folders(["x/last", "y/last"]).values()) == ["x-last", "y-last"]
    with pytest.raises(InputError, match="twice"):
        several.name_folders(["a", "a"])


def test_revisions_of_the_hub(tmp_path):
    assert several.split_revision("owner/repo@step1000") == ("owner/repo", "step1000")
    assert several.split_revision("owner/repo") == ("owner/repo", None)
    (tmp_path / "repo@step1").mkdir()
    assert several.split_revision(str(tmp_path / "repo@step1"))[1] is None


# Values and changes by hand.


def make_checkpoint(name, plain, template, user=(0.6, 0.4), tokens=100):
    """A checkpoint with one question per text and these recalls; the user's shares hold for all texts."""
    rows = [
        {
            "model": name, "condition": condition, "indicator": False, "alpha": 1.0, "heads": "none",
            "draw": 0, "cell": cell, "needle": "n", "context_tokens": 100, "prompt_tokens": tokens,
            "depth_percent": 50.0, "response": "", "recall": value, "memory_recall": math.nan, "case": cell,
        }
        for condition, values in ((PLAIN, plain), (TEMPLATE, template))
        for cell, value in enumerate(values)
    ]  # fmt: skip
    return Checkpoint(
        name, NeedleGrid.from_rows(rows), (shares(user[0], len(plain)), shares(user[1], len(plain)))
    )


def shares(user, n):
    values = np.zeros((1, 1, n, N_ROLES), dtype=np.float32)
    values[..., Role.USER], values[..., Role.ASSISTANT] = user, 1 - user
    labels = tuple(f"cell {i}" for i in range(n))
    return RoleAllocation(
        values, np.ones((n, N_ROLES)), (0,), labels, "first_answer", {}, np.zeros_like(values)
    )


def test_values_and_changes_by_hand():
    found = compare_checkpoints([
        make_checkpoint("step-10", [1.0] * 12, [1.0] * 12, (0.6, 0.6)),
        make_checkpoint("step-20", [1.0] * 12, [0.5] * 12, (0.6, 0.4)),
    ])  # fmt: skip
    assert found.models == ["step-10", "step-20"]
    assert found.steps == ([10.0, 20.0], "step")
    assert [one.estimate for one in found.values("recall with template")] == [1.0, 0.5]
    assert [one.estimate for one in found.values("loss")] == [0.0, -0.5]
    assert [one.estimate for one in found.values("bias")] == pytest.approx([0.0, -0.2])
    ((loss, reading),) = found.changes("loss")
    assert (loss.estimate, loss.n, reading) == (-0.5, 12, "lower")
    assert [reading for _, reading in found.changes("recall without template")] == ["no change"]
    assert found.changes("bias")[0][1] == "lower"


def test_changes_are_paired_over_the_texts_that_both_were_asked():
    """The second checkpoint was cut short: only the first ten texts are compared."""
    found = compare_checkpoints([
        make_checkpoint("a", [0.0] * 10 + [1.0] * 10, [0.0] * 20),
        make_checkpoint("b", [0.0] * 10, [0.0] * 10),
    ])  # fmt: skip
    change, reading = found.changes("recall without template")[0]
    assert (change.estimate, change.n, reading) == (0.0, 10, "no change")
    assert found.steps is None


def test_other_texts_are_not_paired():
    found = compare_checkpoints([
        make_checkpoint("a", [1.0] * 12, [1.0] * 12), make_checkpoint("b", [0.0] * 12, [0.0] * 12, tokens=99)
    ])  # fmt: skip
    change, reading = found.changes("loss")[0]
    assert math.isnan(change.estimate)
    assert reading == "other texts"


@pytest.mark.parametrize(
    ("low", "high", "n", "reading"),
    [
        (0.01, 0.30, 12, "higher"),
        (-0.30, -0.01, 12, "lower"),
        (-0.09, 0.09, 12, "no change"),
        (-0.11, 0.05, 12, "undecided"),
        (0.20, 0.30, 9, "undecided"),
        (math.nan, math.nan, 12, "undecided"),
    ],
)
def test_readings(low, high, n, reading):
    assert read_change(Interval(0.0, low, high, n), 0.1) == reading


# The figure and the file.


@pytest.fixture
def table():
    return compare_checkpoints([
        make_checkpoint("step-10", [1.0] * 12, [1.0] * 12),
        make_checkpoint("step-2000", [0.9, 0.7] * 6, [0.5, 0.1] * 6),
    ], {"folders": {"step-10": "step-10"}, "failed": {"step-5": "It is <damaged>."}})  # fmt: skip


def test_the_figure_shows_every_quantity_with_its_interval(table):
    figure = checkpoint_curves(table)
    assert [list(trace.x) for trace in figure.data] == [[10.0, 2000.0]] * 4
    recall = figure.data[1]
    assert list(recall.y) == [1.0, 0.3]
    low = table.values("recall with template")[1].low
    assert recall.error_y.arrayminus[1] == pytest.approx(0.3 - low, abs=1e-3)
    assert figure.layout.xaxis.type == "log"
    assert figure.layout.xaxis3.title.text == "step"


def test_names_without_steps_are_categories():
    table = compare_checkpoints([make_checkpoint(name, [1.0] * 12, [1.0] * 12) for name in ("z", "a")])
    figure = checkpoint_curves(table)
    assert list(figure.data[0].x) == ["z", "a"]
    assert figure.layout.xaxis.type == "category"


def test_the_table_survives_its_file_and_is_drawn(table, tmp_path: Path):
    again = cl.load_result(table.save(tmp_path / "checkpoints.parquet"))
    assert isinstance(again, Checkpoints)
    assert again.frame.equals(table.frame)
    assert again.meta == table.meta
    assert list(again.overview()["loss"]) == [0.0, -0.5]
    assert len(again.figure().data) == 4


def test_the_page_links_to_the_page_of_every_checkpoint(table, tmp_path):
    made = cl.runs.Run.open(tmp_path / "all", study="checkpoints", config={})
    made.save("checkpoints.parquet", table)
    page = cl.report.write_report([made.folder], tmp_path / "all" / "report.html").read_text(encoding="utf-8")
    assert '<a href="step-10/report.html">step-10</a>' in page
    assert "after step-10" in page
    assert "step-5 was not measured: It is &lt;damaged&gt;." in page
    assert "Not in this run" not in page


# The audit of several checkpoints.


@pytest.fixture
def small(monkeypatch):
    """An audit of a few seconds, whatever the budget."""
    lengths = itertools.count(140, 20)

    def plan(frame: Frame, given=None):
        made = frame.plan([next(lengths)], 4, alphas=(), draws=0, controls=False)
        return replace(made, role_texts=4)

    monkeypatch.setattr(run, "make_plan", plan)


def test_all_checkpoints_follow_the_plan_of_the_first_and_one_failure_stops_nothing(small, tmp_path):
    out = tmp_path / "all"
    words = ["audit", str(tmp_path / "none"), "organism-chat", "organism", "--budget", "1m", "-o", str(out)]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 2
    assert f"{tmp_path / 'none'} was not audited: model " in result.stderr.splitlines()[-1]
    found = json.loads(result.stdout)
    assert [one["given"] for one in found["models"]] == ["organism-chat", "organism"]
    assert [one["plan"]["lengths"] for one in found["models"]] == [[140], [140]]
    assert {row["model"] for row in found["comparison"]} == {"organism-chat", "organism"}
    assert {row["change_n"] for row in found["comparison"] if row["model"] == "organism"} == {4}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert '<a href="organism/report.html">organism</a>' in page
    assert (out / "organism" / "report.html").is_file()

    again = CliRunner().invoke(app, ["audit", *words[2:]])  # finished: only the tables are printed again
    assert again.exit_code == 0, again.output
    assert "change from the checkpoint before" in again.stdout


def test_audit_takes_a_list(small, tmp_path):
    found = cl.audit(["organism-chat", str(tmp_path / "none")], budget=1, out=tmp_path / "all")
    assert list(found.audits) == ["organism-chat"]
    assert list(found.failed) == [str(tmp_path / "none")]
    assert found.comparison is not None
    assert list(found.overview()["model"]) == ["organism-chat"]
    with pytest.raises(InputError, match="a model is given twice"):
        cl.audit(["organism", "organism"], out=tmp_path / "twice")


def test_where_every_checkpoint_fails_the_folder_stays_free(tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint could be audited: .*neither a folder"):
        cl.audit([str(tmp_path / "a"), str(tmp_path / "b")], out=tmp_path / "all")
    assert not (tmp_path / "all").exists()


READY = Ready("a model", 400, 0, (), (0.0, 0.0), Speed(0.01, 0.0, 1.0, 1.0, 1.0))


def test_weights_are_freed_before_the_next_checkpoint_is_loaded(tmp_path):
    alive: list[str] = []

    class Weights:
        def __init__(self, name):
            assert alive == []
            self.name = name
            alive.append(name)

        def __del__(self):
            alive.remove(self.name)

    def one(name, folder, plan):
        weights = Weights(name)
        weights.cycle = weights  # only the garbage collector frees it
        return cl.Audit(folder, READY, Frame(READY.speed, 60.0, 400).plan([140], 4, alphas=(), draws=0))

    found = several.audit_several(["step-2", "step-1", "step-3"], one, out=tmp_path / "run", config={})
    assert list(found.audits) == ["step-1", "step-2", "step-3"]
