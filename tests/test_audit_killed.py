"""An audit that is killed at any moment ends like one that was left alone."""

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ctxlens.results import Ability, NeedleGrid, RoleAllocation, Verdicts

COMMAND = ("audit", "organism-chat", "--budget", "60m", "--device", "cpu", "--quiet", "-o")
KILLS = 5
TABLES = ("needle.parquet", "steering.parquet", "stages/controls.parquet", "stages/steering-plain.parquet")


def start(folder: Path, name: str) -> tuple[subprocess.Popen, Path]:
    log = folder / f"{name}.log"
    log.touch()
    worker = Path(__file__).parent / "audit_worker.py"
    command = [sys.executable, str(worker), str(log), *COMMAND, str(folder / name)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), log


def kill_after(process: subprocess.Popen, log: Path, batches: int, delay: float) -> bool:
    """Kill the process when so many batches have begun and a little later; False if it ended before."""
    while process.poll() is None:
        if len(log.read_text().split()) >= batches:
            time.sleep(delay)
            process.kill()
            process.wait(60)
            return process.returncode == -9
        time.sleep(0.002)
    return False


def check_same_results(one: Path, two: Path) -> None:
    assert Verdicts.load(one / "verdicts.json").verdicts == Verdicts.load(two / "verdicts.json").verdicts
    for name in TABLES:
        assert NeedleGrid.load(one / name).frame.equals(NeedleGrid.load(two / name).frame), name
    tables = [Ability.load(folder / "ability.parquet").frame for folder in (one, two)]
    assert tables[0].equals(tables[1])
    assert (one / "stages/heads.json").read_bytes() == (two / "stages/heads.json").read_bytes()
    views = sorted(path.name for path in one.glob("allocation-*"))
    assert len(views) == 2
    for name in views:
        first, second = (RoleAllocation.load(folder / name) for folder in (one, two))
        assert (first.shares == second.shares).all()
        assert first.query_labels == second.query_labels


@pytest.mark.slow
def test_an_audit_killed_five_times_ends_the_same_and_repeats_a_batch_per_kill(tmp_path):
    straight, log = start(tmp_path, "straight")
    assert straight.wait(500) == 0
    wanted = Counter(log.read_text().split())
    assert set(wanted.values()) == {1}

    rng = random.Random(0)
    moments = sorted(rng.sample(range(1, len(wanted)), KILLS))
    for number, moment in enumerate(moments):  # each kill so far has repeated one batch at most
        process, log = start(tmp_path, "killed")
        assert kill_after(process, log, moment + number, rng.random() * 0.05)
    assert not (tmp_path / "killed" / "verdicts.json").exists()
    process, log = start(tmp_path, "killed")
    assert process.wait(500) == 0
    asked = Counter(log.read_text().split())
    assert asked.keys() == wanted.keys()
    assert asked.total() <= wanted.total() + KILLS
    check_same_results(tmp_path / "straight", tmp_path / "killed")
