"""How fast is a real model trained on its answers, and how much of the processor is used?

Question: tokens per second of `ctxlens.sft.train` on a pretrained model, relative to TRL's `SFTTrainer` on
          the same conversations with the same arguments; what is gained by computing logits only where the
          loss counts; and what by multiplying in bfloat16 (autocast; the others compute in float32). All ways
          alternate in one process, so that other load affects them alike.
Run:      python -m experiments.bench_training.answers --model DIR --data FILE --out runs/bench_training
          python -m experiments.bench_training.answers --out DIR          (the embedded model, seconds)
Goal:     a ratio of at least 1 to plain TRL (median over rounds).

The loss is on the answers only: TRL gets prompt and completion, ctxlens `loss_on: assistant`. Tokens are
those of the rows, without padding. The share of the peak is the model's operations per second (6 operations
for every parameter of the layers and token, 6 for every parameter of the head and token with loss,
12 · layers · width · mean length for the attention of every token) over those of a product of two matrices
of 1,024 × 1,024, measured in the same run in the same number format. With one thread, seconds are those of
the processor, so that other load counts less; with several, they are those of the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

WAYS = ("plain", "all logits", "ctxlens", "bfloat16")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, write `answers.json`, print a table; returns what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="organism-chat")
    parser.add_argument("--data", help="Conversations, as for `ctxlens score --dataset`.")
    parser.add_argument("--rows", type=int, default=16, help="Conversations in a round.")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--longest", type=int, default=512, help="Longest conversation in tokens.")
    parser.add_argument("--rounds", type=int, default=2, help="Timed rounds; one more warms up.")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_training"))
    options = parser.parse_args(argv)
    bench = Bench(options)
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(options.rounds + 1):
        for way in WAYS[:: 1 if number % 2 else -1]:
            found = bench.run(way)
            if number:
                measured[way].append(found)
    result = summarise(measured, bench)
    from ctxlens.files import write_atomic

    write_atomic(options.out / "answers.json", json.dumps(result, indent=1))
    print(table(result))
    return result


class Bench:
    """One set of conversations, and the ways of training on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        from ctxlens.models.checkpoint import load_tokenizer, locate_checkpoint

        self.options = options
        self.source = locate_checkpoint(options.model)
        self.tokenizer = load_tokenizer(self.source)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.pairs = self._choose_pairs()
        model = self.model()
        head = model.get_output_embeddings().weight.numel()
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        everything = sum(weight.numel() for weight in model.parameters())
        embedding = model.get_input_embeddings().weight.numel()
        config = model.config.get_text_config()
        self.head, self.layers = head, everything - head - (0 if tied else embedding)
        self.attention = 12 * config.num_hidden_layers * config.hidden_size

    def _choose_pairs(self) -> list[tuple[dict[str, str], dict[str, str]]]:
        """The first conversations of one question and its answer that are short enough."""
        from ctxlens.chat.data import load_conversations
        from ctxlens.organism import load_world

        if self.options.data:
            some = load_conversations(self.options.data, limit=20 * self.options.rows)
            messages = [list(one.messages) for one in some]
        else:
            messages = [list(one.messages) for one in load_world().conversations(200, 0, extra_turn=0.0)]
        pairs = [
            (one[0], one[1])
            for one in messages
            if [message["role"] for message in one] == ["user", "assistant"]
            and len(self.tokenizer.apply_chat_template(one, return_dict=False)) <= self.options.longest
        ]
        if len(pairs) < self.options.rows:
            raise SystemExit(f"only {len(pairs)} conversations of one short question and answer were found.")
        return pairs[: self.options.rows]

    def model(self) -> Any:
        """The model, loaded anew."""
        import torch

        from ctxlens.models.loading import load_causal_lm

        return load_causal_lm(self.source, device=None, dtype=torch.float32)

    def args(self, way: str) -> dict[str, Any]:
        """The same arguments for all ways, but for the number format."""
        o = self.options
        return {
            "per_device_train_batch_size": o.batch, "gradient_accumulation_steps": o.accumulation,
            "num_train_epochs": 1, "learning_rate": 1e-5, "max_length": None, "use_cpu": True,
            "disable_tqdm": True, "logging_steps": 1000, "seed": 0, "bf16": way == "bfloat16",
        }  # fmt: skip

    def run(self, way: str) -> dict[str, float]:
        """Train once; returns tokens, tokens with loss, and seconds of the training alone."""
        model = self.model()
        with tempfile.TemporaryDirectory() as folder:
            found = self._plain(model, folder) if way == "plain" else self._ours(model, folder, way)
        gc.collect()
        rate = found["tokens"] / found["seconds"]
        per_token = 6 * self.layers + self.attention * found["tokens"] / self.options.rows
        work = per_token * found["tokens"] + 6 * self.head * found["trained"]
        return {**found, "tokens_per_second": rate, "flops": work / found["seconds"]}

    def _plain(self, model: Any, folder: str) -> dict[str, float]:
        """TRL alone, on prompts and completions."""
        from datasets import Dataset
        from transformers.trainer_callback import PrinterCallback
        from trl.trainer.sft_trainer import SFTTrainer

        from ctxlens.sft import make_sft_config

        data = Dataset.from_list([{"prompt": [asked], "completion": [said]} for asked, said in self.pairs])
        args = make_sft_config(folder, self.args("plain"))
        model.train()
        trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=self.tokenizer)
        trainer.remove_callback(PrinterCallback)
        clock = choose_clock()
        begun = clock()
        trainer.train()
        seconds = clock() - begun
        rows: Any = trainer.train_dataset
        return {
            "tokens": float(sum(map(len, rows["input_ids"]))),
            "trained": float(sum(label != -100 for labels in rows["labels"] for label in labels[1:])),
            "seconds": seconds,
        }

    def _ours(self, model: Any, folder: str, way: str) -> dict[str, float]:
        """`ctxlens.sft.train`: as it is, with the logits of positions that do not count, in bfloat16."""
        from ctxlens.chat.data import Conversation
        from ctxlens.sft import train

        data = [Conversation(str(i), tuple(pair), "bench", {}) for i, pair in enumerate(self.pairs)]
        with all_logits() if way == "all logits" else contextlib.nullcontext():
            out = train(
                data, out=Path(folder) / "run", model=model, tokenizer=self.tokenizer, args=self.args(way),
                progress=lambda done, total: None,
            )  # fmt: skip
        log = json.loads((out / "train.json").read_text(encoding="utf-8"))
        counts = log["counts"]
        return {
            "tokens": float(counts["tokens"]),
            "trained": float(counts["trained_tokens"]),
            "seconds": log["cpu_seconds" if choose_clock() is time.process_time else "wall_seconds"],
        }


