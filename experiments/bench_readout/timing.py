"""Time: every way in turn, round by round, so that the machine's load affects all ways equally."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.native import NativeBackend
from experiments.bench_readout.presets import Preset
from experiments.bench_readout.subject import Subject, make_batch, make_twin
from experiments.bench_readout.ways import ALPHA, WAYS, steered_heads


def seconds(run: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call, until everything that it started on the device has ended; by default wall time."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def alternate(
    subject: Subject,
    length: int,
    dead: Collection[str],
    done: int,
    wanted: Collection[str] = tuple(WAYS),
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[str, float]]:
    """The rounds from number `done` on: seconds by way, every other round in reverse order.

    `wanted` are the ways that take part. Ways that store patterns take part in the first rounds only. Every
    way is warmed up at the length, or at 512 tokens if one pass takes seconds.
    """
    preset = subject.preset
    total, explicit = preset.rounds(length), preset.explicit_rounds(length)
    held = {name for name, way in WAYS.items() if way.tensors}
    alive = [
        name for name in WAYS if name in wanted and name not in dead and (name not in held or done < explicit)
    ]
    if done >= total:
        return
    runs = {name: WAYS[name].make(subject, length) for name in alive}
    for name in alive:
        WAYS[name].make(subject, min(length, 512))()
        if length <= 2048 and name not in held:
            runs[name]()
    for number in range(done, total):
        names = [name for name in alive if name not in held or number < explicit]
        result = {}
        for name in names[:: -1 if number % 2 else 1]:
            gc.collect()
            result[name] = round(seconds(runs[name], preset.device, clock), 6)
        yield result


def measure_device_peaks(subject: Subject, length: int, dead: Collection[str]) -> dict[str, dict[str, Any]]:
    """On a GPU: the allocator's peak of every way, or a note that it ran out of memory."""
    peaks: dict[str, dict[str, Any]] = {}
    for name, way in WAYS.items():
        if name in dead:
            continue
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            way.make(subject, length)()
            peaks[name] = {"peak_bytes": torch.cuda.max_memory_allocated()}
        except torch.OutOfMemoryError:
            peaks[name] = {"dead": "out of the GPU's memory"}
    return peaks


def time_decoding(preset: Preset, model: Any, length: int) -> dict[str, list[float]]:
    """Seconds of every decoding step after a prompt, plain and steered step by step in turn.

    Both have their own caches. The plain way is transformers' own call with token and cache only.
    """
    batch = make_batch(preset, length)
    backend = NativeBackend(make_twin(model))
    steering = Steering(ALPHA, heads=steered_heads(preset))
    cache = None

    def plain(tokens: torch.Tensor) -> None:
        nonlocal cache
        cache = model(
            input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).past_key_values

    times: dict[str, list[float]] = {"plain": [], "steered": []}
    with backend.decoder(batch, [steering]) as steered:
        steps = {"plain": plain, "steered": steered}
        for step in steps.values():
            step(batch.tokens)
        token = batch.tokens[:, -1:]
        for number in range(preset.decode_steps + 4):
            for name in list(steps)[:: -1 if number % 2 else 1]:
                spent = seconds(lambda step=steps[name]: step(token), preset.device)
                if number >= 4:
                    times[name].append(round(spent, 6))
    return times


__all__ = ["alternate", "measure_device_peaks", "seconds", "time_decoding"]
