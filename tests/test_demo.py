"""The demo at its smoke size: every stage, resumed after a stop, refused where another run is."""

import json
from dataclasses import replace

import pytest

from ctxlens import demo
from ctxlens.errors import InputError, RunExistsError
from ctxlens.results import Ability, NeedleGrid, RoleAllocation, Scores, Selection, Verdicts
from ctxlens.runs import Run

TINY = replace(demo.SMOKE, lengths=(64,), conversations=48, steps=2, questions=6, alphas=(0.3,))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo that was interrupted in the middle and started again, with the stages of both runs."""
    out = tmp_path_factory.mktemp("demo") / "run"
    seen: list[list[str]] = [[], []]

    def stop_at_source(stage, done, total):
        seen[0].append(stage)
        if stage == "source":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SMOKE", TINY)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(out, smoke=True, device="cpu", progress=stop_at_source)
        written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
        report = demo.run_demo(
            out, smoke=True, device="cpu", progress=lambda stage, done, total: seen[1].append(stage)
        )
    return out, report, written, seen


def test_every_stage_leaves_its_results(finished):
    out, report, _, seen = finished
    assert report == out / "report.html"
    assert "<html" in report.read_text(encoding="utf-8")
    assert list(dict.fromkeys(seen[1])) == list(demo.STAGES)
    # 1 length x 2 depths x 2 needles x 2 conditions; base, vanilla, and indicator asked in two ways
    grid = NeedleGrid.load(out / "needle.parquet")
    assert len(grid) == 1 * 2 * 2 * 2 * 4
    assert set(zip(grid.frame["model"], grid.frame["indicator"], strict=True)) == {
        ("base", False), ("vanilla", False), ("indicator", True), ("indicator", False),
    }  # fmt: skip
    assert set(grid.frame["condition"]) == {"plain+prefix", "template+prefix"}
    sweep = NeedleGrid.load(out / "steering.parquet").frame
    assert set(sweep["condition"]) == {"template+prefix"}
    assert set(sweep["alpha"]) == {1.0, 0.3}
    assert set(sweep["heads"]) >= {"all", "retrieval", "random"}
    assert not sweep.duplicated(["cell", "heads", "alpha", "draw"]).any()
    scores, selection = Scores.load(out / "scores.parquet"), Selection.load(out / "selection.parquet")
    assert set(scores.frame["kind"]) == {"document", "memory", "closed"}
    assert selection.meta["rule"].startswith("score in the highest of up to three groups")
    for name in ("base", "vanilla"):
        for condition in ("plain", "template"):
            allocation = RoleAllocation.load(out / f"allocation-{name}-{condition}.safetensors")
            assert (allocation.meta["model"], allocation.meta["condition"]) == (name, condition)
            assert len(allocation.query_labels) == 2  # the cells of the known needle
    assert set(Ability.load(out / "ability.parquet").frame["model"]) == {"base", "vanilla", "indicator"}
    claims = [verdict.claim for verdict in Verdicts.load(out / "verdicts.json").verdicts]
    assert claims == ["loss", "role bias", "cause", "source", "cure"]
    timings = json.loads((out / "timings.json").read_text())
    assert timings.keys() == demo.STAGES.keys()
    assert {name: stage["what"] for name, stage in timings.items()} == dict(demo.STAGES)
    assert sum(stage["cpu_seconds"] for stage in timings.values()) > 1  # trains twice


def test_a_stopped_demo_goes_on_from_its_finished_stages(finished):
    out, _, written, seen = finished
    kept = ("vanilla/model.safetensors", "stages/needle-base.parquet", "steering.parquet")
    for name in kept:
        assert (out / name).stat().st_mtime_ns == written[out / name], f"{name} was made again"
    assert "cure" not in seen[0]


def test_another_demo_in_the_same_folder_is_refused(finished):
    out = finished[0]
    with pytest.raises(RunExistsError, match="already holds another run"):
        demo.run_demo(out, smoke=True, seed=7)


def test_a_threshold_outside_its_range_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="0 to 1"):
        demo.run_demo(tmp_path / "run", smoke=True, threshold=1.5)
    assert not (tmp_path / "run").exists()


def count_stages(log):
    """Two stages that log their work; the second one always runs."""

    def work(name):
        def run(shared, tell):
            log.append((name, shared))
            tell(1, 3)

        return run

    return (
        demo.Stage("first", "the first", work("first")),
        demo.Stage("last", "the last", work("last"), always=True),
    )


def test_stages_run_in_order_once_and_report_their_progress(tmp_path):
    run = Run.open(tmp_path / "run", study="stages", config={})
    log, seen = [], []
    demo.run_stages(run, count_stages(log), "bench", lambda *told: seen.append(told))
    assert log == [("first", "bench"), ("last", "bench")]
    assert seen == [
        ("first", 0, 1), ("first", 1, 3), ("first", 3, 3), ("last", 0, 1), ("last", 1, 3), ("last", 3, 3),
    ]  # fmt: skip
    assert run.read_json("timings.json").keys() == {"first", "last"}
    log.clear(), seen.clear()
    demo.run_stages(run, count_stages(log), "bench", lambda *told: seen.append(told))
    assert log == [("last", "bench")]
    assert seen[:2] == [("first", 0, 1), ("first", 1, 1)]


def test_a_stage_that_fails_is_not_recorded(tmp_path):
    run = Run.open(tmp_path / "run", study="stages", config={})

    def fail(shared, tell):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.run_stages(run, [demo.Stage("first", "the first", fail)], None)
    assert not run.has("timings.json")
