"""Readings of context use in a recipe: its keys, what is refused, the report, and two processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sft_cases import make_data

from ctxlens.errors import InputError
from ctxlens.report.collect import collect_runs
from ctxlens.report.context import context_blocks
from ctxlens.sft import read_recipe, train_from_config
from ctxlens.sft.context.budget import Budget
from ctxlens.sft.early import check_recipe

WORKER = Path(__file__).parent / "context_worker.py"


def write_recipe(folder, more=""):
    """Four steps on the organism, with a reading after every other one."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"id": c.id, "messages": c.messages}) for c in make_data()]
    (folder / "data.jsonl").write_text("\n".join(lines))
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: organism-chat\ndataset: {folder / 'data.jsonl'}\noutput_dir: {folder / 'out'}\n"
        "learning_rate: 1e-3\nmax_steps: 4\nper_device_train_batch_size: 2\nlogging_steps: 1\n"
        "use_cpu: true\ncontext: true\ncontext_every: 2\ncontext_texts: 2\ncontext_lengths: 120\n"
        f"disable_tqdm: true\n{more}"
    )
    return path


def readings(folder):
    lines = (folder / "context" / "readings.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ("context_share: 0\n", "context_share must be above 0 and at most 1, got 0.0"),
        ("context_every: 0\n", "context_every must be at least 1, got 0"),
        ("context_lengths: short\n", "context_lengths got 'short'"),
        ("context_lengths: 4000\n", "the model's window is 576 tokens"),
        ("context_stop_below: 2\n", "context_stop_below must be above 0 and below 1"),
        ("context_keep_best: loss\n", "context_keep_best names 'loss', which is not measured"),
        (
            "context_keep_best: closed_book\ncontext: false\n",
            "context_keep_best has no effect",
        ),
    ],
)
def test_keys_that_cannot_be_used_are_refused_before_the_model_is_loaded(tmp_path, more, complaint):
    with pytest.raises(InputError, match=complaint):
        check_recipe(read_recipe(write_recipe(tmp_path, more)))


def test_a_model_without_chat_template_has_nothing_to_compare(tmp_path):
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("organism-chat", str(tmp_path / "bare")))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    (tmp_path / "bare" / "model.safetensors").write_text("")
    with pytest.raises(InputError, match="has no chat template, so that context: true"):
        check_recipe(read_recipe(recipe))


def test_a_recipe_takes_readings_that_the_report_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(Budget, "allows", lambda self, seconds: True)
    monkeypatch.setattr(Budget, "allows_first", lambda self, seconds, planned: True)
    monkeypatch.setattr(Budget, "affordable", lambda self, per_round, planned, most: most)
    out = train_from_config(write_recipe(tmp_path))
    assert [line["step"] for line in readings(out)] == [0, 2, 4]
    for folder in (out, out / "context"):
        figures, table = context_blocks(collect_runs([folder])[0])
        assert "2 texts" in figures.caption
        assert "of the training's time" in figures.caption
        assert table.head[:3] == ["step", "recall without template", "recall with template"]
        assert [row[0].text for row in table.rows] == ["0", "2", "4"]


def test_a_run_without_readings_has_no_section(tmp_path):
    (tmp_path / "manifest.json").write_text('{"study": "train"}')
    assert context_blocks(collect_runs([tmp_path])[0]) == []
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "readings.jsonl").write_text('{"step": 0, "error": "too short"}\n')
    (note,) = context_blocks(collect_runs([tmp_path])[0])
    assert note.text == "No reading at step 0: too short"


@pytest.mark.slow
def test_two_processes_share_the_texts_of_a_reading(tmp_path):
    """The same readings as one process takes, with every text asked once."""
    two_processes = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29741"]
    for name, launch in (("one", []), ("two", two_processes)):
        recipe = write_recipe(tmp_path / name)
        words = [] if name == "one" else ["--per_device_train_batch_size", "1"]
        subprocess.run(
            [sys.executable, *launch, str(WORKER), "--config", str(recipe), *words],
            check=True,
            capture_output=True,
        )
    one, two = (readings(tmp_path / name / "out") for name in ("one", "two"))
    assert [line["step"] for line in two] == [0, 2, 4]
    assert [line["texts"] for line in two] == [2, 2, 2]
    for ours, theirs in zip(two[0]["by_text"], one[0]["by_text"], strict=True):
        assert ours == pytest.approx(theirs)
    for key in ("recall_plain", "user_share_template", "closed_book"):
        assert two[-1][key] == pytest.approx(one[-1][key], abs=0.05)
