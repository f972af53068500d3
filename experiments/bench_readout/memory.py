"""Peak memory of one way, alone in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from experiments.bench_readout.presets import Preset
from experiments.bench_readout.subject import Subject, build_model
from experiments.bench_readout.ways import WAYS

_WARM_LENGTH = 16


def measure_peak(name: str, preset: Preset, length: int, threads: int, limit_bytes: int) -> dict[str, Any]:
    """Run one way once in a fresh process that may take at most `limit_bytes`.

    Returns:
        `peak_bytes` (the process's largest resident size) and `seconds`, or `dead`: how it ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.models.llama.modeling_llama", "transformer_lens"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, name, preset, length, threads, limit_bytes))
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        result = None
    process.join()
    return result or {"dead": f"the process ended with exit code {process.exitcode}"}


def _run(pipe: Any, name: str, preset: Preset, length: int, threads: int, limit_bytes: int) -> None:
    torch.set_num_threads(threads)
    with torch.inference_mode():
        subject = Subject(preset, build_model(preset))
        WAYS[name].make(subject, _WARM_LENGTH)()  # makes the twin that this way needs
        _limit(limit_bytes)
        run = WAYS[name].make(subject, length)
        began = time.perf_counter()
        try:
            run()
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "allocate" not in str(error):
                raise
            pipe.send({"dead": f"no memory beyond {limit_bytes / 1e9:.1f} GB"})
            return
        pipe.send({"peak_bytes": _peak(), "seconds": round(time.perf_counter() - began, 4)})


def _limit(limit_bytes: int) -> None:
    """Let this process grow to a resident size of about `limit_bytes`: its mapped size may grow as much."""
    status = Path("/proc/self/statm")
    if not status.is_file():
        return
    mapped, resident = (int(x) * resource.getpagesize() for x in status.read_text().split()[:2])
    allowed = mapped + max(0, limit_bytes - resident)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


__all__ = ["measure_peak"]
