"""Measure claims 1 to 4 on a real instruction-tuned model; see README.md for hypotheses and rules."""

from __future__ import annotations

import argparse
from pathlib import Path

from ctxlens.models import load_model
from ctxlens.runs import Run
from experiments.real_model import design
from experiments.real_model.answers import keep
from experiments.real_model.judge import PARTS, judge_all
from experiments.real_model.measure import MEASURES, Bench

KEPT = Path(__file__).with_name("answers")


def main() -> None:
    """The command line of the experiment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measure", choices=[*MEASURES, "judge", "keep"])
    parser.add_argument("model", nargs="?", help="SmolLM2-135M-Instruct: folder or Hub id")
    parser.add_argument("--essays", type=Path, help="folder with essays, the second haystack")
    parser.add_argument("--template", type=Path, help="chat template in place of the model's own (foreign)")
    parser.add_argument("--out", type=Path, default=Path("runs/real_model"), help="folder of the run")
    parser.add_argument("--to", type=Path, default=KEPT, help="folder of the answers that are kept (keep)")
    parser.add_argument(
        "--verdicts", type=Path, help="file of the verdicts, by default judged.json of the run (judge)"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), help="what to judge, by default everything (judge)"
    )
    parser.add_argument("--blocks", help="numbers of blocks, separated by commas", default=None)
    parser.add_argument("--lengths", help="context lengths of the loss; the rest is measured at the longest")
    parser.add_argument("--part", help="K/N: every N-th block from the K-th on", default="0/1")
    parser.add_argument("--threads", type=int, help="threads of torch", default=None)
    given = parser.parse_args()
    if given.measure == "judge":
        judge_all(given.out, given.verdicts or given.out / "judged.json", given.parts)
        return
    if given.measure == "keep":
        for path in keep(given.out, given.to, MEASURES):
            print(path)
        return
    if given.threads:
        import torch

        torch.set_num_threads(given.threads)
    part, parts = (int(number) for number in given.part.split("/"))
    blocks = (
        [int(one) for one in given.blocks.split(",")] if given.blocks else list(design.blocks(given.measure))
    )
    template = given.template.read_text(encoding="utf-8") if given.template else None
    model = load_model(given.model, backend="native", dtype="float32", chat_template=template)
    run = Run.open(
        given.out / given.measure,
        study="real_model",
        config={"measure": given.measure, "model": dict(model.identity), "seed": design.SEED},
    )
    lengths = [int(one) for one in given.lengths.split(",")] if given.lengths else list(design.LENGTHS)
    detail = max(lengths) if given.lengths else design.DETAIL
    bench = Bench(model, design.load_haystacks(given.essays), run, blocks[part::parts], lengths, detail)
    MEASURES[given.measure](bench)


if __name__ == "__main__":
    main()
