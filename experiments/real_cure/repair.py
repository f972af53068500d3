"""Repair: does a short fine-tuning give an instruction-tuned model its long contexts back?

Run:  python -m experiments.real_cure.repair MODEL --instruct DIR --ifeval FILE --out runs/repair
It makes the data, runs `ctxlens.cure` for every method, asks for the costs, and prints one table.
The same command goes on where it stopped. Hypotheses and rules stand in README.md.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import ctxlens as cl
from ctxlens.curing import METHODS, Cure
from ctxlens.curing.request import TRAINED
from ctxlens.evals.needle.contexts import gather_straw, place_needles
from ctxlens.evals.needle.haystack import load_haystack
from ctxlens.evals.needle.needles import Needle, neutral_needles
from ctxlens.files import write_atomic
from ctxlens.models import load_model
from ctxlens.models.checkpoint import load_tokenizer, locate_checkpoint
from ctxlens.results.checkpoints import QUANTITIES
from ctxlens.runs import Parts, Run
from ctxlens.sft.switch import SWITCH
from ctxlens.stats import bootstrap_mean
from experiments.common import rounded
from experiments.real_cure import design
from experiments.real_cure.measure import Row, ask_ifeval, ask_knowledge

LONG, SHORTEST, LONGEST = 150, 300, 1000
"""Long conversations, and their contexts in tokens."""
SHORT = {"t0 with passage": 100, "t0 without passage": 75, "alpaca without input": 125}
"""Short conversations of each kind."""
KEYS = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "max_steps": 28, "max_length": 1200,
    "learning_rate": 1e-4,
}  # fmt: skip
SMOKE = {
    "max_steps": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 400,
}


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the instruction-tuned model: folder or Hub id")
    parser.add_argument("--instruct", type=Path, required=True, help="folder of the instruction data")
    parser.add_argument("--ifeval", type=Path, help="IFEval, file")
    parser.add_argument("--methods", default="indicator,upsample", help="by commas")
    parser.add_argument("--lengths", default="2000", help="context lengths of the audits, by commas")
    parser.add_argument("--budget", type=float, default=8.0, help="minutes for each audit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--out", type=Path, default=Path("runs/repair"))
    parser.add_argument("--smoke", action="store_true", help="one step and a few questions")
    given = parser.parse_args(words)
    import torch

    torch.set_num_threads(given.threads)
    data, facts = make_data(given), write_facts(given.out)
    rows: dict[str, dict[str, Any]] = {}
    methods = given.methods.split(",")
    for method in methods:
        print(f"{method}:", flush=True)
        first = None if method == methods[0] else given.out / methods[0]
        found = cl.cure(
            given.model, data, out=given.out / method, method=method, recipe="lora",
            overrides={**KEYS, **(SMOKE if given.smoke else {})},
            scores=first if METHODS[method].selects else None, budget=given.budget,
            lengths=[int(one) for one in given.lengths.split(",")], needle=str(facts), device="cpu",
            seed=given.seed, tell=lambda plan: print(*plan.describe(), sep="\n", flush=True), notice=print,
        )  # fmt: skip
        rows |= tabulate(found, method, ask_costs(given, found))
    write_atomic(given.out / "repair.json", json.dumps(rounded(rows), indent=1) + "\n")
    table = make_table(rows)
    write_atomic(given.out / "repair.md", table + "\n")
    print(table)


def split_facts() -> tuple[list[Needle], list[Needle]]:
    """The neutral facts to train with and, without a shared fact, those to be audited with."""
    facts = list(neutral_needles().values())
    return facts[::2], facts[1::2]


def write_facts(out: Path) -> Path:
    """The facts of the audits as a file."""
    entries = [
        {"name": one.name, "needle": one.sentence, "question": one.question, "prefix": one.prefix,
         "keywords": ", ".join(one.keywords)}
        for one in split_facts()[1]
    ]  # fmt: skip
    return write_atomic(out / "facts.yaml", yaml.safe_dump(entries, sort_keys=False, width=1000))


def make_data(given: argparse.Namespace) -> Path:
    """Neutral texts with a question about a fact in them, and short conversations of the instruction data."""
    path = given.out / f"data{'-smoke' if given.smoke else ''}.jsonl"
    if path.is_file():
        return path
    tokenizer = load_tokenizer(locate_checkpoint(given.model))
    n_long, share = (4, 0.02) if given.smoke else (LONG, 1.0)
    longest = 350 if given.smoke else LONGEST
    talks = [make_long(tokenizer, number, longest) for number in range(n_long)]
    pools, rng = design.read_pools(given.instruct), random.Random(f"repair-{design.SEED}")
    for kind, n in SHORT.items():
        short = [talk for talk in pools[kind] if len(tokenizer(_text(talk))["input_ids"]) <= design.LONGEST]
        chosen = rng.sample(short, max(1, round(share * n)))
        talks += [{"id": f"{kind}-{i}", "messages": one} for i, one in enumerate(chosen)]
    rng.shuffle(talks)
    return write_atomic(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in talks))


def _text(talk: Sequence[dict[str, str]]) -> str:
    return "\n".join(message["content"] for message in talk)


def make_long(tokenizer: Any, number: int, longest: int) -> dict[str, Any]:
    """A neutral text with two facts, the question about one of them, and its sentence as the answer."""
    rng = random.Random(f"repair-{design.SEED}-{number}")
    facts, length = rng.sample(split_facts()[0], 2), rng.randint(SHORTEST, longest)
    straw = gather_straw(tokenizer, load_haystack("neutral", seed=design.SEED + 1), number, length)
    depths = sorted(rng.uniform(0, 100) for _ in facts)
    places = place_needles(
        tokenizer, straw, [one.sentence for one in facts], context_tokens=length, depths=depths
    )
    asked = facts[rng.randrange(2)]
    user = {"role": "user", "content": f"{places[0].text}\n{asked.question}"}
    return {"id": f"long-{number}", "messages": [user, {"role": "assistant", "content": asked.sentence}]}


def ask_costs(given: argparse.Namespace, found: Cure) -> dict[str, list[Row]]:
    """Closed-book questions and IFEval, for every audited model as it was asked."""
    run = Run.open(
        found.folder / "costs", study="repair", config={"model": given.model, "smoke": given.smoke}
    )
    parts = Parts(run, "costs", {"audits": list(found.audits)})
    rows = {}
    for name in found.audits:

        def ask(name: str = name) -> list[Row]:
            place = given.model if name == "before" else found.folder / TRAINED
            switch = {SWITCH: True} if name == "after-indicator" else None
            model = load_model(place, device="cpu", dtype="float32", template_args=switch)
            return [
                *ask_knowledge(model, "template", smoke=given.smoke),
                *ask_ifeval(model, given.ifeval, "template", smoke=given.smoke),
            ]

        rows[name] = parts.get(name, ask)
    return rows


def tabulate(found: Cure, method: str, costs: dict[str, list[Row]]) -> dict[str, dict[str, Any]]:
    """Every figure by model as it was asked; the model before is the same for all methods."""
    assert found.comparison is not None
    rows: dict[str, dict[str, Any]] = {}
    for at, name in enumerate(found.comparison.models):
        label = {"before": name, "after": method}.get(name, f"{method}, asked with the indicator")
        rows[label] = {q: found.comparison.values(q)[at].as_dict() for q in QUANTITIES}
        if at:
            change, reading = found.comparison.changes("recall with template")[at - 1]
            rows[label]["change of recall with template"] = {**change.as_dict(), "reading": reading}
        for measure in ("closed book", "ifeval"):
            values, before = (_by_item(costs[one], measure) for one in (name, found.comparison.models[0]))
            rows[label][measure] = bootstrap_mean(list(values.values())).as_dict()
            if at:
                change = [value - before[item] for item, value in values.items()]
                rows[label][f"change of {measure}"] = bootstrap_mean(change).as_dict()
    return rows


def _by_item(rows: Sequence[Row], measure: str) -> dict[str, float]:
    return {row["item"]: row["value"] for row in rows if row["measure"] == measure}


def make_table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures as one Markdown table."""
    names = ["recall without template", "recall with template", "change of recall with template",
             "closed book", "change of closed book", "ifeval", "change of ifeval"]  # fmt: skip
    lines = ["| model | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for label, row in rows.items():
        cells = []
        for name in names:
            one = row.get(name)
            known = one is not None and one["n"] > 0
            said = f" {one['reading']}" if known and "reading" in one else ""
            cells.append(
                f"{one['estimate']:.2f} [{one['low']:.2f}, {one['high']:.2f}]{said}" if known else "–"
            )
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
