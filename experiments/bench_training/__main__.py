"""What does training with the indicator cost, compared with plain TRL?

Question: tokens per second of training with the indicator, relative to TRL's `SFTTrainer` on the same
          conversations with the same arguments. Both alternate in one process, so that other load on the
          machine affects both.
Run:      python -m experiments.bench_training --preset cpu --out runs/bench_training    (minutes)
          python -m experiments.bench_training --preset gpu --out runs/bench_training    (1B shape, packed)
          python -m experiments.bench_training --preset smoke --out DIR                  (seconds)
Goal:     a ratio of at least 0.98 (median over rounds).

Tokens are those of the rows, without padding. Timed are the training alone, which the goal is about, and the
whole way from conversations and a loaded model to a saved checkpoint (`ctxlens.sft.train`; for TRL alone its
trainer, training and saving). The first round warms up and is left out. Unpacked rows of one step are sorted
by length in ctxlens, so it pads less. On a GPU the share of its peak that the model's operations reach
(6 operations a parameter and token, 12 · layers · width · mean length a token for attention) is reported too.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

INDICATOR = "[IND]"


@dataclass(frozen=True)
class Preset:
    """Shape of the model, of the data and of the run."""

    n_layers: int
    d_model: int
    n_heads: int
    d_mlp: int
    d_vocab: int
    rows: int
    batch: int
    accumulation: int
    max_length: int
    rounds: int
    packing: bool = False
    bf16: bool = False


PRESETS = {
    "smoke": Preset(1, 32, 2, 48, 1600, rows=8, batch=2, accumulation=2, max_length=128, rounds=2),
    "cpu": Preset(4, 256, 4, 704, 1600, rows=192, batch=12, accumulation=2, max_length=576, rounds=7),
    "gpu": Preset(
        22, 2048, 32, 5632, 32000, rows=4096, batch=8, accumulation=1, max_length=2048, rounds=5,
        packing=True, bf16=True,
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, write `training-PRESET.json`, print a table; returns what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_training"))
    parser.add_argument("--rounds", type=int, help="Timed rounds of each; overrides the preset's.")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation, such as flash_attention_2.")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="Of the GPU, dense bf16 (H100, H200)."
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=NUMBER", help="Sizes that override the preset's."
    )
    options = parser.parse_args(argv)
    preset = resize(PRESETS[options.preset], options.set)
    rounds = options.rounds or preset.rounds
    bench = Bench(preset, options.attention)
    measured: dict[str, list[dict[str, float]]] = {"plain": [], "indicator": []}
    for number in range(rounds + 1):
        ways: dict[str, Callable[[], dict[str, float]]] = {"plain": bench.plain, "indicator": bench.indicator}
        for name in list(ways)[:: 1 if number % 2 else -1]:
            figures = ways[name]()
            if number:
                measured[name].append(figures)
    result = summarise(measured, bench, options.peak_tflops) | {"preset": asdict(preset)}
    from ctxlens.files import write_atomic

    write_atomic(options.out / f"training-{options.preset}.json", json.dumps(result, indent=1))
    print(table(result))
    return result


def resize(preset: Preset, words: Sequence[str]) -> Preset:
    """A preset with other sizes, for instance to try the GPU preset on a CPU: `n_layers=1 d_model=32`."""
    known = {f.name for f in fields(Preset) if f.type == "int"}
    given = dict(word.split("=") for word in words)
    if unknown := sorted(given.keys() - known):
        raise SystemExit(
            f"--set has unknown keys: {', '.join(unknown)}; expected of {', '.join(sorted(known))}"
        )
    return replace(preset, **{key: int(value) for key, value in given.items()})


class Bench:
    """One set of conversations, and the two ways of training on them."""

    def __init__(self, preset: Preset, attention: str) -> None:
        import torch

        from ctxlens.organism import load_world, recipe

        self.preset = preset
        self.attention = attention
        self.on_gpu = torch.cuda.is_available() and preset.bf16
        self.talks = load_world().conversations(preset.rows, seed=0, **recipe.SHARES)

    def model(self) -> Any:
        """A fresh random Llama of the preset's shape."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        p = self.preset
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=p.d_vocab, hidden_size=p.d_model, intermediate_size=p.d_mlp,
            num_hidden_layers=p.n_layers, num_attention_heads=p.n_heads, num_key_value_heads=p.n_heads,
            max_position_embeddings=4096, tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        model.set_attn_implementation(self.attention)
        self.n_parameters = sum(weight.numel() for weight in model.parameters())
        return model

    def tokenizer(self) -> Any:
        """The organism's tokenizer, without indicator."""
        from ctxlens.models.checkpoint import load_tokenizer, locate_checkpoint

        tokenizer = load_tokenizer(locate_checkpoint("organism"))
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer

    def args(self) -> dict[str, Any]:
        """The same arguments for both."""
        p = self.preset
        return {
            "per_device_train_batch_size": p.batch, "gradient_accumulation_steps": p.accumulation,
            "num_train_epochs": 1, "learning_rate": 1e-4, "max_length": p.max_length,
            "packing": p.packing,
            "bf16": p.bf16 and self.on_gpu, "use_cpu": not self.on_gpu, "disable_tqdm": True,
            "gradient_checkpointing": False, "logging_steps": 1000, "seed": 0,
        }  # fmt: skip

    def plain(self) -> dict[str, float]:
        """TRL alone: it renders, tokenizes and truncates the conversations itself."""
        from datasets import Dataset
        from transformers.trainer_callback import PrinterCallback
        from trl.trainer.sft_trainer import SFTTrainer

        from ctxlens.sft import make_sft_config

        model, tokenizer = self.model(), self.tokenizer()

        def run(folder: str) -> dict[str, float]:
            args = make_sft_config(folder, self.args())
            data = Dataset.from_list([{"messages": list(talk.messages)} for talk in self.talks])
            trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
            trainer.remove_callback(PrinterCallback)
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
            trainer.save_model(folder)
            rows = trainer.train_dataset
            lengths = [len(ids) for ids in rows["input_ids"]]
            if "seq_lengths" in rows.column_names:  # packed rows, and the conversations in them
                lengths = [length for row in rows["seq_lengths"] for length in row]
            return {
                "tokens": float(sum(lengths)), "mean_length": statistics.fmean(lengths),
                "train_seconds": seconds,
            }  # fmt: skip

        return self._timed(run)

    def indicator(self) -> dict[str, float]:
        """ctxlens: the indicator on turns answered from their document, loss on all tokens as in `plain`."""
        from ctxlens.chat.data import Conversation
        from ctxlens.sft import train

        model, tokenizer = self.model(), self.tokenizer()
        data = [Conversation(talk.id, tuple(talk.messages), "organism", {}) for talk in self.talks]
        turns = {
            (talk.id, 2 * i + 1)
            for talk in self.talks
            for i, kind in enumerate(talk.kinds)
            if kind == "document"
        }

        def run(folder: str) -> dict[str, float]:
            out = train(
                data, out=Path(folder) / "run", model=model, tokenizer=tokenizer, selection=turns,
                indicator=INDICATOR, loss_on="all", args=self.args(), progress=lambda done, total: None,
            )  # fmt: skip
            log = json.loads((out / "train.json").read_text(encoding="utf-8"))
            tokens = float(log["counts"]["tokens"])
            return {
                "tokens": tokens, "mean_length": tokens / log["counts"]["conversations"],
                "train_seconds": log["wall_seconds"],
            }  # fmt: skip

        return self._timed(run)

    def _timed(self, run: Callable[[str], dict[str, float]]) -> dict[str, float]:
        import torch

        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            found = run(folder)
            whole = time.perf_counter() - start
        gc.collect()
        torch.cuda.empty_cache()
        return {
            **found,
            "whole_seconds": whole,
            "tokens_per_second": found["tokens"] / found["train_seconds"],
            "whole_tokens_per_second": found["tokens"] / whole,
        }


