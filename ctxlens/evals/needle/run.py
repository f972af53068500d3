"""Needle in a haystack: how much of a hidden sentence a model finds, by length, depth and condition.

The grid of the paper's sections 2.1 and B, with conditions paired by cell:

```python
config = NeedleConfig(lengths=(200, 1000), depths=(0, 50, 100), needles=("sf",))
grid = run_needle(model, config, haystack=load_haystack("essays/"))
grid.recall(condition="template+prefix").mean()
```
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ctxlens.errors import InputError, ModelFailureError, RunExistsError
from ctxlens.evals.needle.answers import Answer, Job, answer_jobs
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import Haystack, load_haystack
from ctxlens.evals.needle.match import score_containment, score_recall
from ctxlens.evals.needle.needles import NEEDLES, Needle, load_needles
from ctxlens.evals.needle.prompts import Cell, NeedleModel, describe_cell
from ctxlens.files import write_atomic
from ctxlens.models.attention.steering import Steering
from ctxlens.models.indicator_token import require_indicator
from ctxlens.processes import ALONE, Processes
from ctxlens.results import NeedleGrid
from ctxlens.runs import Run

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Setting:
    """Under what a model answers the cells, and how that is labelled in the table.

    Attributes:
        model: the model's name in the table.
        indicator: whether the question carries the model's indicator.
        steering: attention steering, or none.
        heads: label of the steered heads: `none`, `all`, `retrieval`, `random` or another one.
        draw: number of the random draw.
    """

    model: str
    indicator: bool = False
    steering: Steering | None = None
    heads: str = "none"
    draw: int = 0

    @property
    def columns(self) -> dict[str, Any]:
        """The setting's columns of a `NeedleGrid`."""
        s = self.steering
        alpha = 1.0 if s is None else float("nan") if s.alpha is None else s.alpha
        columns = {
            "model": self.model, "indicator": self.indicator, "alpha": alpha, "heads": self.heads,
            "draw": self.draw,
        }  # fmt: skip
        return columns if s is None or s.target_share is None else {**columns, "target_share": s.target_share}

    def applied_to(self, model: NeedleModel) -> contextlib.AbstractContextManager[Any]:
        """The model steered as this setting says, for as long as the context lasts."""
        if self.steering is None or self.steering.changes_nothing:
            return contextlib.nullcontext()
        s = self.steering
        more = {"target_share": s.target_share, "emphasised": s.emphasised}
        more = {name: value for name, value in more.items() if value}
        return model.steer(s.alpha, roles=s.roles, heads=s.heads, mode=s.mode, **more)


def run_needle(
    model: NeedleModel,
    config: NeedleConfig,
    *,
    haystack: Haystack,
    indicator: bool = False,
    steering: Steering | None = None,
    label: str | None = None,
    batch_tokens: int = 8192,
    out: Run | None = None,
    name: str = "needle.parquet",
    processes: Processes = ALONE,
    progress: Progress | None = None,
) -> NeedleGrid:
    """Build a grid's cells, let the model answer them in every condition, and score the answers.

    Args:
        model: the model, as from `load_model`.
        config: lengths, depths, needles, conditions.
        haystack: what the needles are hidden in (`ctxlens.evals.needle.haystack.load_haystack`).
        indicator: whether the question carries the model's indicator.
        steering: attention steering during the answers.
        label: the model's name in the table; its own by default.
        batch_tokens: how many prompt and new tokens are worked on at once.
        out: a run folder. Finished parts are kept there, so that a run that was stopped, however
            roughly, goes on from there; at the end it holds the grid under `name` and the texts of all
            cells in `<name>-cells.jsonl.gz`.
        name: file name of the grid.
        processes: those that share the work; each does its parts, the first puts all together, and all
            return the same grid.
        progress: called with the numbers of finished and of all answers (of this process).

    Raises:
        InputError: see `build_cells`; or an indicator is asked of a model that has none.
        ModelFailureError: the model fails on all of the first cells. Later failures are recorded in the
            column `error`, and the grid goes on.
        RunExistsError: `out` holds another grid under that name.
    """
    cells = build_cells(model, config, haystack)
    heads = "none" if steering is None else "all" if steering.heads == "all" else "chosen"
    setting = Setting(label or model.name, indicator, steering, heads)
    meta = {"haystack": haystack.name, "wording": config.template, "config": config.as_dict()}
    return run_settings(
        model, cells, config, [setting],
        meta=meta, batch_tokens=batch_tokens, out=out, name=name, processes=processes, progress=progress,
    )  # fmt: skip


