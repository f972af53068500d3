"""How much of the role bias is attention sinks, and where do the thresholds for sinks come from?

Question: how much of the fall of the user's share under the chat template is a change of attention sinks?
Run:      python -m experiments.sinks table  --model SMOLLM2 --texts DATA
          python -m experiments.sinks figure --model SMOLLM2 --base GEMMA3 --texts DATA
Expected: written beforehand in README.md.
Cost:     4 minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    """Make the table or the figure."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sinks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("table", "figure"))
    parser.add_argument("--model", required=True, help="an instruction-tuned model with a chat template")
    parser.add_argument("--base", help="a second model, for the figure")
    parser.add_argument("--texts", type=Path, required=True, help="folder with paul_graham/ and instruct/")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json and points.json")
    parser.add_argument("--svg", type=Path, default=HERE.parents[1] / "docs" / "sinks.svg")
    options = parser.parse_args(argv)
    from ctxlens.files import write_atomic

    if options.what == "table":
        from experiments.sinks.table import measure, show

        found = measure(options.model, options.texts)
        write_atomic(options.out / "results.json", json.dumps(found, indent=1) + "\n")
        print(show(found))
        return
    from experiments.sinks.figure import draw, measure_points

    models = [options.model, *([options.base] if options.base else [])]
    points = [measure_points(model, options.texts) for model in models]
    write_atomic(options.out / "points.json", json.dumps(points) + "\n")
    write_atomic(options.svg, draw(points))


if __name__ == "__main__":
    main()
