"""What the experiments on the organism share: their command line and their small result files."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctxlens.files import write_atomic
from ctxlens.organism import recipe
from ctxlens.runs import package_versions
from ctxlens.stats import Interval, t_interval
from experiments.organism.measure import SeedStudy


def run_experiment(
    doc: str,
    folder: Path,
    study: Callable[[argparse.Namespace], Mapping[str, Any]],
    *,
    seeds: Sequence[int] = recipe.SEEDS,
    **defaults: Any,
) -> None:
    """The command line of an experiment: `--out`, `--seeds`, `--smoke`; writes its `results.json`.

    Args:
        doc: the module's docstring: the question, the command, the cost.
        folder: the experiment's folder, where `results.json` goes unless it is a smoke run.
        study: gets the arguments and returns the results.
        seeds: the seeds by default.
        **defaults: further arguments of the command line with their defaults.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs") / folder.name, help="run folder: grids and maps"
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path("runs/organism"),
        help="fine-tuned models; missing ones are trained",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--smoke", action="store_true", help="a few steps and cells, to check that it runs")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    found = study(args)
    record = {
        "command": f"python -m experiments.{folder.name}",
        "seeds": args.seeds,
        "versions": {**package_versions(), "python": platform.python_version()},
        **found,
    }
    target = args.out / "results.json" if args.smoke else folder / "results.json"
    write_atomic(target, json.dumps(rounded(record), indent=1) + "\n")
    print(f"figures in {target}")


def seed_study(args: argparse.Namespace, seed: int, *, batch_rows: int = recipe.BATCH_ROWS) -> SeedStudy:
    """The models of one fine-tuning seed, as the command line asks for them.

    Args:
        args: the command line.
        seed: the seed.
        batch_rows: rows of one step; experiments with many models use fewer.
    """
    steps = 4 if args.smoke else recipe.STEPS
    return SeedStudy(args.checkpoints, seed, steps=steps, batch_rows=batch_rows)


def over_seeds(intervals: Sequence[Interval]) -> dict[str, Any]:
    """One figure of several fine-tuning seeds: each seed's interval, and a t-interval over their means."""
    pooled = t_interval([one.estimate for one in intervals])
    return {
        "mean": pooled.estimate,
        "low": pooled.low,
        "high": pooled.high,
        "by_seed": [[one.estimate, one.low, one.high] for one in intervals],
        "contexts": intervals[0].n,
    }


def show(figure: Mapping[str, Any], digits: int = 2) -> str:
    """A figure of `over_seeds` as text: mean over seeds, and the range of the seeds."""
    means = [one[0] for one in figure["by_seed"]]
    return f"{figure['mean']:.{digits}f} ({min(means):.{digits}f} to {max(means):.{digits}f})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rounded(value: Any) -> Any:
    """Round floats to four digits, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value
