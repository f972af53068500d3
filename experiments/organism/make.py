"""Make the organism from scratch: tokenizer, base model, chat model, and its measured table.

python -m experiments.organism.make --out runs/organism            # all of it
python -m experiments.organism.make --out runs/organism --measure  # the table of the packaged base
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ctxlens.models import load_model
from ctxlens.organism import BASE, recipe
from ctxlens.stats import t_interval
from experiments.organism.measure import SeedStudy
from experiments.organism.pretrain import PretrainRecipe, pretrain

PACKAGES = ("torch", "transformers", "trl", "tokenizers", "transformer-lens", "numpy")


def measure_all(base: str, folder: Path) -> dict[str, object]:
    """Measure the base model and every fine-tuning seed of the recipe."""
    by_seed = []
    for seed in recipe.SEEDS:
        study = SeedStudy(folder, seed, base=base, log=lambda line: print(line, flush=True))
        figures = study.measure(load_model(base, backend="native"), "base", plain=True)
        by_seed.append({**figures, **study.run()})
    summary = {}
    for name in by_seed[0]:
        interval = t_interval([figures[name] for figures in by_seed])
        summary[name] = {"mean": interval.estimate, "low": interval.low, "high": interval.high}
    return {
        "seeds": list(recipe.SEEDS),
        "summary": _rounded(summary),
        "by_seed": _rounded(by_seed),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def package_chat(trained: Path, base: Path, folder: Path) -> None:
    """Write a fine-tuned checkpoint in float16, with the base's unchanged tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    model.config.use_cache = True
    model.half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, folder / name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--measure", action="store_true", help="measure the packaged base without training")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = "organism"
    if not args.measure:
        base = str(args.out / "base")
        pretrain(PretrainRecipe(), Path(base), log=lambda line: print(line, flush=True))
    results = measure_all(base, args.out)
    source = BASE if base == "organism" else Path(base)
    package_chat(args.out / f"vanilla-{recipe.SEEDS[0]}", source, args.out / "chat")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"Base and chat model in {args.out}; figures in {args.out / 'results.json'}")


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return round(float(np.asarray(value)), 4)


if __name__ == "__main__":
    main()
