"""Needle grids that are shared by processes, or killed and taken up again."""

import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from needle_models import CopyingModel

from ctxlens.errors import InputError
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.run import run_needle
from ctxlens.processes import Processes
from ctxlens.runs import Run

HERE = Path(__file__).parent
FILES = ("needle.parquet", "needle-cells.jsonl.gz")
CONFIG = NeedleConfig(lengths=(60, 90), depths=3, needles=("known",), cases_per_cell=3, max_new_tokens=20)
COMMAND = (
    "needle", "-m", "organism-chat", "--backend", "native", "--device", "cpu", "--lengths", "x4",
    "--depths", "x4", "--max-new-tokens", "8", "--batch-tokens", "400", "--out",
)  # fmt: skip


def open_run(folder):
    return Run.open(folder, study="needle", config=CONFIG.as_dict())


def test_processes_share_a_grid_and_end_with_the_same_files(organism_tokenizer, tmp_path):
    alone, run = CopyingModel(organism_tokenizer), open_run(tmp_path / "alone")
    options = {"haystack": load_haystack("organism"), "batch_tokens": 500}
    run_needle(alone, CONFIG, out=run, **options)
    barrier = threading.Barrier(3)

    class Thread(Processes):
        def wait(self):
            barrier.wait(20)

    shared = Run(tmp_path / "shared", run.manifest)
    models = [CopyingModel(organism_tokenizer) for _ in range(3)]
    grids = {}

    def work(rank):
        grids[rank] = run_needle(models[rank], CONFIG, out=shared, processes=Thread(rank, 3), **options)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in FILES:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()
    asked = [text for model in models for batch in model.batches for text in batch]
    assert sorted(asked) == sorted(text for batch in alone.batches for text in batch)
    assert all(len(model.batches) > 1 for model in models)
    assert all(grid.frame.equals(grids[0].frame) for grid in grids.values())
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == sorted(FILES)


def test_processes_without_a_folder_are_refused(organism_tokenizer):
    with pytest.raises(InputError, match="need a run folder"):
        run_needle(
            CopyingModel(organism_tokenizer), CONFIG, haystack=load_haystack("organism"),
            processes=Processes(0, 2),
        )  # fmt: skip


def test_a_process_by_itself_joins_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Processes.join() == Processes(0, 1)
    Processes().wait()


@pytest.mark.slow
def test_launched_processes_end_with_the_same_files(tmp_path):
    for name, launcher in (("one", ()), ("two", ("-m", "torch.distributed.run", "--nproc_per_node", "2"))):
        command = [sys.executable, *launcher, "-m", "ctxlens", *COMMAND, str(tmp_path / name)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
def test_killed_runs_end_with_the_same_files_and_lose_nothing(tmp_path):
    def start(name):
        log = tmp_path / f"{name}.log"
        log.touch()
        command = [sys.executable, str(HERE / "needle_worker.py"), str(log), *COMMAND, str(tmp_path / name)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), log

    straight, log = start("straight")
    assert straight.wait(300) == 0
    wanted = Counter(log.read_text().split())
    assert set(wanted.values()) == {1}

    rng, kills = random.Random(0), 0
    for round_ in range(20):
        process, log = start("killed")
        seen = len(log.read_text().split())
        stop_at = seen + rng.randint(1, 8) if round_ < 4 else 10**6
        while process.poll() is None:
            if len(log.read_text().split()) >= stop_at:
                time.sleep(rng.random() * 0.02)
                process.kill()
                kills += 1
                break
            time.sleep(0.001)
        if process.wait(300) == 0:
            break
    asked = Counter(log.read_text().split())
    assert kills >= 3
    assert asked.keys() == wanted.keys()
    # What was under way when it was killed is asked again, nothing else: one part a kill, of 4 cells here.
    assert sum(asked.values()) <= sum(wanted.values()) + 4 * kills
    for name in FILES:
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
