"""Run folders: what is resumed, refused and set aside."""

import json
from pathlib import Path

import pytest

from ctxlens.errors import InputError, RunExistsError
from ctxlens.files import write_atomic
from ctxlens.runs import PartFormat, Parts, Run, digest


def test_the_same_run_is_resumed_and_another_is_refused(tmp_path):
    first = Run.open(tmp_path / "run", study="needle", config={"seed": 0})
    first.write_json("a.json", [1])
    assert Run.open(tmp_path / "run", study="needle", config={"seed": 0}).read_json("a.json") == [1]
    with pytest.raises(RunExistsError, match="other settings: seed"):
        Run.open(tmp_path / "run", study="needle", config={"seed": 1})


def test_what_is_recorded_later_stands_in_the_manifest_and_is_not_compared(tmp_path):
    run = Run.open(tmp_path / "run", study="eval", config={"seed": 0}).record("data", {"a": 1})
    again = Run.open(tmp_path / "run", study="eval", config={"seed": 0})
    assert again.manifest == run.manifest
    assert again.manifest["data"] == {"a": 1}
    assert again.manifest["created"]
    for key in ("first", "second"):
        again.record(key, 1)
    assert {"data", "first", "second"} < set(Run.read(tmp_path / "run").manifest)


def test_overwriting_sets_the_old_run_aside_whole(tmp_path):
    for seed in range(3):
        run = Run.open(tmp_path / "run", study="demo", config={"seed": seed}, overwrite=True)
        run.write_json("vanilla/train.json", seed)
    kept = {
        name: json.loads((tmp_path / name / "vanilla/train.json").read_text())
        for name in ("run.old", "run.old2")
    }
    assert kept == {"run.old": 0, "run.old2": 1}
    assert Run.read(tmp_path / "run").read_json("vanilla/train.json") == 2


def test_a_folder_of_something_else_is_never_touched(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(RunExistsError, match="not a ctxlens run"):
        Run.open(tmp_path, study="needle", config={}, overwrite=True)
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


def test_a_broken_manifest_and_a_folder_in_place_of_a_file_are_said(tmp_path):
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(InputError, match="run manifest"):
        Run.read(tmp_path)
    with pytest.raises(InputError, match="it is a folder"):
        write_atomic(tmp_path, b"x")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_atomic(tmp_path / "a" / "b.txt", "old")
    with pytest.raises(ZeroDivisionError):
        write_atomic(path, lambda place: 1 / 0)
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["b.txt"]


def test_a_digest_depends_on_values_and_not_on_their_order():
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": (2, 3), "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest({}) == "44136fa355b3678a"  # the first half of the SHA-256 of "{}"


def open_run(folder):
    return Run.open(folder, study="parts", config={})


def test_finished_parts_are_not_computed_again_after_a_restart(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"answer": 42}

    for _ in range(2):
        parts = Parts(open_run(tmp_path / "run"), "result", {"seed": 0})
        assert parts.get("3", compute) == {"answer": 42}
    assert len(calls) == 1
    assert not parts.has("4")


def test_parts_of_other_settings_and_of_other_runs_are_never_taken(tmp_path):
    Parts(open_run(tmp_path / "run"), "result", {"seed": 0}).write("0", "mine")
    run = open_run(tmp_path / "run")
    assert not Parts(run, "result", {"seed": 1}).has("0")
    assert not Parts(run, "other", {"seed": 0}).has("0")
    later = Run(run.folder, {**run.manifest, "created": "later"})
    assert not Parts(later, "result", {"seed": 0}).has("0")
    assert Parts(run, "result", {"seed": 0}).read("0") == "mine"


def test_parts_without_a_run_are_kept_in_memory():
    parts = Parts(None, "result", {})
    assert parts.get("0", lambda: 1) == 1
    assert parts.get("0", lambda: 2) == 1
    assert parts.side_path("0", "cache") is None
    parts.remove()
    assert not parts.has("0")


def test_parts_take_another_format_and_leave_nothing_behind(tmp_path):
    form = PartFormat(".txt", lambda value, path: path.write_text(value), lambda path: path.read_text())
    run = open_run(tmp_path / "run")
    parts = Parts(run, "result", {}, form=form)
    side = parts.side_path("0", "cache")
    side.write_text("half")
    other = parts.side_path("00", "cache")
    other.write_text("half")
    parts.write("0", "whole")
    assert (parts.read("0"), side.exists(), other.exists()) == ("whole", False, True)
    parts.remove()
    assert [path.name for path in run.folder.iterdir()] == ["manifest.json"]


def test_a_part_that_cannot_be_written_leaves_no_half_file(tmp_path):
    def fail(value, path):
        path.write_text("half")
        raise KeyboardInterrupt

    parts = Parts(open_run(tmp_path / "run"), "r", {}, form=PartFormat(".txt", fail, Path.read_text))
    with pytest.raises(KeyboardInterrupt):
        parts.write("0", "whole")
    assert not parts.has("0")
    assert [path for path in (tmp_path / "run" / "parts").rglob("*") if path.is_file()] == []


def test_parts_in_a_folder_with_a_fixed_name_are_shared_by_runs_and_lie_at_their_path(tmp_path):
    run = open_run(tmp_path / "run")
    Parts.in_folder(run, "shards").write("000001", {"a": 1})
    later = Parts.in_folder(run.record("created", "later"), "shards")
    assert later.path("000001") == tmp_path / "run" / "shards" / "000001.json"
    assert later.read("000001") == {"a": 1}
    assert not later.has("000000")
    later.remove()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["manifest.json"]


def test_parts_in_memory_have_no_path():
    with pytest.raises(ValueError, match="kept in memory have no files"):
        Parts(None, "result", {}).path("0")