def run_settings(
    model: NeedleModel,
    cells: Sequence[Cell],
    config: NeedleConfig,
    settings: Sequence[Setting],
    *,
    meta: Mapping[str, Any] | None = None,
    measure: Callable[[Setting], Mapping[str, Any]] | None = None,
    batch_tokens: int = 8192,
    out: Run | None = None,
    name: str = "needle.parquet",
    processes: Processes = ALONE,
    progress: Progress | None = None,
) -> NeedleGrid:
    """Let the model answer built cells under several settings.

    Args:
        model: the model.
        cells: from `build_cells`, with this configuration.
        config: the configuration; its conditions are run.
        settings: indicator, steering and labels, one after another.
        meta: what else the grid's `meta` shall hold.
        measure: called once a setting, while it applies; gives further columns of the setting's rows, for
            instance a side effect.
        batch_tokens: see `run_needle`, as the rest.
        out: a run folder.
        name: file name of the grid.
        processes: those that share the work.
        progress: called with the numbers of finished and of all answers.

    Raises:
        InputError: several processes without a run folder.
        ModelFailureError: see `run_needle`.
    """
    if any(setting.indicator for setting in settings):
        require_indicator(model)
    made_of = {
        "identity": dict(model.identity),
        "config": config.as_dict(),
        "cells": [cell_record(cell) for cell in cells],
        "settings": [asdict(setting) for setting in settings],
    }
    fingerprint = _hash(made_of)
    if out is not None and out.has(name):
        grid = NeedleGrid.load(out.path(name))
        if grid.meta.get("fingerprint") != fingerprint:
            raise RunExistsError(
                f"{out.path(name)} already holds another needle grid; choose another --out folder."
            )
        return grid
    if processes.count > 1 and out is None:
        raise InputError("several processes need a run folder to share their answers in; give one (--out).")
    jobs = [(cell, condition) for cell in cells for condition in config.conditions]
    plan = plan_parts(jobs, config, batch_tokens)
    stem = str(Path(name).with_suffix(""))
    # A part belongs to this grid of this run alone, whatever else has been in the folder.
    key = _hash([fingerprint, batch_tokens, out.manifest.get("created") if out else None])
    parts = _Parts(out.path(f"{stem}.parts") if out else None, key)
    mine = range(processes.rank, len(plan) + (measure is not None), processes.count)
    n_mine = sum(len(plan[unit]) for unit in mine if unit < len(plan)) * len(settings)
    done, answered = 0, False
    for number, setting in enumerate(settings):
        with setting.applied_to(model):
            for unit in mine:
                if unit == len(plan):
                    if measure and not parts.has(number, unit):
                        parts.write(number, unit, dict(measure(setting)))
                    continue
                if not parts.has(number, unit):
                    found = answer_jobs(
                        model, [jobs[index] for index in plan[unit]], config,
                        indicator=setting.indicator, batch_tokens=batch_tokens,
                    )  # fmt: skip
                    if not answered:
                        _check_answers(found)
                    parts.write(number, unit, [asdict(answer) for answer in found])
                answered = True
                done += len(plan[unit])
                if progress:
                    progress(done, n_mine)
    processes.wait()
    if out is not None and not processes.is_first:
        processes.wait()
        return NeedleGrid.load(out.path(name))
    rows = []
    for number, setting in enumerate(settings):
        answers: dict[int, Answer] = {}
        for unit, part in enumerate(plan):
            found = [Answer(**one) for one in parts.read(number, unit)]
            answers.update(zip(part, found, strict=True))
        extra = parts.read(number, len(plan)) if measure else {}
        rows += [{**_row(*jobs[i], setting, answers[i], config), **extra} for i in range(len(jobs))]
    same = {"cells": _hash(made_of["cells"]), "fingerprint": fingerprint}  # grids of the same cells pair up
    grid = NeedleGrid.from_rows(rows, {**(meta or {}), "identity": dict(model.identity), **same})
    if out is not None:
        save_cells(cells, out.path(f"{stem}-cells.jsonl.gz"))
        out.save(name, grid)
        parts.remove()
    processes.wait()
    return grid