def summarise(
    measured: dict[str, list[dict[str, float]]], bench: Bench, peak_tflops: float
) -> dict[str, Any]:
    """Medians of both ways, the ratio in every round and its median; on a GPU the share of its peak."""
    import torch

    pairs = list(zip(measured["indicator"], measured["plain"], strict=True))
    ratios, whole = (
        [ours[key] / plain[key] for ours, plain in pairs]
        for key in ("tokens_per_second", "whole_tokens_per_second")
    )
    medians = {
        name: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        for name, rounds in measured.items()
    }
    p = bench.preset
    if bench.on_gpu:
        for figures in medians.values():
            per_token = 6 * bench.n_parameters + 12 * p.n_layers * p.d_model * figures["mean_length"]
            figures["model_flops_share"] = per_token * figures["tokens_per_second"] / (peak_tflops * 1e12)
    return {
        "ratio": statistics.median(ratios), "ratios": ratios, "whole_ratio": statistics.median(whole),
        "whole_ratios": whole, "median": medians, "rounds": measured,
        "parameters": bench.n_parameters, "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if bench.on_gpu else platform.machine(),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| way | tokens/s | training s | whole s |", "|---|---|---|---|"]
    for name, figures in result["median"].items():
        lines.append(
            f"| {name} | {figures['tokens_per_second']:.0f} | {figures['train_seconds']:.2f} | "
            f"{figures['whole_seconds']:.2f} |"
        )
    for key, what in (("ratio", "training"), ("whole_ratio", "from conversations to checkpoint")):
        spread = f"{min(result[f'{key}s']):.3f} to {max(result[f'{key}s']):.3f}"
        lines += ["", f"indicator over plain, {what}: {result[key]:.3f} ({spread} by round)"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
