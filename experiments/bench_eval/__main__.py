"""How fast is the adapter to lm-eval, against lm-eval's own `hf` model at the same batch size?

    python -m experiments.bench_eval --preset cpu

Both answer the same requests with the same weights, in turns. Presets: `cpu`, `gpu` (a 1B shape in bfloat16),
`smoke`. Results go to `results-PRESET.json` in this folder (smoke: to `runs/bench_eval`).
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ctxlens.files import write_atomic
from ctxlens.runs import package_versions

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Preset:
    """What is timed: models, requests of each kind, new tokens, batch size, rounds."""

    models: tuple[str, ...]
    requests: int
    new_tokens: int
    batch_size: int
    rounds: int
    device: str = "cpu"
    dtype: str = "float32"


PRESETS = {
    "smoke": Preset(("organism-chat",), 6, 4, 3, 1),
    "cpu": Preset(("organism-chat", "small"), 96, 32, 16, 5),
    "gpu": Preset(("1b",), 256, 64, 32, 3, "cuda", "bfloat16"),
}
SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8,
              "num_key_value_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4},
}  # fmt: skip
"""Llama shapes with random weights and the organism's tokenizer; `1b` is TinyLlama's."""


def load_subject(name: str, preset: Preset) -> Any:
    """A ctxlens model, by name or by shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ctxlens.models import Model, load_model

    if name not in SHAPES:
        return load_model(name, backend="native", device=preset.device, dtype=preset.dtype)
    like = load_model("organism-chat", backend="native", device="cpu")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(like.tokenizer), max_position_embeddings=1024, bos_token_id=0, eos_token_id=None,
        pad_token_id=2, **SHAPES[name],
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(preset.device, getattr(torch, preset.dtype))
    return Model.from_hf(model, like.tokenizer, backend="native", name=name)


def make_requests(model: Any, preset: Preset) -> dict[str, list[Any]]:
    """Requests of three kinds: a text for each question, a text for four questions, four choices for each."""
    from lm_eval.api.instance import Instance

    from ctxlens.evals.harness import load_tasks

    count = preset.requests
    metadata = {"organism_items": count, "organism_fillers": 10}
    docs = list(load_tasks(["ctxlens_organism_qa"], metadata=metadata)["ctxlens_organism_qa"].eval_docs)

    def ask(kind: str, text: str, more: Any) -> Any:
        prompt = model.render([{"role": "user", "content": text}], add_generation_prompt=True).text
        return Instance(kind, {}, (prompt, more), 0, metadata=("bench", 0, 1))

    settings = {"until": [], "max_gen_toks": preset.new_tokens, "do_sample": False}
    own = [f"{doc['context']}\n{doc['question']}" for doc in docs]
    shared = [f"{docs[i // 4 * 4]['context']}\n{doc['question']}" for i, doc in enumerate(docs)]
    answers = [doc["answers"][0] for doc in docs]
    return {
        "own texts": [ask("generate_until", text, settings) for text in own],
        "shared texts": [ask("generate_until", text, settings) for text in shared],
        "stop strings": [
            ask("generate_until", text, {**settings, "until": [" with", "\n\n"]}) for text in own
        ],
        "choices": [
            ask("loglikelihood", text, answers[(i + k) % count])
            for i, text in enumerate(own[: count // 4])
            for k in range(4)
        ],
    }


def measure(model: Any, preset: Preset) -> dict[str, Any]:
    """Seconds of both on every kind of request, in turns, and whether their answers agree."""
    from lm_eval.models.huggingface import HFLM

    from ctxlens.evals.harness import CtxlensLM
    from ctxlens.processes import ALONE

    ours = CtxlensLM(model, batch_size=preset.batch_size, processes=ALONE)
    theirs = HFLM(pretrained=model.backend.hf_model, tokenizer=model.tokenizer, batch_size=preset.batch_size)
    found = {}
    for kind, requests in make_requests(model, preset).items():
        seconds: dict[str, list[float]] = {"hf": [], "ctxlens": []}
        said: dict[str, Any] = {}
        for round_ in range(preset.rounds + 1):
            for name, lm in (("hf", theirs), ("ctxlens", ours)):
                ask = partial(getattr(lm, requests[0].request_type), requests, disable_tqdm=True)
                took, said[name] = clock(ask, preset)
                if round_:  # the first round warms up
                    seconds[name].append(took)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        found[kind] = {
            **medians,
            "ratio": medians["hf"] / medians["ctxlens"],
            "ratios": sorted(a / b for a, b in zip(seconds["hf"], seconds["ctxlens"], strict=True)),
            "same": sum(agree(a, b) for a, b in zip(said["hf"], said["ctxlens"], strict=True))
            / len(requests),
        }
    return found


def clock(work: Callable[[], Any], preset: Preset) -> tuple[float, Any]:
    """How long some work takes, and its result: CPU seconds on a CPU, wall-clock seconds on a GPU."""
    import torch

    gc.collect()
    timer = time.process_time if preset.device == "cpu" else time.perf_counter
    start = timer()
    result = work()
    if preset.device != "cpu":
        torch.cuda.synchronize()
    return timer() - start, result


def agree(one: Any, other: Any) -> bool:
    """Whether two answers are the same text, or likelihoods equal to 1e-3 with the same flag."""
    return one == other if isinstance(one, str) else abs(one[0] - other[0]) < 1e-3 and one[1] == other[1]


def main() -> None:
    """Measure a preset and write its figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    args = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    preset = PRESETS[args.preset]
    results = {name: measure(load_subject(name, preset), preset) for name in preset.models}
    record = {
        "preset": args.preset,
        "settings": vars(preset),
        "versions": package_versions(),
        "results": results,
    }
    folder = Path("runs/bench_eval") if args.preset == "smoke" else FOLDER
    target = folder / f"results-{args.preset}.json"
    write_atomic(target, json.dumps(record, indent=1) + "\n")
    for name, kinds in results.items():
        for kind, one in kinds.items():
            print(f"{name:14} {kind:13} hf {one['hf']:7.2f} s  ctxlens {one['ctxlens']:7.2f} s  "
                  f"{one['ratio']:.2f} times as fast  same {one['same']:.0%}")  # fmt: skip
    print(f"figures in {target}")


if __name__ == "__main__":
    main()
