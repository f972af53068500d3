"""No work is lost: killed runs, damaged shards, several processes, jobs that do not wait for one another."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scoring_cases import FakeModel, many

import ctxlens.scoring.whole as whole
from ctxlens.chat.data import write_conversations
from ctxlens.errors import InputError, RunExistsError
from ctxlens.processes import Processes
from ctxlens.results import Scores
from ctxlens.runs import Run
from ctxlens.scoring import Settings, merge_shards, score_conversations, score_to_run

SIZE = 10


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(whole, "SHARD_CONVERSATIONS", SIZE)


def open_run(folder):
    return Run.open(folder, study="score", config={})


def scores_file(folder):
    return (folder / "scores.parquet").read_bytes()


def test_the_plan_keeps_its_value_so_that_earlier_runs_resume(toy_tokenizer, monkeypatch):
    monkeypatch.setattr(whole, "SHARD_CONVERSATIONS", 512)
    model = FakeModel(toy_tokenizer, n_layers=22)
    model.identity = {"name": "fake", "revision": "1"}
    kinds = {("b", 1): "memory", ("a", 3): "document"}
    settings = Settings((0, 1), 2048, 1024, "float32", kinds)
    # Written by the version that introduced the plan; a run folder holds this value in every shard.
    earlier = "0d38c08bd0cf2404d2051a635d825f0046e199c43a140ab69fd83134891a1a10"
    assert whole._head(model, settings)["plan"] == earlier
    reordered = Settings((0, 1), 2048, 8192, "float32", dict(reversed(kinds.items())))
    assert whole._head(model, reordered)["plan"] == earlier
    other = Settings((0, 1), 2048, 1024, "float32", {("b", 1): "closed", ("a", 3): "document"})
    assert whole._head(model, other)["plan"] != earlier


def start(work):
    """The id of a process of its own that does some work and ends with 0."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def test_killed_at_random_moments_it_ends_with_the_same_file(toy_tokenizer, tmp_path):
    n, kills = 60, 0
    chance = random.Random(0)
    log, folder = tmp_path / "scored", tmp_path / "killed"
    open_run(folder)

    def work():
        with log.open("ab", buffering=0) as file:
            model = FakeModel(toy_tokenizer, pause=0.01, on_batch=lambda batch: file.write(b"." * len(batch)))
            score_conversations(model, many(n), out=open_run(folder), batch_tokens=200)

    for _ in range(12):
        finished = len(list(folder.glob("score-shards/[0-9]*.parquet")))
        before = log.stat().st_size if log.exists() else 0
        child = start(work)
        time.sleep(chance.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        scored = log.stat().st_size - before if log.exists() else 0
        if status == 0:
            break
        kills += 1
        assert scored <= n - finished * SIZE, "a finished shard was scored again"
    assert kills >= 3
    assert os.waitpid(start(work), 0)[1] == 0
    assert n <= log.stat().st_size <= n + kills * SIZE, "more than the shard in flight was scored twice"
    score_conversations(FakeModel(toy_tokenizer), many(n), out=open_run(tmp_path / "whole"), batch_tokens=200)
    assert scores_file(folder) == scores_file(tmp_path / "whole")
    # A kill in the middle of a write leaves its temporary file, which nothing reads.
    kept = sorted(path.name for path in folder.iterdir() if path.suffix != ".tmp")
    assert kept == ["manifest.json", "scores.parquet", "skipped.json"]


def stop_before_merging(model, data, run):
    """Score all shards as one job of a single part would, and leave them unmerged."""
    score_to_run(model, data, Settings.of(model), run, part=(0, 2))
    score_to_run(model, data, Settings.of(model), run, part=(1, 2))


@pytest.mark.parametrize("damage", ["half", "flipped", "empty", "other"])
def test_damaged_shard_is_named_and_scored_again(toy_tokenizer, tmp_path, damage):
    run = open_run(tmp_path / "run")
    stop_before_merging(FakeModel(toy_tokenizer), many(35), run)
    shard = run.path("score-shards/000001.parquet")
    content = bytearray(shard.read_bytes())
    if damage == "flipped":  # in the middle of the data: only a checksum notices
        content[len(content) // 5] ^= 0xFF
    shard.write_bytes(
        {"half": content[: len(content) // 2], "flipped": content, "empty": b"", "other": b"x"}[damage]
    )
    model, told = FakeModel(toy_tokenizer), []
    score_to_run(model, many(35), Settings.of(model), run, notice=told.append)
    assert len(told) == 1
    assert "scoring a damaged shard again" in told[0]
    assert "000001.parquet" in told[0]
    assert sum(map(len, model.batches)) == SIZE  # that shard alone
    whole_frame = score_conversations(FakeModel(toy_tokenizer), many(35)).frame
    assert Scores.load(run.path("scores.parquet")).frame.equals(whole_frame)


def test_unfinished_scores_of_something_else_are_refused(toy_tokenizer, tmp_path):
    run = open_run(tmp_path / "run")
    model = FakeModel(toy_tokenizer)
    score_to_run(model, many(35), Settings.of(model), run, part=(0, 2))
    other = FakeModel(toy_tokenizer)
    other.identity = {"name": "other"}
    for data, by in ((many(35)[::-1], model), (many(35), other)):
        with pytest.raises(RunExistsError, match="unfinished scores of other conversations, another model"):
            score_conversations(by, data, out=run)


def test_jobs_that_do_not_wait_are_merged_at_the_end(toy_tokenizer, tmp_path):
    run, model = open_run(tmp_path / "parts"), FakeModel(toy_tokenizer)
    with pytest.raises(InputError, match=r"no part of the scoring in .* is finished"):
        merge_shards(run)
    for part in ((2, 3), (0, 3)):
        assert score_to_run(model, many(45), Settings.of(model), run, part=part) is None
    with pytest.raises(InputError, match=r"2 of 5 shards are missing in .* \(1, 4\)"):
        merge_shards(run)
    score_to_run(model, many(45), Settings.of(model), run, part=(1, 3))
    assert sum(map(len, model.batches)) == 45
    meta = merge_shards(run)
    assert merge_shards(run) == meta
    score_conversations(FakeModel(toy_tokenizer), many(45), out=open_run(tmp_path / "whole"))
    assert scores_file(tmp_path / "parts") == scores_file(tmp_path / "whole")


def test_two_processes_write_the_file_of_one(toy_tokenizer, tmp_path):
    barrier = multiprocessing.get_context("fork").Barrier(2)

    class Pair(Processes):
        def wait(self):
            barrier.wait(60)

    def work(rank):
        model = FakeModel(toy_tokenizer)
        meta = score_to_run(model, many(45), Settings.of(model), run, processes=Pair(rank, 2))
        assert meta["conversations"] == 45
        return sum(map(len, model.batches))

    run = open_run(tmp_path / "pair")
    child = start(lambda: work(1))
    assert work(0) == 25  # shards 0, 2 and the half one, 4
    assert os.waitpid(child, 0)[1] == 0
    score_conversations(FakeModel(toy_tokenizer), many(45), out=open_run(tmp_path / "whole"))
    assert scores_file(tmp_path / "pair") == scores_file(tmp_path / "whole")


@pytest.mark.slow
def test_the_command_on_two_processes_and_after_kills_writes_the_same_file(tmp_path):
    write_conversations(tmp_path / "data.jsonl", many(1600))
    words = [
        "-m",
        "ctxlens",
        "score",
        "-m",
        "organism-chat",
        "--dataset",
        str(tmp_path / "data.jsonl"),
        "--out",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29571"]

    def run(name, *launcher):
        command = [sys.executable, *launcher, *words, str(tmp_path / name)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    for name, launcher in (("one", ()), ("two", torchrun)):
        process = run(name, *launcher)
        assert process.communicate()[1] is not None
        assert process.returncode == 0
    for kill in range(6):
        process = run("killed")
        shards = tmp_path / "killed" / "score-shards"
        while process.poll() is None and len(list(shards.glob("[0-9]*.parquet"))) <= kill % 3:
            time.sleep(0.05)
        time.sleep(random.Random(kill).uniform(0, 0.3))
        process.kill()
        process.communicate()
    assert run("killed").wait() == 0
    assert scores_file(tmp_path / "one") == scores_file(tmp_path / "two") == scores_file(tmp_path / "killed")
