"""The whole cure on one device: pretrain, vanilla SFT, score, select, indicator SFT, evaluate.

Run:  python -m experiments.gpu_pipeline --preset gpu --out runs/gpu_pipeline     (one GPU, 10 minutes)
      python -m experiments.gpu_pipeline --preset cpu --out DIR                   (minutes)
      python -m experiments.gpu_pipeline --preset smoke --out DIR                 (seconds)
Writes results-PRESET.json: seconds, tokens per second and peak memory of every stage, hardware, versions, and
the results. Finished stages are not run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ctxlens.files import plain_value
from ctxlens.runs import Run, package_versions
from experiments.gpu_pipeline.presets import PRESETS, Preset

Figures = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> Figures:
    """Run the unfinished stages; returns the content of `results-PRESET.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_pipeline"))
    parser.add_argument("--minutes", type=float, help="Maximum time of pretraining; overrides the preset's.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    preset = PRESETS[options.preset]
    if options.minutes is not None:
        preset = replace(preset, minutes=options.minutes)
    config = {"preset": options.preset, "seed": options.seed, **asdict(preset)}
    run = Run.open(options.out, study="gpu_pipeline", config=config)
    result = Pipeline(run, preset, options.seed).run_stages()
    run.write_json(f"results-{options.preset}.json", result)
    print(table(result))
    return result


class Pipeline:
    """One run of the pipeline in its folder; each stage returns its figures."""

    def __init__(self, run: Run, preset: Preset, seed: int) -> None:
        import torch

        self.run, self.preset, self.seed = run, preset, seed
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.on_gpu else "cpu")

    def run_stages(self) -> Figures:
        """Run the stages in order; figures of finished ones are read from `stages.json`."""
        done: Figures = self.run.read_json("stages.json") if self.run.has("stages.json") else {}
        for name, stage in STAGES.items():
            if name not in done:
                done[name] = plain_value(self._timed(partial(stage, self)))
                self.run.write_json("stages.json", done)
                print(f"{name}: {done[name]['seconds']:.1f} s", flush=True)
        return {"config": self.run.manifest["config"], "machine": self._machine(), "stages": done}

    def _timed(self, stage: Callable[[], Figures]) -> Figures:
        import torch

        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        found = stage()
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        gc.collect()
        peak = (
            torch.cuda.max_memory_allocated()
            if self.on_gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        rate = {"tokens_per_second": found["tokens"] / seconds} if found.get("tokens") else {}
        return {"seconds": seconds, **rate, "peak_memory_mib": peak / 2**20, **found}

    def _machine(self) -> Figures:
        import torch

        gpu = torch.cuda.get_device_name() if self.on_gpu else None
        return {
            "gpu": gpu, "cpu": platform.machine(), "threads": torch.get_num_threads(),
            "memory": "peak allocated on the GPU" if gpu else "peak resident of the process so far",
            "versions": package_versions(),
        }  # fmt: skip

    # The stages.

    def pretrain(self) -> Figures:
        """Pretrain the base model from scratch."""
        from ctxlens.organism import load_world
        from experiments.gpu_pipeline.pretraining import TimedPretraining
        from experiments.organism.pretrain import PretrainRecipe

        p = self.preset
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # separate processes make the texts
        recipe = PretrainRecipe(
            seed=self.seed, copy_max_steps=p.copy_steps, document_steps=p.document_steps, lr=p.lr,
            tokens_per_step=p.tokens_per_step, **p.shape,
        )  # fmt: skip
        training = TimedPretraining(
            recipe, load_world(), device=self.device, bf16=p.bf16 and self.on_gpu, minutes=p.minutes,
            copy_share=p.copy_share, workers=p.workers, log=lambda line: print(line, flush=True),
        )  # fmt: skip
        copying = training.learn_copying()
        training.learn_documents(self.run.path("base"))
        return {
            "parameters": training.model.num_parameters(), "tokens": training.tokens,
            "copy_steps": copying, "copy_loss_nats": training.second_half,
            "document_steps": training.steps - copying, "document_loss_nats": training.last_loss,
        }  # fmt: skip

    @cached_property
    def conversations(self) -> list[Any]:
        """The fine-tuning data with the true kind of every answer."""
        from ctxlens.chat.data import Conversation
        from ctxlens.organism import load_world, recipe

        made = load_world().conversations(self.preset.conversations, seed=self.seed, **recipe.SHARES)
        return [Conversation(c.id, tuple(c.messages), "organism", {"kinds": c.kinds}) for c in made]

    @cached_property
    def kinds(self) -> dict[tuple[str, int], str]:
        """The true source of every answer, by turn."""
        return {
            (c.id, 2 * i + 1): kind for c in self.conversations for i, kind in enumerate(c.labels["kinds"])
        }

    def _fine_tune(self, name: str, **options: Any) -> Figures:
        from ctxlens.organism import load_world, recipe
        from ctxlens.sft import train

        p = self.preset
        n_raw = round(p.conversations * recipe.REPLAY_SHARE / (1 - recipe.REPLAY_SHARE))
        args = {
            **recipe.SFT_ARGUMENTS, "max_steps": p.sft_steps, "warmup_steps": p.sft_steps // 10,
            "per_device_train_batch_size": p.sft_rows // 2, "learning_rate": p.sft_lr, "seed": self.seed,
            "logging_steps": max(1, p.sft_steps // 26), "use_cpu": not self.on_gpu,
            "bf16": p.bf16 and self.on_gpu,
        }  # fmt: skip
        folder = train(
            self.conversations,
            out=self.run.path(name),
            model=str(self.run.path("base")),
            replay_texts=load_world().raw_documents(n_raw, seed=self.seed, **recipe.REPLAY),
            args=args,
            progress=lambda done, total: None,
            **options,
        )
        log = json.loads((folder / "train.json").read_text())
        epochs = p.sft_steps * p.sft_rows / (log["counts"]["conversations"] + log["counts"]["replay"])
        return {
            "tokens": round(log["counts"]["tokens"] * epochs), "steps": log["steps"],
            "training_seconds": log["wall_seconds"], "loss_nats": log["log"][-1]["loss"],
        }  # fmt: skip

    def _model(self, name: str) -> Any:
        from ctxlens.models import load_model

        return load_model(str(self.run.path(name)), backend="native", device=str(self.device))

    def vanilla(self) -> Figures:
        """Fine-tune without the indicator: the seed model."""
        return self._fine_tune("vanilla")

    def score(self) -> Figures:
        """Score every answer of the data with the seed model."""
        from ctxlens.scoring import score_conversations

        model = self._model("vanilla")
        scores = score_conversations(model, self.conversations, kinds=self.kinds, layers="all", out=self.run)
        tokens = sum(model.render(c.messages).n_tokens for c in self.conversations)
        return {"tokens": tokens, "turns": len(scores.frame.drop_duplicates(["conversation", "turn"]))}

    def select(self) -> Figures:
        """Select the turns that get the indicator, by the scores of the layer that attends to the needle."""
        from ctxlens.evals.needle.cells import build_cells
        from ctxlens.evals.needle.config import NeedleConfig
        from ctxlens.evals.needle.haystack import load_haystack
        from ctxlens.heads import needle_layer
        from ctxlens.results import Scores
        from ctxlens.scoring.selection import choose_layer, select_turns, selection_quality

        model = self._model("vanilla")
        config = NeedleConfig(
            lengths=(100, 260), depths=(20.0, 80.0), needles=("unknown",), conditions=("template+prefix",),
            cases_per_cell=2, max_new_tokens=16, seed=self.seed + 1000,
        )  # fmt: skip
        cells = build_cells(model, config, load_haystack("organism", seed=config.seed))
        layer = choose_layer(
            model.n_layers, rule="needle", needle_layer=needle_layer(model, cells, config).best
        )
        chosen = select_turns(Scores.load(self.run.path("scores.parquet")), layer=layer)
        self.run.save("selection.parquet", chosen)
        quality = selection_quality(chosen, {turn for turn, kind in self.kinds.items() if kind == "document"})
        return {"layer": layer, "threshold": chosen.meta["threshold"], **asdict(quality)}

    def indicator(self) -> Figures:
        """Fine-tune with the indicator on the selected turns."""
        return self._fine_tune("indicator", **self._selected())

    def _selected(self) -> Figures:
        from ctxlens.results import Selection

        return {"selection": Selection.load(self.run.path("selection.parquet")), "indicator": "[IND]"}

    def evaluate(self) -> Figures:
        """Compare both checkpoints with the base, and with each other on the same texts."""
        from ctxlens.results import NeedleGrid

        asked = {"haystack": "organism", **self.preset.evaluation}
        self._fine_tune("vanilla", evaluate=asked)
        self._fine_tune("indicator", evaluate=asked, **self._selected())
        figures: Figures = {}
        grids = []
        for name in ("vanilla", "indicator"):
            folder = self.run.path(name) / "evaluation"
            record = json.loads((folder / "evaluation.json").read_text())
            figures[name] = [
                {key: row[key] for key in ("measure", "first", "second", "first_mean", "second_mean",
                                           "difference", "p_value", "reading")}
                for row in record["rows"]
            ]  # fmt: skip
            grid = NeedleGrid.load(folder / "needle.parquet")
            grids.append(NeedleGrid(grid.frame.replace({"model": {"trained": name}}), grid.meta))
        both = NeedleGrid.concat([grids[0], grids[1].where(model="indicator")])
        tokens = int(sum(grid.frame["prompt_tokens"].sum() for grid in grids))
        return {"tokens": tokens, **figures, "cure": [*self._cure(both)]}

    def _cure(self, grid: Any) -> list[Figures]:
        """Needle recall with the template: vanilla, and the indicator model with and without indicator."""
        rows = []
        for needle in ("known", "unknown"):
            for marked in (True, False):
                same = {"condition": "template+prefix", "needle": needle}
                found = grid.compare(
                    {"model": "vanilla", "indicator": False, **same},
                    {"model": "indicator", "indicator": marked, **same},
                )
                what = f"{needle}, {'with' if marked else 'without'} indicator, minus vanilla"
                rows.append({"measure": what, **asdict(found), "reading": found.reading})
        return rows


STAGES: Mapping[str, Callable[[Pipeline], Figures]] = {
    "pretrain": Pipeline.pretrain,
    "vanilla": Pipeline.vanilla,
    "score": Pipeline.score,
    "select": Pipeline.select,
    "indicator": Pipeline.indicator,
    "evaluate": Pipeline.evaluate,
}
"""The stages in order, each with the function that returns its figures."""


def table(result: Figures) -> str:
    """The stages as a Markdown table."""
    lines = ["| stage | s | tokens/s | peak MiB |", "|---|---|---|---|"]
    for name, one in result["stages"].items():
        rate = f"{one['tokens_per_second']:,.0f}" if "tokens_per_second" in one else ""
        lines.append(f"| {name} | {one['seconds']:.1f} | {rate} | {one['peak_memory_mib']:,.0f} |")
    lines += [
        "",
        "| needle recall with the template | vanilla | indicator model | difference |",
        "|---|---|---|---|",
    ]
    for row in result["stages"]["evaluate"]["cure"]:
        figures = [f"{row[key]['estimate']:.2f}" for key in ("first", "second", "difference")]
        lines.append(f"| {row['measure']} | {' | '.join(figures)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
