"""What the figures are worth: agreement of the ways, precision, and where a read-out's time goes."""

from __future__ import annotations

from typing import Any

import torch

from experiments.bench_readout.presets import Preset
from experiments.bench_readout.subject import Subject, build_model
from experiments.bench_readout.ways import WAYS

_KINDS = {
    "attention kernel": ("scaled_dot_product", "flash", "efficient_attention", "fmha", "cudnn"),
    "matrix products": ("addmm", "aten::mm", "bmm", "matmul", "linear", "gemm"),
    "copies and padding": ("copy", "pad", "fill", "zero", "cat", "contiguous", "clone", "gather", "index"),
}


def compare_shares(preset: Preset, length: int) -> dict[str, Any]:
    """Largest differences of shares between the ways, and of bfloat16 from float32 with the same weights."""
    subject = Subject(preset, build_model(preset))

    def read(name: str, of: Subject = subject) -> torch.Tensor:
        shares = WAYS[name].make(of, length)()
        assert shares is not None
        return shares

    ours, answer, response = (read(name) for name in ("read_all", "read_answer", "read_response"))
    result: dict[str, Any] = {"length": length, "dtype": preset.dtype}
    for name in ("read_eager", "read_lens"):
        result[f"all_rows_to_{name}"] = _largest(ours, read(name))
    result["response_rows_to_all_rows"] = _largest(response, ours[:, :, -response.shape[2] :])
    result["one_row_to_all_rows"] = _largest(answer, ours[:, :, -1:])
    coarse = Subject(preset, build_model(preset, dtype="bfloat16"))
    fine = Subject(preset, build_model(preset, dtype="bfloat16").float())
    for name in ("read_all", "read_eager"):
        result[f"bfloat16_to_float32_{name}"] = _largest(read(name, coarse), read(name, fine))
    return result


def _largest(a: Any, b: Any) -> dict[str, float]:
    difference = (a.double() - b.double()).abs()
    return {"max": float(f"{difference.max():.3g}"), "mean": float(f"{difference.mean():.3g}")}


def profile_read(subject: Subject, length: int) -> dict[str, dict[str, float]]:
    """Milliseconds by kind of work of a plain forward, and of ours over all rows and over response rows."""
    cuda = subject.preset.device == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    table = {}
    for name in ("plain", "read_all", "read_response", "steer"):
        run = WAYS[name].make(subject, length)
        run()
        with torch.profiler.profile(activities=activities) as profiler:
            run()
        spent = dict.fromkeys((*_KINDS, "rest"), 0.0)
        for event in profiler.key_averages():
            if event.key.startswith("ProfilerStep"):
                continue
            lowered = event.key.lower()
            kind = next((k for k, parts in _KINDS.items() if any(p in lowered for p in parts)), "rest")
            spent[kind] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
        table[name] = {kind: round(ms, 2) for kind, ms in spent.items()}
    return table


__all__ = ["compare_shares", "profile_read"]
