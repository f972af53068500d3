"""How fast the 400 cells of a 20 x 20 needle grid are answered, against one prompt at a time.

    python experiments/bench_needle/bench.py --out experiments/bench_needle/results.json

Four ways, on the same prompts of the embedded model, all in one run; every way must give the same texts:

* transformers: `generate` of transformers itself, one prompt at a time;
* alone: `Model.generate`, one prompt at a time;
* batched: `Model.generate` with all prompts, without shared prefixes;
* shared: `Model.generate` with all prompts, which reads shared prefixes once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from ctxlens import load_model
from ctxlens.chat.roles import RenderedChat
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.needles import draw_needle
from ctxlens.evals.needle.prompts import render_cell
from ctxlens.files import write_atomic
from ctxlens.models import Model
from ctxlens.models.prefix_tree import count_read, plan_branches
from ctxlens.runs import package_versions


def generate_with_transformers(model: Model, chats: list[RenderedChat], new: int) -> list[str]:
    """transformers' own greedy `generate`, one prompt at a time."""
    texts = []
    for chat in chats:
        tokens = torch.from_numpy(chat.tokens)[None]
        found = model.backend.hf_model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False,
            eos_token_id=sorted(model._stop_ids), pad_token_id=model._pad_id(),
        )  # fmt: skip
        texts.append(model.tokenizer.decode(found[0, tokens.shape[1] :], skip_special_tokens=True))
    return texts


def generate_unshared(model: Model, chats: list[RenderedChat], new: int, batch_tokens: int) -> list[str]:
    """Batches in which nothing is shared."""
    model._reuses_prefixes = False
    try:
        return model.generate(chats, max_new_tokens=new, batch_tokens=batch_tokens)
    finally:
        model._reuses_prefixes = True


def measure(backend: str, condition: str, n: int, new: int, batch_tokens: int, one_text: bool) -> dict:
    """Wall and CPU seconds of every way, once each.

    With one text, one needle is hidden in the beginning of one text, as with essays. Otherwise every cell has
    its own needle, and every length its own text.
    """
    model = load_model("organism", backend=backend, device="cpu")
    world = load_haystack("organism")
    needle = draw_needle("unknown", "bench") if one_text else "known"
    haystack = load_haystack(islice(world.sentences(0, 0), 100)) if one_text else world
    config = NeedleConfig(lengths=n, depths=n, needles=(needle,), conditions=(condition,), max_new_tokens=new)
    cells = build_cells(model, config, haystack)
    chats = [render_cell(model, cell, config, condition) for cell in cells]
    ways: dict[str, Callable[[], list[str]]] = {
        "transformers": lambda: generate_with_transformers(model, chats, new),
        "alone": lambda: [model.generate(chat, max_new_tokens=new) for chat in chats],
        "batched": lambda: generate_unshared(model, chats, new, batch_tokens),
        "shared": lambda: model.generate(chats, max_new_tokens=new, batch_tokens=batch_tokens),
    }
    if backend != "native":
        del ways["transformers"]
    model.generate(chats[:3], max_new_tokens=3)
    texts, seconds = {}, {}
    for name, way in ways.items():
        wall, cpu = time.perf_counter(), time.process_time()
        texts[name] = way()
        seconds[name] = {
            "wall": round(time.perf_counter() - wall, 2),
            "cpu": round(time.process_time() - cpu, 2),
        }
        assert texts[name] == texts[next(iter(ways))], f"{name} gives other texts"
    said = [len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts["shared"]]
    return {
        "backend": backend, "one_text": one_text, "condition": condition, "cells": len(chats),
        "max_new_tokens": new, "batch_tokens": batch_tokens, "prompt_tokens": sum(map(len, chats)),
        "tokens_read_when_shared": count_read(chats, plan_branches(chats)),
        "mean_new_tokens": round(sum(said) / len(said), 1), "seconds": seconds,
        "times_faster": {
            name: round(spent["cpu"] / seconds["shared"]["cpu"], 2) for name, spent in seconds.items()
        },
        "same_texts": True,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--smoke", action="store_true", help="a 3 x 3 grid, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n, short, long = (3, 4, 8) if options.smoke else (20, 20, 100)
    cases = [
        (condition, new, one_text)
        for one_text in (True, False)
        for new in (short, long)
        for condition in ("template+prefix", "plain+prefix")
    ]
    runs = []
    for condition, new, one_text in cases[:: 5 if options.smoke else 1]:
        runs.append(measure("native", condition, n, new, options.batch_tokens, one_text))
        print(json.dumps(runs[-1]), flush=True)
    if not options.smoke:
        record = {"seed": 0, "threads": 1, "versions": package_versions(), "runs": runs}
        write_atomic(options.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
