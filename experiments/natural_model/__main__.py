"""Does the paper's effect appear in a small model trained on natural language?

Run:  python -m experiments.natural_model --data DATA --preset cpu --out runs/natural
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from experiments.natural_model.presets import PRESETS
from experiments.natural_model.stages import Study

STAGES = ("prepare", "pretrain", "vanilla", "select", "indicator", "oracle", "evaluate", "report")


def main() -> None:
    """Command line."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = os.environ.get("CTXLENS_TEST_DATA")
    parser.add_argument("--data", type=Path, default=given, required=given is None, help="folder of natural text")
    parser.add_argument("--out", type=Path, default=Path("runs/natural"), help="run folder")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--minutes", type=float, help="budget of pretraining; the preset's by default")
    parser.add_argument("--stage", choices=STAGES, help="up to this stage; all by default")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    study = Study(
        args.data, args.out, preset, args.minutes or preset.minutes, args.seed,
        log=lambda line: print(line, flush=True),
    )  # fmt: skip
    study.check_settings()
    for stage in STAGES:
        getattr(study, stage)()
        if stage == args.stage:
            break


if __name__ == "__main__":
    main()
