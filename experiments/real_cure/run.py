"""Trains and measures, part by part: the base, then for every seed vanilla and the three cures.

A part is one model, in its own folder; the same command goes on where it stopped. `--parts 0/2` and
`--parts 1/2` share the seeds between two processes, because the cures of a seed need its vanilla run.
The base is measured by the first of them. What `--kept` holds is neither trained nor measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctxlens.chat.data import load_conversations
from ctxlens.chat.roles import render
from ctxlens.curing.request import METHODS
from ctxlens.files import write_atomic
from ctxlens.models import Model, load_model
from ctxlens.models.checkpoint import load_tokenizer, locate_checkpoint, read_chat_template
from ctxlens.results import Scores, Selection
from ctxlens.runs import Run
from ctxlens.scoring import score_conversations
from ctxlens.scoring.layers import find_layer
from ctxlens.scoring.selection import select_turns, selection_quality
from ctxlens.sft.training import train_from_config
from experiments.real_cure import design
from experiments.real_cure.answers import is_kept, selection_file
from experiments.real_cure.measure import Sources, measure_all

CURES = ("indicator", "random", "upsample")
SMOKE = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}


def main(words: Sequence[str] | None = None) -> None:
    """The command line of the experiment."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.real_cure", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", help="the base model: folder or Hub id")
    parser.add_argument("--instruct", type=Path, required=True, help="folder of the instruction data")
    parser.add_argument("--squad", type=Path, help="SQuAD v1.1, file")
    parser.add_argument("--drop", type=Path, help="DROP, file")
    parser.add_argument("--ifeval", type=Path, help="IFEval, file")
    parser.add_argument("--out", type=Path, default=Path("runs/real_cure"))
    parser.add_argument("--kept", type=Path, help="folder of kept answers, see answers.py")
    parser.add_argument("--methods", default=",".join(CURES), help="cures besides vanilla, by commas")
    parser.add_argument("--seeds", default=",".join(map(str, design.SEEDS)), help="seeds, by commas")
    parser.add_argument("--parts", default="0/1", help="K/N: every N-th seed from the K-th on")
    parser.add_argument("--dose", choices=list(design.DOSES), default="design", help="see README, search")
    parser.add_argument(
        "--top-share", type=float, help="mark this share of the turns instead, see README, 3b"
    )
    parser.add_argument("--measures", default="", help="names of measures, by commas; by default all")
    parser.add_argument("--template", default=design.TEMPLATE, help="chat template: name or file")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--smoke", action="store_true", help="two steps and a few questions of each measure")
    given = parser.parse_args(words)
    import torch

    torch.set_num_threads(given.threads)
    only = tuple(one for one in given.measures.split(",") if one)
    sources = Sources(given.squad, given.drop, given.ifeval, smoke=given.smoke, only=only)
    data = make_data(given)
    part, parts = map(int, given.parts.split("/"))
    if part == 0:
        measure_base(given, sources)
    for seed in [int(one) for one in given.seeds.split(",")][part::parts]:
        finish(given, sources, "vanilla", seed, data)
        if given.dose != "design":
            continue
        selection = narrow(given, seed, select(given, seed, data))
        for method in [one for one in given.methods.split(",") if one]:
            finish(given, sources, method, seed, data, selection)


def make_data(given: argparse.Namespace) -> Path:
    """The mixture as a file, drawn once."""
    path = given.out / f"data-{given.dose}{'-smoke' if given.smoke else ''}.jsonl"
    if not path.is_file():
        tokenizer = load_tokenizer(locate_checkpoint(given.model))
        tokenizer.chat_template = read_chat_template(given.template)
        rows = design.draw_mixture(
            given.instruct, lambda talk: render(tokenizer, talk).n_tokens, given.dose,
            share=0.02 if given.smoke else 1.0,
        )  # fmt: skip
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def open_part(given: argparse.Namespace, name: str, **config: Any) -> Run:
    """The folder of a part."""
    fixed = {"model": given.model, "dose": given.dose, "smoke": given.smoke, "seed_of_design": design.SEED}
    return Run.open(given.out / name, study="real_cure", config={**fixed, **config})


def measure_base(given: argparse.Namespace, sources: Sources) -> None:
    """Measure the base model."""
    if is_kept(given.kept, "base"):
        return
    run = open_part(given, "base")
    if not run.has("measured.json"):
        model = load_model(given.model, dtype=design.DTYPE, chat_template=given.template)
        measure_all(run, model, sources, marked=False, tell=say)


