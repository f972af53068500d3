"""What a model is asked: needles as in an audit, SQuAD, DROP, closed-book questions and IFEval."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxlens.auditing.asking import Asker
from ctxlens.evals.closed_book import run_closed_book
from ctxlens.evals.knowledge import KNOWLEDGE
from ctxlens.evals.needle.run import Setting
from ctxlens.evals.qa import QAExample, render_question, score_contains
from ctxlens.evals.tasks.ifeval_utils import ifeval_docs, score_ifeval_response
from ctxlens.models import Model
from ctxlens.runs import Parts, Run
from experiments.real_cure import design

Row = dict[str, Any]
"""One answer: `measure`, `asked`, `item`, `text` (the unit of intervals), `length`, `value`."""


@dataclass(frozen=True)
class Sources:
    """Where the questions come from; a measure without source is left out.

    Attributes:
        squad, drop, ifeval: files.
        smoke: a few questions of each, to see that everything runs.
        only: the names of the measures; empty for all.
    """

    squad: Path | None = None
    drop: Path | None = None
    ifeval: Path | None = None
    smoke: bool = False
    only: tuple[str, ...] = ()


def measure_all(
    run: Run, model: Model, sources: Sources, *, marked: bool, tell: Callable[[str], None]
) -> None:
    """Ask everything that is not asked yet, and write `measured.json`.

    Args:
        run: the run folder.
        model: the model.
        sources: where the questions come from.
        marked: whether the model knows the indicator, and is asked with it as well.
        tell: called with the name of each measure that begins.
    """
    if run.has("measured.json"):
        return
    parts = Parts(run, "measures", {"model": dict(model.identity), "smoke": sources.smoke})
    rows: list[Row] = []
    measures: Mapping[str, Callable[[str], list[Row]]] = {
        "needles": lambda asked: ask_needles(run, model, asked, smoke=sources.smoke),
        "squad": lambda asked: ask_reading("squad", model, sources.squad, asked, smoke=sources.smoke),
        "drop": lambda asked: ask_reading("drop", model, sources.drop, asked, smoke=sources.smoke),
        "closed book": lambda asked: ask_knowledge(model, asked, smoke=sources.smoke),
        "ifeval": lambda asked: ask_ifeval(model, sources.ifeval, asked, smoke=sources.smoke),
    }
    for name, measure in measures.items():
        if sources.only and name not in sources.only:
            continue
        for asked in ("plain", "template", *(["template+indicator"] if marked else [])):
            if asked == "plain" and name == "ifeval":
                continue
            tell(f"{run.folder.name}: {name}, {asked}")
            part = f"{name}-{asked}".replace(" ", "-").replace("+", "-")
            rows += parts.get(part, lambda measure=measure, asked=asked: measure(asked))
    run.write_json("measured.json", rows)
    parts.remove()


def ask_needles(run: Run, model: Model, asked: str, *, smoke: bool) -> list[Row]:
    """Facts in long texts; the answer begins with the fact's first words."""
    condition, _, marked = asked.partition("+")
    setting = Setting("model", indicator=bool(marked))
    grid = Asker(model=model, label="model", run=run).ask(
        design.needle_cells(model, smoke=smoke), design.needle_config(f"{condition}+prefix"), [setting],
        f"needle-{asked.replace('+', '-')}.parquet", lambda done, total: None,
    )  # fmt: skip
    return [
        {"measure": "needles", "asked": asked, "item": int(row["cell"]), "length": int(row["context_tokens"]),
         "text": f"{row['context_tokens']}-{row['case']}", "value": float(row["recall"])}
        for row in grid.frame.to_dict(orient="records")
    ]  # fmt: skip


def ask_reading(name: str, model: Model, file: Path | None, asked: str, *, smoke: bool) -> list[Row]:
    """Questions about a passage in the wording `passage`; scored as in the paper (a gold answer occurs)."""
    if file is None:
        return []
    examples = design.choose_examples(
        name, file, 2 if smoke else {"squad": design.SQUAD, "drop": design.DROP}[name]
    )
    prompts = [render_question(one.context, one.question, "passage") for one in examples]
    answers = _answer(model, prompts, asked, design.READING_TOKENS)
    return [
        {"measure": name, "asked": asked, "item": one.id, "length": 0, "text": _unit(one),
         "value": float(score_contains(answer, one.answers))}
        for one, answer in zip(examples, answers, strict=True)
    ]  # fmt: skip


def _unit(example: QAExample) -> str:
    """Questions about the same passage are not independent; a checksum stands for the passage."""
    return hashlib.sha256(example.context.encode()).hexdigest()[:12]


def ask_knowledge(model: Model, asked: str, *, smoke: bool) -> list[Row]:
    """General knowledge without a text, as in an audit."""
    table = run_closed_book(
        model, KNOWLEDGE[:2] if smoke else KNOWLEDGE, indicator=asked.endswith("+indicator"),
        template=not asked.startswith("plain"), max_new_tokens=design.ANSWER_TOKENS,
    )  # fmt: skip
    return [
        {"measure": "closed book", "asked": asked, "item": row["question"], "length": 0,
         "text": row["question"], "value": float(row["recall"])}
        for row in table.frame.to_dict(orient="records")
    ]  # fmt: skip


def ask_ifeval(model: Model, file: Path | None, asked: str, *, smoke: bool) -> list[Row]:
    """The first prompts of IFEval with short answers; strict, by prompt."""
    if file is None:
        return []
    docs = list(ifeval_docs(ifeval_data_dir=str(file))["test"])[: 1 if smoke else design.IFEVAL]
    prompts = [doc["prompt"] for doc in docs]
    answers = _answer(model, prompts, asked, 16 if smoke else design.IFEVAL_TOKENS)
    return [
        {"measure": "ifeval", "asked": asked, "item": str(doc["key"]), "length": 0, "text": str(doc["key"]),
         "value": float(score_ifeval_response(doc, [answer])["prompt_level_strict_acc"])}
        for doc, answer in zip(docs, answers, strict=True)
    ]  # fmt: skip


def _answer(model: Model, prompts: Sequence[str], asked: str, max_new_tokens: int) -> list[str]:
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return model.generate(messages, condition=asked, max_new_tokens=max_new_tokens, batch_tokens=4096)


__all__ = ["Row", "Sources", "measure_all"]
