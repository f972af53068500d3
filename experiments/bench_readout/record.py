"""The results file: what was measured so far, on what, written anew after every measurement."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ctxlens.errors import RunExistsError
from ctxlens.files import write_atomic
from ctxlens.runs import package_versions
from experiments.bench_readout.presets import Preset
from experiments.bench_readout.ways import WAYS, goal

NAME = "results.json"


class Record:
    """One results file. `data` is plain JSON; `save` writes it atomically."""

    def __init__(self, folder: Path, preset: Preset, command: str, threads: int, clock: str) -> None:
        """Start a record, or go on with the one in the folder.

        Raises:
            RunExistsError: the folder's record is of another preset or number of threads.
        """
        self.path = folder / NAME
        config = json.loads(json.dumps({**asdict(preset), "threads": threads}))
        config.pop("checkpoint")  # its name is in the preset's
        if clock != "wall":
            config["clock"] = clock
        lengths = config.pop("lengths")
        config.pop("memory_lengths")
        if self.path.is_file():
            self.data: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            found = self.data["config"]
            differing = [key for key in config if found.get(key) != config[key]]
            if differing:
                raise RunExistsError(
                    f"{self.path} was made with another {', '.join(differing)}; give another folder as --out."
                )
        else:
            self.data = {
                "command": command,
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "config": config,
                "machine": describe_machine(preset.device),
                "versions": package_versions(),
                "ways": {name: {"label": way.label, "kind": way.kind} for name, way in WAYS.items()},
                "lengths": {},
            }
        for length in lengths:
            self.data["lengths"].setdefault(
                str(length),
                {
                    "goals": {name: goal(name, preset.device, length) for name in WAYS},
                    "forecast_bytes": {
                        name: way.forecast_bytes(preset, length) for name, way in WAYS.items()
                    },
                    "dead": {},
                    "memory": {},
                    "rounds": [],
                },
            )
        self.save()

    def at(self, length: int) -> dict[str, Any]:
        """What is known at a prompt length."""
        return self.data["lengths"][str(length)]

    def save(self) -> None:
        """Write everything."""
        self.data["written"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_atomic(self.path, json.dumps(self.data, indent=1) + "\n")


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, memory and load, and the graphics processor where one is used."""
    described: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(total_memory() / 1e9, 1),
        "load_at_start": load(),
    }
    if device == "cuda":
        described["gpu"] = torch.cuda.get_device_name()
        described["gpu_memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
    return described


def load() -> float:
    """Processes that wanted to run during the last minute."""
    return round(os.getloadavg()[0], 2)


def total_memory() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: str) -> int:
    """Bytes that can be had now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return total_memory()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


__all__ = ["NAME", "Record", "describe_machine", "free_memory", "load"]