def plan_parts(jobs: Sequence[Job], config: NeedleConfig, batch_tokens: int) -> list[list[int]]:
    """The indices of jobs in parts that are asked together, the longest first.

    Prompts of one length and case that begin alike stay together, whatever their number; small groups of
    one length or neighbouring ones are joined until they fill a batch.
    """
    groups: dict[tuple[int, str, int], list[int]] = {}
    for index, (cell, condition) in enumerate(jobs):
        opening = "template" if condition.startswith("template") else condition
        groups.setdefault((-cell.context_tokens, opening, cell.case), []).append(index)
    parts: list[list[int]] = []
    left = 0
    for key in sorted(groups):
        size = len(groups[key]) * (config.max_new_tokens - key[0])
        if size > left:
            parts.append([])
            left = batch_tokens
        parts[-1] += groups[key]
        left -= size
    return parts


def _check_answers(found: Sequence[Answer]) -> None:
    """Raise `ModelFailureError` where a model has failed on all that it was asked so far."""
    if all(answer.error for answer in found):
        raise ModelFailureError(
            f"the model failed on each of the first {len(found)} cells ({found[0].error}), so the run ends "
            "here; nothing of them was kept: once the cause is removed, the same command goes on."
        )


def _row(
    cell: Cell, condition: str, setting: Setting, answer: Answer, config: NeedleConfig
) -> dict[str, Any]:
    row = {
        **setting.columns,
        "condition": condition,
        "cell": cell.number,
        "needle": cell.needle.name,
        "context_tokens": cell.context_tokens,
        "prompt_tokens": answer.prompt_tokens,
        "depth_percent": cell.depth_percent,
        "case": cell.case,
        "built_context_tokens": cell.context.tokens,
        "built_depth_percent": cell.context.depth_percent,
        "keywords": ", ".join(cell.needle.keywords),
        "response": answer.response,
        "recall": float("nan"),
        "memory_recall": float("nan"),
        "error": answer.error,
    }
    if answer.response is not None:
        row["recall"] = score_recall(cell.needle.keywords, answer.response)
        row["memory_recall"] = score_recall(cell.needle.memory_keywords, answer.response)
    if "contains" in config.score:
        said = answer.response
        row["contains"] = float("nan") if said is None else score_containment(cell.needle.answer, said)
    if "logprob" in config.score:
        row["needle_logprob"] = float("nan") if answer.logprob is None else answer.logprob
    return row


def cell_record(cell: Cell) -> dict[str, Any]:
    """A cell as JSON values."""
    return json.loads(json.dumps(asdict(cell)))


def save_cells(cells: Sequence[Cell], path: Path) -> None:
    """Write the texts of a grid, one JSON object a line, gzipped; the same cells give the same bytes."""
    lines = "".join(json.dumps(cell_record(cell), ensure_ascii=False) + "\n" for cell in cells)
    write_atomic(path, gzip.compress(lines.encode(), mtime=0))


class _Parts:
    """Finished parts of one grid until the grid is whole: each in a file of its own, or in memory."""

    def __init__(self, folder: Path | None, key: str) -> None:
        self._folder, self._key = folder, key
        self._memory: dict[tuple[int, int], Any] = {}

    def _path(self, folder: Path, setting: int, unit: int) -> Path:
        return folder / self._key / f"{setting:05d}-{unit:05d}.json"

    def has(self, setting: int, unit: int) -> bool:
        if self._folder is None:
            return (setting, unit) in self._memory
        return self._path(self._folder, setting, unit).exists()

    def read(self, setting: int, unit: int) -> Any:
        if self._folder is None:
            return self._memory[setting, unit]
        return json.loads(self._path(self._folder, setting, unit).read_text(encoding="utf-8"))

    def write(self, setting: int, unit: int, content: Any) -> None:
        if self._folder is None:
            self._memory[setting, unit] = content
        else:
            write_atomic(self._path(self._folder, setting, unit), json.dumps(content))

    def remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


__all__ = [
    "NEEDLES", "Cell", "Needle", "NeedleConfig", "Setting", "build_cells", "cell_record",
    "describe_cell", "load_haystack", "load_needles", "plan_parts", "run_needle",
    "run_settings", "save_cells", "score_containment", "score_recall",
]  # fmt: skip