def name_part(given: argparse.Namespace, method: str, seed: int) -> str:
    """The folder's name of a method and seed."""
    words = [method] + ([given.dose] if given.dose != "design" else [])
    if given.top_share is not None and METHODS[method].selects:
        words.append(f"top{100 * given.top_share:g}")
    return "-".join([*words, str(seed)])


def finish(
    given: argparse.Namespace, sources: Sources, method: str, seed: int, data: Path,
    selection: Path | None = None,
) -> None:  # fmt: skip
    """Train and measure one model, as far as its answers are not there."""
    if not is_kept(given.kept, name_part(given, method, seed)):
        measure(given, sources, train(given, method, seed, data, selection))


def train(
    given: argparse.Namespace, method: str, seed: int, data: Path, selection: Path | None = None
) -> Run:
    """Train one model, or take the finished one."""
    run = open_part(given, name_part(given, method, seed), method=method, seed=seed)
    say(f"{run.folder.name}: training")
    keys = {**design.TRAINING, **(SMOKE if given.smoke else {})}
    if method == "vanilla" and seed == design.SEEDS[0]:
        share = design.READING_SHARE if given.dose == "design" else design.READING_SHARE_OF_SEARCH
        keys |= {**design.READINGS, "context_share": share}
    keys["max_steps"] *= design.DOSES[given.dose].passes
    train_from_config("lora", {
        "model": given.model, "dataset": data, "output_dir": run.path("trained"), "seed": seed,
        "chat_template": given.template, "use_cpu": True, "selection": selection, **keys,
        **METHODS[method].keys,
    })  # fmt: skip
    return run


def select(given: argparse.Namespace, seed: int, data: Path) -> Path:
    """Score the data with a seed's vanilla model, and select turns by the default rule."""
    kept = None if given.kept is None else given.kept / selection_file(seed)
    if kept is not None and kept.is_file():
        return kept
    run = open_part(given, f"scores-{seed}", seed=seed)
    if not run.has("selection.parquet"):
        say(f"{run.folder.name}: scoring")
        talks = load_conversations(data)
        score_conversations(load_trained(train(given, "vanilla", seed, data)), talks, out=run)
        scores = Scores.load(run.path("scores.parquet"))
        chosen = select_turns(scores, layer=find_layer(scores))
        passages = {(one.id, 1) for one in talks if one.id.rsplit("-", 1)[0] in design.PASSAGE}
        quality = selection_quality(chosen, passages)
        run.write_json("quality.json", {**vars(quality), "threshold": chosen.meta["threshold"]})
        run.save("selection.parquet", chosen)
    return run.path("selection.parquet")


def narrow(given: argparse.Namespace, seed: int, selection: Path) -> Path:
    """The selection with only the share of the turns that has the highest scores, if one is asked for."""
    if given.top_share is None:
        return selection
    run = open_part(given, f"narrowed-top{100 * given.top_share:g}-{seed}", seed=seed)
    if not run.has("selection.parquet"):
        whole = Selection.load(selection)
        score = whole.frame["score"]
        selected = score.rank(method="first", ascending=False) <= round(given.top_share * len(score))
        rule = f"the {given.top_share:g} of the turns with the highest scores"
        meta = {
            **whole.meta,
            "rule": rule,
            "threshold": float(score[selected].min()),
            "selected": int(selected.sum()),
        }
        chosen = Selection(whole.frame.assign(selected=selected), meta)
        passages = {
            (name, 1) for name in whole.frame["conversation"] if name.rsplit("-", 1)[0] in design.PASSAGE
        }
        run.write_json(
            "quality.json", {**vars(selection_quality(chosen, passages)), "threshold": meta["threshold"]}
        )
        run.save("selection.parquet", chosen)
    return run.path("selection.parquet")


def measure(given: argparse.Namespace, sources: Sources, run: Run) -> None:
    """Measure a trained model."""
    if not run.has("measured.json"):
        method = str(run.manifest["config"]["method"])
        measure_all(run, load_trained(run), sources, marked=METHODS[method].marks, tell=say)


def load_trained(run: Run) -> Model:
    """The trained model of a part."""
    return load_model(run.path("trained"), dtype=design.DTYPE)


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