@contextlib.contextmanager
def all_logits() -> Iterator[None]:
    """Train as before: the logits of every position are computed."""
    from ctxlens.sft import trainer

    chosen = trainer._head_where_trained
    trainer._head_where_trained = lambda device: contextlib.nullcontext()
    try:
        yield
    finally:
        trainer._head_where_trained = chosen


def choose_clock() -> Callable[[], float]:
    """Time of the processor for a single thread, else of the clock on the wall."""
    import torch

    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def measure_peak(dtype: Any) -> float:
    """Operations per second of a product of two matrices of 1,024 × 1,024, the best of ten."""
    import torch

    clock = choose_clock()
    one = torch.rand(1024, 1024).to(dtype)
    best = float("inf")
    for _ in range(10):
        begun = clock()
        torch.mm(one, one)
        best = min(best, clock() - begun)
    return 2 * 1024**3 / best


def summarise(measured: dict[str, list[dict[str, float]]], bench: Bench) -> dict[str, Any]:
    """Medians of all ways, ratios to plain TRL by round, and the share of the peak."""
    import torch

    peaks = {way: measure_peak(torch.bfloat16 if way == "bfloat16" else torch.float32) for way in WAYS}
    medians = {
        way: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        for way, rounds in measured.items()
    }
    for way, figures in medians.items():
        figures["share_of_peak"] = figures["flops"] / peaks[way]

    def ratios(way: str, to: str) -> list[float]:
        pairs = zip(measured[way], measured[to], strict=True)
        return [one["tokens_per_second"] / other["tokens_per_second"] for one, other in pairs]

    return {
        "median": medians, "rounds": measured, "peak_flops": peaks,
        "to_plain": ratios("ctxlens", "plain"), "to_all_logits": ratios("ctxlens", "all logits"),
        "bfloat16": ratios("bfloat16", "ctxlens"),
        "model": bench.options.model if bench.options.model == "organism-chat" else Path(bench.source).name,
        "parameters": {"layers": bench.layers, "head": bench.head},
        "threads": torch.get_num_threads(), "machine": platform.machine(),
        "settings": {key: value for key, value in vars(bench.options).items() if isinstance(value, int)},
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| way | tokens/s | with loss | share of peak |", "|---|---|---|---|"]
    for way, found in result["median"].items():
        lines.append(
            f"| {way} | {found['tokens_per_second']:.0f} | {found['trained'] / found['tokens']:.0%} | "
            f"{found['share_of_peak']:.0%} |"
        )
    compared = {
        "to_plain": "ctxlens over plain TRL", "to_all_logits": "ctxlens over all logits",
        "bfloat16": "bfloat16 over ctxlens",
    }  # fmt: skip
    for key, what in compared.items():
        values = result[key]
        spread = f"{min(values):.3f} to {max(values):.3f}"
        lines += ["", f"{what}: {statistics.median(values):.3f} ({spread} by round)"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
