"""What does it cost to read or steer role-wise attention, compared with a plain forward pass and with peers?

Question: time and peak memory of ctxlens' read-out and steering relative to the plain SDPA forward, and to
          the ways that store attention patterns (eager `output_attentions`, TransformerLens `run_with_cache`,
          an edited mask as PASTA does it), on a random Llama-shaped model.
Run:      python -m experiments.bench_readout --preset cpu --out DIR     (the same command continues)
          python -m experiments.bench_readout --out DIR --table           (tables of the results)
Goals:    read-out and steering at most 1.15 times plain up to 2,048 tokens, 1.25 times beyond; peak memory
          beyond plain at most 5 % of eager's; half depth at most 0.62; steered decoding at most 1.05.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.bench_readout.presets import PRESETS, preset_of_checkpoint
from experiments.bench_readout.ways import WAYS

PARTS = ("accuracy", "memory", "time", "decode", "profile", "flex")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the measurements that are missing, and write and draw the results."""
    options = _parse(argv)
    from experiments.bench_readout.summary import draw, markdown

    results = options.out / "results.json"
    if not options.table:
        _measure(options)
    elif not results.is_file():
        raise SystemExit(f"{results} does not exist; run without --table first.")
    data = json.loads(results.read_text(encoding="utf-8"))
    if not options.table:
        from ctxlens.files import write_atomic

        write_atomic(options.out / "figure.html", draw(data).to_html(include_plotlyjs=True))
    print(markdown(data))


def _measure(options: argparse.Namespace) -> None:
    import torch

    from experiments.bench_readout import checks, flex, memory, timing
    from experiments.bench_readout.record import Record, free_memory, load
    from experiments.bench_readout.subject import Subject, build_model

    preset = PRESETS[options.preset]
    if options.model:
        preset = preset_of_checkpoint(options.model, preset)
    if options.lengths:
        kept = tuple(n for n in preset.memory_lengths if n in options.lengths) or (max(options.lengths),)
        preset = replace(preset, lengths=tuple(options.lengths), memory_lengths=kept)
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    shown = ["MODEL" if word == options.model else word for word in options.argv]
    command = " ".join(["python -m experiments.bench_readout", *shown])
    record = Record(options.out, preset, command, threads, options.clock)
    data = record.data

    def report(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    limit = int(options.memory_limit_gb * 1e9) if options.memory_limit_gb else None
    limit = limit or int(0.8 * free_memory(preset.device))
    with torch.inference_mode():
        if "accuracy" in options.parts and "accuracy" not in data:
            report("accuracy")
            data["accuracy"] = checks.compare_shares(preset, min(preset.lengths))
            record.save()
        for length in preset.lengths:
            found = record.at(length)
            for name, needed in found["forecast_bytes"].items():
                if needed > limit:
                    found["dead"].setdefault(
                        name, f"needs at least {needed / 1e9:.1f} GB for patterns, limit {limit / 1e9:.1f}"
                    )
            for name in options.ways:
                if reason := WAYS[name].missing():
                    found["dead"].setdefault(name, reason)
            record.save()
        if "memory" in options.parts and preset.device == "cpu":
            for length in preset.memory_lengths:
                found = record.at(length)
                for name in options.ways:
                    if name in found["memory"] or name in found["dead"]:
                        continue
                    report(f"memory, L {length}: {name}")
                    peak = memory.measure_peak(name, preset, length, threads, limit)
                    if "dead" in peak:
                        found["dead"][name] = peak["dead"]
                    else:
                        found["memory"][name] = peak
                    record.save()
        subject = Subject(preset, build_model(preset))
        for length in preset.lengths:
            found = record.at(length)
            if "memory" in options.parts and preset.device == "cuda" and not found["memory"]:
                report(f"memory, L {length}")
                found["memory"] = timing.measure_device_peaks(subject, length, found["dead"])
                found["dead"] |= {n: m["dead"] for n, m in found["memory"].items() if "dead" in m}
                record.save()
            if "time" in options.parts:
                found.setdefault("load", load())
                clock = time.process_time if options.clock == "cpu" else time.perf_counter
                done = len(found["rounds"])
                for result in timing.alternate(subject, length, found["dead"], done, options.ways, clock):
                    report(f"time, L {length}, round {len(found['rounds']) + 1}: {result}")
                    found["rounds"].append(result)
                    record.save()
        if "decode" in options.parts:
            for length in preset.decode_lengths:
                if str(length) not in data.setdefault("decode", {}):
                    report(f"decoding after {length} tokens")
                    data["decode"][str(length)] = timing.time_decoding(preset, subject.model, length)
                    record.save()
        if "profile" in options.parts and "profile" not in data:
            report("profile")
            ms = checks.profile_read(subject, preset.profile_length)
            data["profile"] = {"length": preset.profile_length, "ms": ms}
            record.save()
        if "flex" in options.parts and preset.device == "cuda" and "flex" not in data:
            report("FlexAttention")
            data["flex"] = [flex.compare_flex(preset, length) for length in preset.lengths]
            record.save()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench_readout",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--model", help="a Llama-shaped transformers checkpoint instead of random weights")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="plain is needed")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: this process's seconds, for a machine that other work shares (with --threads 1)",
    )  # fmt: skip
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt lengths instead of the preset's")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of results.json")
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice by default")
    parser.add_argument("--memory-limit-gb", type=float, help="default: 80 %% of what is free")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--table", action="store_true", help="print the tables of what is there, and end")
    options = parser.parse_args(argv)
    options.argv = sys.argv[1:] if argv is None else list(argv)
    return options


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
