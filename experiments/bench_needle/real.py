"""How fast a real model answers needle questions, against its own forward pass over the same tokens.

    python experiments/bench_needle/real.py PATH depths --layers 6

Parts, each a run of its own; `--rounds` repeats everything that is compared in turn:

* depths: one text with its own needle at five depths, alone and together, and the limit of sharing;
* facts: four questions about one text, with and without prefix, together, and the limit;
* reading: texts of their own, read by the grid, steered, and by role, against the plain forward pass;
* memory: the peak of answering four questions about one text, against the forecast;
* profile: an audit, and which part of its time the model's forward pass takes.

Seconds are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import ctxlens as cl
from ctxlens.chat.condition import parse_conditions
from ctxlens.chat.roles import RenderedChat
from ctxlens.evals.material import choose_material
from ctxlens.evals.needle.answers import answer_jobs
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.prompts import Cell, render_cell
from ctxlens.evals.texts import build_cells as build_fact_cells
from ctxlens.files import write_atomic
from ctxlens.models import Model, load_model
from ctxlens.models.memory import forecast_memory
from ctxlens.models.prefix_tree import count_read, plan_branches
from ctxlens.runs import package_versions

BOTH = parse_conditions("plain,plain+prefix")


def load(path: str, layers: int) -> Model:
    """A checkpoint, or its first layers: every layer has the same shape, so ratios hardly depend on them."""
    if not layers:
        return load_model(path, dtype="float32", device="cpu")
    config = AutoConfig.from_pretrained(path)
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)
    return Model.from_hf(model, AutoTokenizer.from_pretrained(path), backend="native")


def read_plainly(model: Model, tokens: Any, past: Any = None) -> Any:
    """transformers' own forward pass over one prompt, with the logits of the last position."""
    hf: Any = model.backend.hf_model  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        given = torch.as_tensor(tokens)[None]
        return hf(input_ids=given, past_key_values=past, use_cache=past is not None, logits_to_keep=1)


