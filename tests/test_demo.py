"""The demo at its smoke size: every stage, resumed after a stop, refused where another run is."""

import json
from dataclasses import replace

import pytest

from ctxlens import demo
from ctxlens.errors import InputError, RunExistsError
from ctxlens.results import Ability, NeedleGrid, Scores, Selection, Verdicts

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
    assert {len(NeedleGrid.load(out / "needle.parquet")), len(NeedleGrid.load(out / "steering.parquet"))}
    scores, selection = Scores.load(out / "scores.parquet"), Selection.load(out / "selection.parquet")
    assert set(scores.frame["kind"]) <= {"document", "memory", "closed"}
    assert selection.meta["rule"]
    assert set(Ability.load(out / "ability.parquet").frame["model"]) == {"base", "vanilla", "indicator"}
    claims = [verdict.claim for verdict in Verdicts.load(out / "verdicts.json").verdicts]
    assert claims == ["loss", "role bias", "cause", "source", "cure"]
    timings = json.loads((out / "timings.json").read_text())
    assert timings.keys() == demo.STAGES.keys()
    assert all(stage["cpu_seconds"] >= 0 for stage in timings.values())


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
