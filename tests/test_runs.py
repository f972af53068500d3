"""Run folders: what is resumed, refused and set aside."""

import json

import pytest

from ctxlens.errors import InputError, RunExistsError
from ctxlens.files import write_atomic
from ctxlens.runs import Run


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
    with pytest.raises(RunExistsError, match="no ctxlens run"):
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
