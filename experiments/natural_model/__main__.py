"""Does the paper's effect appear in a small model trained on natural language?

Run:  python -m experiments.natural_model --data DATA --preset cpu --out runs/natural
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ctxlens.files import write_atomic
from ctxlens.runs import package_versions
from experiments.common import rounded
from experiments.natural_model.comparing import tables
from experiments.natural_model.figure import loss_curves
from experiments.natural_model.presets import PRESETS
from experiments.natural_model.stages import Study

STAGES = ("prepare", "pretrain", "vanilla", "select", "indicator", "oracle", "evaluate", "report")


def main() -> None:
    """Command line."""
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given = os.environ.get("CTXLENS_TEST_DATA")
    parser.add_argument(
        "--data", type=Path, default=given, required=given is None, help="folder of natural text"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/natural"), help="run folder")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--minutes", type=float, help="budget of pretraining (default: the preset's)")
    parser.add_argument("--stage", choices=STAGES, help="stop after this stage (default: run all)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    study = Study(
        args.data, args.out, preset, args.minutes or preset.minutes, args.seed,
        log=lambda line: print(line, flush=True),
    )  # fmt: skip
    study.check_settings()
    for stage in STAGES:
        found = getattr(study, stage)()
        if stage == "report":
            write_report(found, args)
        if stage == args.stage:
            break


def write_report(found: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Write `results.json`, `results.md` and `loss.svg`; a smoke run writes into its run folder."""
    folder = args.out if args.preset == "smoke" else Path(__file__).parent
    record = {
        "command": f"python -m experiments.natural_model --preset {args.preset} --seed {args.seed}",
        "versions": package_versions(), "preset": asdict(PRESETS[args.preset]), **found,
    }  # fmt: skip
    write_atomic(folder / "results.json", json.dumps(rounded(record)) + "\n")
    write_atomic(folder / "results.md", tables(found["figures"]))
    write_atomic(folder / "loss.svg", loss_curves(found["pretraining"], found["fine-tuning"]))
    print(tables(found["figures"]))
    print(f"figures in {folder}")


if __name__ == "__main__":
    main()
