"""What does scoring a data set cost, compared with the forward pass alone and with the paper's own way?

Question: tokens per second of scoring, relative to a plain SDPA forward pass that stops at the same layer on
          the same batches; time per conversation, relative to the paper's released algorithm (one
          conversation padded to 2,047 tokens, eager attention, all layers, all patterns kept), with the same
          scores; peak memory by the length of the data set; and two processes relative to one.
Run:      python -m experiments.bench_scoring DATA TOKENIZER --out results.json     (smaller: --smoke)
Goals:    at least 0.9 times plain; at least 15 times the paper's; the same scores to 1e-4; flat memory; two
          processes at least 1.6 times one.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

WAYS = ("plain", "read", "whole")
PARTS = ("speed", "paper", "memory", "processes")


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall time of one call, including what it started on a GPU, and its processor time.

    On a machine that others use too, only the processor time is reliable, as long as one thread works.
    """
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter(), time.process_time()
    work()
    wait()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def measure_speed(
    hf_model: Any, model: Any, data: Sequence[Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Reading alone against a plain forward pass, in turns; and all of scoring, from text to file."""
    import torch

    from ctxlens.models.backends.batch import TokenBatch
    from ctxlens.runs import Run
    from ctxlens.scoring import Settings, score_conversations, score_to_run
    from ctxlens.scoring.measure import reduce_turns
    from experiments.bench_scoring.subject import make_batches, make_twin, render_all

    settings = Settings.of(model, max_tokens=options.window, batch_tokens=options.batch_tokens)
    chats = render_all(model, data, options.window)
    batches = make_batches(chats, settings.batch_tokens)
    plain = make_twin(hf_model, layers=max(settings.layers) + 1)
    tokens = [
        TokenBatch.from_chats(batch, pad_id=0, side="right", device=model.device).tokens for batch in batches
    ]

    def forward(at: int) -> None:
        with torch.no_grad():
            plain.base_model(input_ids=tokens[at], use_cache=False)

    def read(at: int) -> None:
        model.reduce_responses(
            batches[at], reduce_turns, layers=settings.layers, batch_tokens=settings.batch_tokens
        )

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            score_to_run(model, data, settings, Run.open(Path(folder) / "run", study="score", config={}))

    forward(0)
    read(0)
    score_conversations(model, data[:1], max_tokens=32)
    rounds = []
    for number in range(options.rounds):
        rounds.append(time_round(number, len(batches), {"plain": forward, "read": read}, whole))
        print(rounds[-1], file=sys.stderr, flush=True)
    return {
        "conversations": len(chats),
        "tokens": sum(chat.n_tokens for chat in chats),
        "padded_tokens": sum(batch.numel() for batch in tokens),
        "batch_tokens": settings.batch_tokens,
        "batches": len(batches),
        "layers_read": len(settings.layers),
        "rounds": rounds,
        **summarise_speed(rounds, sum(chat.n_tokens for chat in chats), len(chats)),
    }


def time_round(
    number: int, n_batches: int, by_batch: dict[str, Callable[[int], None]], whole: Callable[[], None]
) -> dict[str, float]:
    """Seconds of every way in one round; ways by batch alternate, and take turns in going first."""
    taken = dict.fromkeys((f"{way}_{kind}" for way in WAYS for kind in ("s", "cpu_s")), 0.0)

    def add(name: str, work: Callable[[], object]) -> None:
        wall, cpu = seconds(work)
        taken[f"{name}_s"] += wall
        taken[f"{name}_cpu_s"] += cpu

    for at in range(n_batches):
        for name, way in list(by_batch.items())[:: -1 if (number + at) % 2 else 1]:
            add(name, functools.partial(way, at))
    add("whole", whole)
    return {name: round(value, 3) for name, value in taken.items()}


def summarise_speed(rounds: Sequence[dict[str, float]], n_tokens: int, n_chats: int) -> dict[str, float]:
    """Medians over rounds: tokens per second, ratios to plain, and seconds per conversation."""

    def ratio(way: str, kind: str) -> float:
        return round(median(one[f"plain_{kind}"] / one[f"{way}_{kind}"] for one in rounds), 3)

    best = {name: median(taken[name] for taken in rounds) for name in rounds[0]}
    return {
        **{f"{way}_tokens_per_s": round(n_tokens / best[f"{way}_s"], 1) for way in WAYS},
        "read_over_plain": ratio("read", "s"),
        "whole_over_plain": ratio("whole", "s"),
        "read_over_plain_cpu": ratio("read", "cpu_s"),
        "whole_over_plain_cpu": ratio("whole", "cpu_s"),
        "whole_s_per_conversation": round(best["whole_s"] / n_chats, 4),
        "whole_cpu_s_per_conversation": round(best["whole_cpu_s"] / n_chats, 4),
    }


def measure_paper(
    hf_model: Any, model: Any, data: Sequence[Any], options: argparse.Namespace
) -> dict[str, Any]:
    """The paper's way on some conversations, and the largest difference of its scores from ours."""
    from ctxlens.scoring import score_conversations
    from experiments.bench_scoring.paper import score_as_the_paper
    from experiments.bench_scoring.subject import make_twin, render_all

    some = [data[k * len(data) // options.paper_conversations] for k in range(options.paper_conversations)]
    eager = make_twin(hf_model, attention="eager")
    scores = score_conversations(model, some, max_tokens=options.window, batch_tokens=options.batch_tokens)
    frame = scores.frame.set_index(["conversation", "turn", "layer"])["mean_of_best"]
    taken, largest, compared = [], 0.0, 0
    for conversation, chat in zip(some, render_all(model, some, options.window), strict=True):
        found: dict[int, Any] = {}
        taken.append(
            seconds(lambda chat=chat, to=found: to.update(score_as_the_paper(eager, chat, options.window, 0)))
        )
        for turn, by_layer in found.items():
            for layer in scores.meta["layers"]:
                theirs = float(by_layer[layer])
                largest = max(largest, abs(theirs - float(frame[conversation.id, turn, layer])))
                compared += 1
        print(f"paper's way: {taken[-1]}", file=sys.stderr, flush=True)
    assert largest < 1e-4, f"the scores differ by {largest:.1e}"
    return {
        "conversations": len(some),
        "s_per_conversation": round(median(wall for wall, _ in taken), 3),
        "cpu_s_per_conversation": round(median(cpu for _, cpu in taken), 3),
        "scores_compared": compared,
        "largest_difference": largest,
    }


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `--smoke` overrides the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="any file that ctxlens.chat.data reads, such as lima.json")
    parser.add_argument("tokenizer", type=Path, help="a folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--conversations", type=int, default=48, help="for speed; spread over the data")
    parser.add_argument("--paper-conversations", type=int, default=5)
    parser.add_argument("--process-conversations", type=int, default=1024)
    parser.add_argument("--memory", type=int, nargs="+", default=[250, 1000], help="numbers of conversations")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", type=int, default=2047, help="tokens; the paper's way pads to it")
    parser.add_argument("--batch-tokens", type=int, help="default: that of scoring")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=22, help="of the model")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--smoke", action="store_true", help="a small model and a few conversations")
    options = parser.parse_args(argv)
    if options.smoke:
        options.conversations, options.paper_conversations, options.process_conversations = 6, 2, 4
        options.memory, options.rounds, options.window, options.layers = [4, 8], 1, 192, 3
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    options = parse_options(argv)
    import torch

    from ctxlens.files import write_atomic
    from ctxlens.models import Model
    from ctxlens.runs import package_versions
    from experiments.bench_scoring.subject import Shape, build_model, choose_conversations, read_tokenizer

    torch.set_num_threads(options.threads)
    tokenizer = read_tokenizer(options.tokenizer)
    shape = Shape(n_layers=options.layers)
    hf_model = build_model(shape, tokenizer, options.window, device=options.device, dtype=options.dtype)
    model = Model.from_hf(hf_model, tokenizer, name="random", backend="native")
    data = choose_conversations(options.data, options.conversations)
    results = json.loads(options.out.read_text()) if options.out.is_file() else {}
    results["setting"] = {
        "command": " ".join(["python -m experiments.bench_scoring", *(argv or sys.argv[1:])]),
        "shape": vars(shape), "d_vocab": len(tokenizer), "window": options.window,
        "threads": options.threads, "device": options.device,
        "dtype": options.dtype, "machine": platform.machine(), "cores": os.cpu_count(),
        "versions": package_versions(),
    }  # fmt: skip
    if "speed" in options.parts:
        results["speed"] = measure_speed(hf_model, model, data, options)
    if "paper" in options.parts:
        results["paper"] = measure_paper(hf_model, model, data, options)
    if "speed" in results and "paper" in results:
        results |= compare_with_paper(results["speed"], results["paper"])
    if "memory" in options.parts or "processes" in options.parts:
        results |= measure_scaling(hf_model, tokenizer, options)
    write_atomic(options.out, json.dumps(results, indent=2) + "\n")
    print(json.dumps({name: value for name, value in results.items() if name != "setting"}, indent=2))


def compare_with_paper(speed: dict[str, Any], paper: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as the paper's way: wall time and processor time."""
    return {
        name: round(paper[f"{kind}_per_conversation"] / speed[f"whole_{kind}_per_conversation"], 1)
        for name, kind in (("times_faster_than_paper", "s"), ("times_faster_than_paper_cpu", "cpu_s"))
    }


def measure_scaling(hf_model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory by the length of the data, and two processes against one, as `--parts` asks."""
    from experiments.bench_scoring import scaling
    from experiments.bench_scoring.subject import choose_conversations

    found: dict[str, Any] = {}
    if "memory" in options.parts:
        every = choose_conversations(options.data, None)
        found["peak_mib"] = scaling.measure_memory(every, options.tokenizer, options.memory)
    if "processes" in options.parts:
        some = choose_conversations(options.data, options.process_conversations)
        found["processes"] = scaling.measure_processes(some, hf_model, tokenizer, 1)
    return found


if __name__ == "__main__":
    main()
