"""Peak memory by the length of the data set, and the command in several processes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctxlens.chat.data import Conversation, open_conversations, write_conversations
from ctxlens.models import Model
from ctxlens.runs import Run
from ctxlens.scoring import Settings, score_to_run
from experiments.bench_scoring.subject import Shape, build_model, read_tokenizer

WINDOW = 256
"""Tokens that conversations are cut to here, where it is their number that matters."""


def peak_mib(path: Path, tokenizer_folder: Path, count: int) -> float:
    """Peak memory of a separate process that scores the first conversations of a file as a stream."""
    code = (
        "from pathlib import Path; from experiments.bench_scoring.scaling import print_peak; "
        f"print_peak(Path({str(path)!r}), Path({str(tokenizer_folder)!r}), {count})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(path: Path, tokenizer_folder: Path, count: int) -> None:
    """Score with a small model and print this process's peak memory in MiB.

    On Linux it is read from the process's own status: `ru_maxrss` is inherited from the parent.
    """
    tokenizer = read_tokenizer(tokenizer_folder)
    shape = Shape(n_layers=2)
    model = Model.from_hf(build_model(shape, tokenizer, 2048), tokenizer, name="small")
    settings = Settings.of(model, max_tokens=WINDOW)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.open(Path(folder) / "run", study="score", config={})
        score_to_run(model, open_conversations(path, limit=count), settings, run)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status")
    if status.is_file():
        peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    print(round(peak / 1024, 1))


def measure_memory(
    data: Sequence[Conversation], tokenizer_folder: Path, counts: Sequence[int]
) -> dict[str, float]:
    """Peak memory in MiB by number of conversations."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        write_conversations(path, data)
        return {str(count): peak_mib(path, tokenizer_folder, count) for count in counts}


def measure_processes(
    data: Sequence[Conversation], model: Any, tokenizer: Any, rounds: int
) -> dict[str, Any]:
    """Wall time of `ctxlens score` with one and two single-thread processes, minus the start-up time.

    Both write their scores, which must be equal byte for byte.
    """
    found: dict[str, Any] = {"conversations": len(data), "rounds": []}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, path, little = (Path(folder) / name for name in ("model", "data.jsonl", "little.jsonl"))
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        write_conversations(path, data)
        write_conversations(little, data[:2])
        for number in range(rounds):
            seconds = {}
            for processes in (1, 2) if number % 2 == 0 else (2, 1):
                outs = [Path(folder) / f"{number}-{processes}-{part}" for part in ("start", "whole")]
                start = _seconds(processes, checkpoint, little, outs[0])
                seconds[processes] = _seconds(processes, checkpoint, path, outs[1]) - start
            files = [
                (Path(folder) / f"{number}-{processes}-whole" / "scores.parquet").read_bytes()
                for processes in (1, 2)
            ]
            assert files[0] == files[1], "two processes give another file than one"
            found["rounds"].append({f"seconds_{n}": round(taken, 2) for n, taken in seconds.items()})
    ratios = sorted(taken["seconds_1"] / taken["seconds_2"] for taken in found["rounds"])
    return found | {"same_file": True, "speedup_median": round(ratios[len(ratios) // 2], 3)}


def _seconds(processes: int, checkpoint: Path, data: Path, out: Path) -> float:
    launcher = [sys.executable]
    if processes > 1:
        launcher += [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--master_port",
            "29577",
        ]
    words = [
        "-m",
        "ctxlens",
        "score",
        "--model",
        checkpoint,
        "--dataset",
        data,
        "--device",
        "cpu",
        "--out",
        out,
    ]
    words += ["--max-tokens", WINDOW]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    done = subprocess.run([*launcher, *map(str, words)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ctxlens score failed with {processes} processes:\n{done.stderr}")
    return time.perf_counter() - began