def compare(rounds: int, ways: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """CPU seconds of every way, round after round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.process_time()
            way()
            seconds[name].append(round(time.process_time() - begun, 3))
            print(name, seconds[name][-1], flush=True)
    return seconds


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Median and range over the rounds of one time relative to another."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    return {
        "median": round(statistics.median(found), 3),
        "low": round(min(found), 3),
        "high": round(max(found), 3),
    }


def sum_of(seconds: dict[str, list[float]], weights: dict[str, float]) -> list[float]:
    """A weighted sum of times, by round."""
    return [
        round(sum(w * seconds[name][at] for name, w in weights.items()), 3)
        for at in range(len(next(iter(seconds.values()))))
    ]


def depth_chats(model: Model, n_tokens: int, new: int) -> list[RenderedChat]:
    """One text with a needle of its own at each of five depths."""
    config = NeedleConfig(
        lengths=(n_tokens,), depths=5, needles=("neutral",), conditions=BOTH[1:], max_new_tokens=new
    )
    cells = build_cells(model, config, load_haystack("neutral"))
    return [render_cell(model, cell, config, "plain+prefix") for cell in cells]


def measure_depths(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """Limit: the time of one prompt after the other, less that of reading the shared prefixes."""
    chats = depth_chats(model, options.tokens, options.new)
    branches = plan_branches(chats)
    shared = {f"prefix {branch.index}": branch for branch in branches if branch.shared}
    texts: dict[str, list[str]] = {}

    def alone() -> None:
        texts["alone"] = [model.generate(chat, max_new_tokens=options.new) for chat in chats]

    def together() -> None:
        texts["together"] = model.generate(chats, max_new_tokens=options.new)

    ways = {"alone": alone, "together": together}
    for name, branch in shared.items():
        ways[name] = lambda b=branch: read_plainly(model, chats[b.index].tokens[: b.shared])
    seconds = compare(options.rounds, ways)
    limit = sum_of(seconds, {"alone": 1, **dict.fromkeys(shared, -1)})
    tokens = sum(chat.n_tokens for chat in chats)
    return {
        "tokens": tokens,
        "tokens_read": count_read(chats, branches),
        "limit_in_tokens": round(tokens / count_read(chats, branches), 3),
        "seconds": {**seconds, "limit": limit},
        "times_as_fast": ratio(seconds["alone"], seconds["together"]),
        "limit_times_as_fast": ratio(seconds["alone"], limit),
        "time_against_limit": ratio(seconds["together"], limit),
        "same_texts": texts["alone"] == texts["together"],
    }


def fact_jobs(model: Model, n_tokens: int, n_texts: int = 1) -> tuple[list[Cell], NeedleConfig]:
    """The cells of an audit with four facts in every text."""
    material = choose_material(model.name)
    config = NeedleConfig(
        lengths=(n_tokens,), depths=4, needles=material.facts, conditions=BOTH, cases_per_cell=n_texts,
        max_new_tokens=24, score=("recall",),
    )  # fmt: skip
    return build_fact_cells(model, material, config, 4), config


def measure_facts(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """Limit: one plain forward pass over one prompt, and one over what each of the others has of its own."""
    cells, config = fact_jobs(model, options.tokens)
    chats = [render_cell(model, cell, config, condition) for cell in cells for condition in BOTH]
    branches = plan_branches(chats)
    begun = next(chats[branch.index] for branch in branches if not branch.shared)
    known = min(branch.shared for branch in branches if branch.shared)
    empty: Any = None

    def whole() -> None:
        nonlocal empty
        from transformers import DynamicCache

        empty = DynamicCache()
        read_plainly(model, begun.tokens, empty)

    def rest() -> None:
        empty.crop(known - begun.n_tokens)
        for branch in branches:
            if branch.shared:
                chat = chats[branch.index]
                read_plainly(model, chat.tokens[known:], empty)
                empty.crop(known - chat.n_tokens)

    seconds = compare(
        options.rounds,
        {
            "whole": whole,
            "rest": rest,
            "together": lambda: model.generate(chats, max_new_tokens=1),
            "with answers": lambda: model.generate(chats, max_new_tokens=options.new),
        },
    )
    limit = sum_of(seconds, {"whole": 1, "rest": 1})
    return {
        "tokens": sum(chat.n_tokens for chat in chats),
        "tokens_read": count_read(chats, branches),
        "seconds": {**seconds, "limit": limit},
        "time_against_limit": ratio(seconds["together"], limit),
        "answers_against_limit": ratio(seconds["with answers"], limit),
    }


def measure_reading(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """Texts of their own, read by the grid with its rendering, steered, by role, and by the forward pass."""
    cells, config = fact_jobs(model, options.tokens, n_texts=2)
    cells = [cell for cell in cells if cell.depth_percent < 25]
    chats = [render_cell(model, cell, config, "plain+prefix") for cell in cells]
    once = NeedleConfig(
        lengths=config.lengths, depths=4, needles=config.needles, conditions=BOTH, max_new_tokens=1,
        score=("recall",),
    )  # fmt: skip
    condition = once.conditions[1]

    def steered() -> None:
        with model.steer(0.5):
            model.generate(chats, max_new_tokens=1)

    seconds = compare(
        options.rounds,
        {
            "plain": lambda: [read_plainly(model, chat.tokens) for chat in chats],
            "grid": lambda: answer_jobs(model, [(cell, condition) for cell in cells], once),
            "steered": steered,
            "roles": lambda: [model.read_roles(chat, sinks=True) for chat in chats],
        },
    )
    return {
        "tokens": sum(chat.n_tokens for chat in chats),
        "seconds": seconds,
        "speed_against_plain": {
            name: ratio(seconds["plain"], seconds[name]) for name in ("grid", "steered", "roles")
        },
    }


def measure_memory(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """The peak of this process, before and after answering four questions about one text."""
    loaded, before = _peak(), round(psutil.Process().memory_info().rss / 1e9, 3)
    cells, config = fact_jobs(model, options.tokens)
    chats = [render_cell(model, cell, config, "plain+prefix") for cell in cells]
    model.generate(chats, max_new_tokens=options.new)
    rows = max(1, 8192 // (chats[0].n_tokens + options.new))
    forecast = forecast_memory(
        model, length=chats[0].n_tokens, batch=rows, what="generate", new_tokens=options.new
    )
    generated = _peak()
    model.read_roles(chats[0], sinks=True)
    return {
        "rows": rows, "gb_loaded": before, "peak_gb_loaded": loaded, "peak_gb_generated": generated,
        "peak_gb_roles": _peak(),
        "forecast_gb_weights": round(forecast.weights / 1e9, 3),
        "forecast_gb_run": round(forecast.run / 1e9, 3),
    }  # fmt: skip


def _peak() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


def measure_profile(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """An audit within a budget of minutes, and the CPU seconds inside the model's forward pass."""
    hf: Any = model.backend.hf_model  # pyright: ignore[reportAttributeAccessIssue]
    inside = {"passes": 0, "seconds": 0.0, "depth": 0}

    def timed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begun = time.process_time()
            inside["depth"] += 1
            try:
                return forward(*args, **kwargs)
            finally:
                inside["depth"] -= 1
                if not inside["depth"]:  # the decoder calls its base model
                    inside["seconds"] += time.process_time() - begun
                    inside["passes"] += 1

        return run

    hf.forward, hf.base_model.forward = timed(hf.forward), timed(hf.base_model.forward)
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        found = cl.audit(model, budget=options.budget, lengths=[options.tokens], out=Path(folder) / "audit")
    total = time.process_time() - begun
    return {
        "budget_minutes": options.budget, "cpu_seconds": round(total, 1),
        "inside": {"passes": inside["passes"], "seconds": round(inside["seconds"], 1)},
        "part_inside": round(inside["seconds"] / total, 3),
        "planned_seconds": round(found.plan.total_seconds, 1), "stages": found.seconds,
    }  # fmt: skip


PARTS = {
    "depths": measure_depths,
    "facts": measure_facts,
    "reading": measure_reading,
    "memory": measure_memory,
    "profile": measure_profile,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a folder with a checkpoint, such as SmolLM2-135M-Instruct")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--layers", type=int, default=0, help="only the first layers (default: all)")
    parser.add_argument("--tokens", type=int, default=2250)
    parser.add_argument("--new", type=int, default=16, help="the longest answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=3.0, help="minutes of the audit (profile)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("real_results.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load(options.model, options.layers)
    found = PARTS[options.part](model, options)
    said = {name: getattr(options, name) for name in ("layers", "tokens", "new", "rounds")}
    print(json.dumps(found, indent=1))
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    known[f"{options.part}, {options.layers or 'all'} layers, {options.tokens} tokens"] = {**said, **found}
    known["versions"] = package_versions()
    write_atomic(options.out, json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
