"""A cure that is killed in every stage ends like one that was left alone."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pandas.testing import assert_frame_equal

from ctxlens.organism import load_world
from ctxlens.organism.recipe import SHARES
from ctxlens.results import Checkpoints, Scores, Selection

KEYS = (
    "max_steps=8",
    "per_device_train_batch_size=4",
    "gradient_accumulation_steps=1",
    "save_steps=2",
    "logging_steps=1",
)


def start(folder: Path, name: str) -> subprocess.Popen:
    worker = Path(__file__).parent / "cure_worker.py"
    command = [
        sys.executable, str(worker), "cure", "organism", "--dataset", str(folder / "data.jsonl"), "--quiet",
        "--budget", "60m", "--top-share", "0.3", "--device", "cpu", "-o", str(folder / name), *KEYS,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_after(process: subprocess.Popen, timings: Path, stages: int, delay: float) -> bool:
    """Kill the process when so many stages are finished and a little later; False if it ended before."""
    while process.poll() is None:
        if timings.is_file() and len(json.loads(timings.read_text())) >= stages:
            time.sleep(delay)
            process.kill()
            process.wait(60)
            return process.returncode == -9
        time.sleep(0.01)
    return False


@pytest.mark.slow
def test_a_cure_that_is_killed_ends_the_same(tmp_path):
    talks = load_world().conversations(40, seed=0, **SHARES)
    lines = [json.dumps({"id": talk.id, "messages": list(talk.messages)}) for talk in talks]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    straight = start(tmp_path, "straight")
    assert straight.wait(500) == 0, straight.stderr.read()

    rng, killed = random.Random(0), tmp_path / "killed"
    n_kills = 0
    for stages in (1, 2, 3, 3, 4, 5):  # after scoring, selecting, the audit before, in the training, ...
        n_kills += kill_after(start(tmp_path, "killed"), killed / "timings.json", stages, rng.random() * 2)
    assert n_kills >= 4
    last = start(tmp_path, "killed")
    assert last.wait(500) == 0, last.stderr.read()
    one, two = tmp_path / "straight", killed
    for name, kind in (("scores", Scores), ("selection", Selection)):
        first, second = (kind.load(folder / f"{name}.parquet").frame for folder in (one, two))
        assert first.equals(second), name
    tables = [Checkpoints.load(folder / "cure.parquet").frame for folder in (one, two)]
    assert_frame_equal(*tables, check_exact=False, rtol=0, atol=1e-4)  # a resumed training rounds otherwise
    logs = [json.loads((folder / "train" / "train.json").read_text())["log"] for folder in (one, two)]
    losses = [[step["loss"] for step in log] for log in logs]
    assert len(losses[0]) == 8
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
