"""The section on how the results were made, and the notes on how far they go."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ctxlens.report.blocks import READING_INTERVALS, Block, Cell, Figure, Figures, Note, Table, figure_json
from ctxlens.report.collect import RunContents
from ctxlens.report.plots.training import loss_curve

_LONGEST_VALUE = 160
_HIDDEN = ("model.path", "against.path")
"""Settings that say where something lies on this machine; `model.name` and `model.sha256` say what it is."""


def making_blocks(run: RunContents) -> list[Block]:
    """Command, settings, versions and times of one run."""
    manifest = run.manifest
    blocks: list[Block] = []
    settings = [("study", run.study)]
    settings += [("made", str(manifest["created"]))] if "created" in manifest else []
    settings += [("command", command)] if (command := demo_command(run)) else []
    settings += [(key, value) for key, value in _flat(run.config) if key not in _HIDDEN]
    blocks.append(Table(["setting", "value"], _rows(settings), "", title="Settings", folded=True))
    blocks += _data(manifest.get("data"))
    timings = run.extras.get("timings")
    if isinstance(timings, dict) and timings:
        blocks.append(_stages([(k, one) for k, one in timings.items() if isinstance(one, dict)]))
    versions = manifest.get("versions")
    if isinstance(versions, dict):
        rows = _rows([(str(key), str(value)) for key, value in versions.items()])
        blocks.append(Table(["package", "version"], rows, "", title="Versions", folded=True))
    blocks += [Note(sentence) for sentence in run.unreadable]
    return blocks


def demo_command(run: RunContents) -> str:
    """The command that repeats a demo; empty for any other run."""
    if not run.is_demo:
        return ""
    smoke = " --smoke" if run.config.get("smoke") else ""
    return f"ctxlens demo{smoke} --seed {run.config.get('seed', 0)} --out {run.name}"


def training_blocks(run: RunContents) -> list[Block]:
    """The loss of a training run and the counts of its data."""
    record = run.extras.get("train")
    if not isinstance(record, dict):
        return []
    blocks: list[Block] = []
    steps = [one for one in record.get("log") or () if isinstance(one, dict) and "loss" in one]
    if steps:
        label = f"Training loss over {len(steps)} logged steps."
        caption = "Mean loss per trained token (nats) by optimizer step, as the trainer logged it."
        blocks.append(
            Figures([Figure(figure_json(loss_curve(steps)), label)], caption, title="Training loss")
        )
    counts = record.get("counts")
    if isinstance(counts, dict):
        rows = _rows([(str(key).replace("_", " "), str(value)) for key, value in counts.items()])
        blocks.append(Table(["training data", "number"], rows, "", title="Training data"))
    return blocks


def honest_notes(runs: list[RunContents]) -> list[str]:
    """Limits of the results that a reader should know."""
    notes = []
    if any(run.is_demo for run in runs):
        notes.append(
            "The embedded model was built to show the effect: its pretraining, its fine-tuning data and "
            "the share of context-dependent examples in these data were chosen so that a loss appears. The "
            "demo shows that the chain of claims can hold and how to test it. It tells you nothing about the "
            "size of the effect in other models."
        )
        notes.append(
            "One run is one seed of fine-tuning. The intervals cover the choice of the test cells, not "
            "the choice of the seed."
        )
    notes += [
        "Attention is evidence, not proof: a head may attend to a token without using it, or use it "
        "through other heads. Steering is the test of cause on this page, and it is a coarse one: it "
        "changes everything that a steered head reads.",
        "Intervals are percentile bootstrap intervals over contexts, conversations or questions, and "
        f"differences are paired. With few of these units the intervals are rough. {READING_INTERVALS}",
        "Raw shares count the template's own tokens, which exist only with the template. Renormalised "
        "shares leave these tokens out. The page gives both, because a claim should hold for the share "
        "about which it is made.",
    ]
    return notes


def _data(data: Any) -> Iterator[Table]:
    """The files that an evaluation read."""
    for found in data.values() if isinstance(data, dict) else ():
        files = found.get("files") if isinstance(found, dict) else None
        if isinstance(files, dict) and files:
            rows = _rows(list(_flat(files)))
            yield Table(["file", "fingerprint"], rows, "", title="Data", folded=True)


def _stages(stages: list[tuple[str, dict[str, Any]]]) -> Table:
    rows = [
        [
            Cell(name, str(one.get("what", ""))),
            Cell(_seconds(one.get("wall_seconds"))),
            Cell(_seconds(one.get("cpu_seconds"))),
        ]
        for name, one in stages
    ]
    totals = [
        sum(float(one.get(key) or 0) for _, one in stages if _is_number(one.get(key)))
        for key in ("wall_seconds", "cpu_seconds")
    ]
    rows.append([Cell("all stages"), *(Cell(_seconds(total)) for total in totals)])
    return Table(
        ["stage", "wall time", "CPU time"],
        rows,
        "Wall time depends on the load of the machine; CPU time is easier to compare.",
        title="Time by stage",
        folded=True,
    )


def _seconds(value: Any) -> str:
    return f"{float(value):,.1f} s" if _is_number(value) else "–"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield f"{prefix}{key}", text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def _rows(pairs: list[tuple[str, str]]) -> list[list[Cell]]:
    return [[Cell(key), Cell(value)] for key, value in pairs]
