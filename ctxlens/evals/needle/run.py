"""Needle grids: recall of a hidden sentence by length, depth and condition.

The grid of the paper's sections 2.1 and B; conditions are paired by cell.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxlens.chat.condition import Condition
from ctxlens.errors import InputError, ModelFailureError, RunExistsError
from ctxlens.evals.needle.answers import Answer, Job, answer_jobs
from ctxlens.evals.needle.cells import build_cells
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.haystack import Haystack
from ctxlens.evals.needle.match import score_containment, score_recall
from ctxlens.evals.needle.prompts import Cell, NeedleModel
from ctxlens.files import write_atomic
from ctxlens.models.indicator_token import require_indicator
from ctxlens.processes import ALONE, Processes
from ctxlens.results import NeedleGrid
from ctxlens.runs import Parts, Progress, Run, digest

if TYPE_CHECKING:  # it needs torch, which the configuration and cells of a grid do not
    from ctxlens.models.attention.steering import Steering


@dataclass(frozen=True)
class Setting:
    """What applies to all conditions of a grid: the model's indicator and steering, and their labels.

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

    def ask(self, condition: Condition) -> Condition:
        """A condition of the grid with this setting's indicator: how its cells are rendered."""
        return replace(condition, indicator=self.indicator)

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
    """Build a grid's cells, let the model answer them under every condition, and score the answers.

    Args:
        model: the model, as from `load_model`.
        config: lengths, depths, needles, conditions.
        haystack: the text around the needles (`ctxlens.evals.needle.load_haystack`).
        indicator: whether the question carries the model's indicator.
        steering: attention steering during the answers.
        label: the model's name in the table; by default its own.
        batch_tokens: upper bound on the prompt and new tokens of a batch.
        out: a run folder. Finished parts are kept there, so that a run that was stopped or killed goes on
            from there; at the end it holds the grid under `name` and the texts of all cells in
            `<name>-cells.jsonl.gz`.
        name: file name of the grid.
        processes: those that share the work. Each answers its parts, the first puts them together, and all
            return the same grid.
        progress: called with the numbers of finished and of all answers of this process.

    Raises:
        InputError: see `build_cells`; or the model has no indicator although one is requested.
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
        config: the configuration; all its conditions are run.
        settings: indicator, steering and labels, one after another.
        meta: further entries of the grid's `meta`.
        measure: called once per setting, while it applies; returns further columns of the setting's rows,
            for instance a side effect.
        batch_tokens: see `run_needle`, as for the arguments below.
        out: a run folder.
        name: file name of the grid.
        processes: those that share the work.
        progress: called with the numbers of finished and of all answers of this process.

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
    fingerprint = digest(made_of)
    if out is not None and out.has(name):
        return _load_grid(out.path(name), fingerprint)
    if processes.count > 1 and out is None:
        raise InputError("several processes need a run folder to share their answers in; give one (--out).")
    stem = str(Path(name).with_suffix(""))
    parts = Parts(out, stem.replace("/", "-"), [fingerprint, batch_tokens])
    jobs = [(cell, condition) for cell in cells for condition in config.conditions]
    batches = plan_parts(jobs, config, batch_tokens)
    work = _Work(model, config, settings, jobs, batches, measure, batch_tokens, parts)
    work.answer(processes, progress)
    processes.wait()
    grid = None
    if processes.is_first:
        # Grids of the same cells can be paired.
        same = {"cells": digest(made_of["cells"]), "fingerprint": fingerprint}
        grid = NeedleGrid.from_rows(
            work.collect(), {**(meta or {}), "identity": dict(model.identity), **same}
        )
        if out is not None:
            save_cells(cells, out.path(f"{stem}-cells.jsonl.gz"))
            out.save(name, grid)
            parts.remove()
    processes.wait()
    if grid is None:
        assert out is not None, "several processes have a run folder"
        return NeedleGrid.load(out.path(name))
    return grid


def _load_grid(path: Path, fingerprint: str) -> NeedleGrid:
    """A finished grid, which must have been made of the same."""
    grid = NeedleGrid.load(path)
    if grid.meta.get("fingerprint") != fingerprint:
        raise RunExistsError(f"{path} already holds another needle grid; choose another --out folder.")
    return grid


@dataclass(frozen=True)
class _Work:
    """The jobs of a grid, in parts that are answered and kept one by one.

    Attributes:
        model: the model that answers.
        config: the configuration of the grid.
        settings: each of them answers all jobs.
        jobs: the cells under every condition of the grid.
        batches: the indices of the jobs of each part.
        measure: what else is measured once per setting, if anything.
        batch_tokens: upper bound on the prompt and new tokens of a batch.
        parts: the finished parts.
    """

    model: NeedleModel
    config: NeedleConfig
    settings: Sequence[Setting]
    jobs: Sequence[Job]
    batches: Sequence[Sequence[int]]
    measure: Callable[[Setting], Mapping[str, Any]] | None
    batch_tokens: int
    parts: Parts

    def answer(self, processes: Processes, progress: Progress | None) -> None:
        """Answer what is left of this process's share.

        Raises:
            ModelFailureError: the model fails on the whole first part.
        """
        mine = range(processes.rank, len(self.batches), processes.count)
        measures = self.measure is not None and len(self.batches) % processes.count == processes.rank
        total = sum(len(self.batches[batch]) for batch in mine) * len(self.settings)
        done = 0
        for number, setting in enumerate(self.settings):
            with setting.applied_to(self.model):
                for batch in mine:
                    part = _name_part(number, batch)
                    if not self.parts.has(part):
                        self.parts.write(part, self._ask(setting, batch, is_first=done == 0))
                    done += len(self.batches[batch])
                    if progress:
                        progress(done, total)
                if measures:
                    self._measure(number, setting)

    def _ask(self, setting: Setting, batch: int, *, is_first: bool) -> list[dict[str, Any]]:
        jobs = [self.jobs[index] for index in self.batches[batch]]
        jobs = [(cell, setting.ask(condition)) for cell, condition in jobs]
        answers = answer_jobs(self.model, jobs, self.config, batch_tokens=self.batch_tokens)
        if is_first:
            _check_answers(answers)
        return [asdict(answer) for answer in answers]

    def _measure(self, number: int, setting: Setting) -> None:
        part = _name_part(number, None)
        if self.measure and not self.parts.has(part):
            self.parts.write(part, dict(self.measure(setting)))

    def collect(self) -> list[dict[str, Any]]:
        """The rows of the whole grid, once all processes have answered their shares."""
        rows = []
        for number, setting in enumerate(self.settings):
            answers: dict[int, Answer] = {}
            for batch, indices in enumerate(self.batches):
                found = [Answer(**one) for one in self.parts.read(_name_part(number, batch))]
                answers.update(zip(indices, found, strict=True))
            extra = self.parts.read(_name_part(number, None)) if self.measure else {}
            rows += [
                {**_make_row(cell, condition, setting, answers[index], self.config), **extra}
                for index, (cell, condition) in enumerate(self.jobs)
            ]
        return rows


def _name_part(setting: int, batch: int | None) -> str:
    return f"{setting:05d}-{'measured' if batch is None else f'{batch:05d}'}"


def plan_parts(jobs: Sequence[Job], config: NeedleConfig, batch_tokens: int) -> list[list[int]]:
    """Group the indices of jobs into parts that are asked together, the longest first.

    Prompts of one length and case that begin alike always stay in one part. Groups of the same or
    neighbouring lengths share a part until it has `batch_tokens`.
    """
    groups: dict[tuple[int, str, int], list[int]] = {}
    for index, (cell, condition) in enumerate(jobs):
        opening = replace(condition, prefix=False).name
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
    """Raise `ModelFailureError` if a model has failed on everything that it was asked so far."""
    if all(answer.error for answer in found):
        raise ModelFailureError(
            f"the model failed on each of the first {len(found)} cells ({found[0].error}), so the run ends "
            "here and none of them is kept; remove the cause and run the same command again."
        )


def _make_row(
    cell: Cell, condition: Condition, setting: Setting, answer: Answer, config: NeedleConfig
) -> dict[str, Any]:
    row = {
        **setting.columns,
        "condition": condition.asking.name,
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
    """Write the texts of a grid, gzipped, one JSON object per line; the same cells give the same bytes."""
    lines = "".join(json.dumps(cell_record(cell), ensure_ascii=False) + "\n" for cell in cells)
    write_atomic(path, gzip.compress(lines.encode(), mtime=0))


__all__ = ["Setting", "cell_record", "plan_parts", "run_needle", "run_settings", "save_cells"]
