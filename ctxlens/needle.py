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

from ctxlens.batching import plan_batches
from ctxlens.cells import (
    Cell,
    NeedleConfig,
    NeedleModel,
    build_cells,
    check_indicator,
    describe_cell,
    render_cell,
)
from ctxlens.errors import InputError, RunExistsError
from ctxlens.haystack import Haystack, load_haystack
from ctxlens.recall import NEEDLES, Needle, load_needles, score_recall
from ctxlens.results import NeedleGrid
from ctxlens.runs import Run, write_atomic
from ctxlens.steering import Steering

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
        alpha = self.steering.alpha if self.steering else 1.0
        return {
            "model": self.model, "indicator": self.indicator, "alpha": alpha, "heads": self.heads,
            "draw": self.draw,
        }  # fmt: skip

    def applied_to(self, model: NeedleModel) -> contextlib.AbstractContextManager[Any]:
        """The model steered as this setting says, for as long as the context lasts."""
        if self.steering is None or self.steering.changes_nothing:
            return contextlib.nullcontext()
        s = self.steering
        return model.steer(s.alpha, roles=s.roles, heads=s.heads, mode=s.mode)


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
    progress: Progress | None = None,
) -> NeedleGrid:
    """Build a grid's cells, let the model answer them in every condition, and score the answers.

    Args:
        model: the model, as from `load_model`.
        config: lengths, depths, needles, conditions.
        haystack: what the needles are hidden in (`ctxlens.haystack.load_haystack`).
        indicator: whether the question carries the model's indicator.
        steering: attention steering during the answers.
        label: the model's name in the table; its own by default.
        batch_tokens: how many prompt and new tokens are worked on at once.
        out: a run folder. Finished batches are kept there, so that a run that was stopped, however
            roughly, goes on from there; at the end it holds the grid under `name` and the texts of all
            cells in `<name>-cells.jsonl.gz`.
        name: file name of the grid.
        progress: called with the numbers of finished and of all answers.

    Raises:
        InputError: see `build_cells`; or an indicator is asked of a model that has none.
        RunExistsError: `out` holds another grid under that name.
    """
    cells = build_cells(model, config, haystack)
    heads = "none" if steering is None else "all" if steering.heads == "all" else "chosen"
    setting = Setting(label or model.name, indicator, steering, heads)
    meta = {"haystack": haystack.name, "wording": config.template, "config": config.as_dict()}
    return run_settings(
        model, cells, config, [setting],
        meta=meta, batch_tokens=batch_tokens, out=out, name=name, progress=progress,
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
        progress: called with the numbers of finished and of all answers.
    """
    if any(setting.indicator for setting in settings):
        check_indicator(model)
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
    jobs = [(cell, condition) for cell in cells for condition in config.conditions]
    batches = list(
        plan_batches([cell.context.tokens + config.max_new_tokens for cell, _ in jobs], batch_tokens)
    )
    parts = None
    if out is not None:
        # A part belongs to this grid of this run alone, whatever else has been in the folder.
        parts = _Parts(
            out,
            str(Path(name).with_suffix("")),
            _hash([fingerprint, batch_tokens, out.manifest.get("created")]),
        )
    rows: list[dict[str, Any]] = []
    done = 0
    for number, setting in enumerate(settings):
        answers: dict[int, list[Any]] = {}
        with setting.applied_to(model):
            for b, batch in enumerate(batches):
                found = parts.read(number, b) if parts else None
                if found is None:
                    batch_jobs = [jobs[index] for index in batch]
                    found = _answer(model, batch_jobs, config, setting.indicator)
                    if parts:
                        parts.write(number, b, found)
                answers.update(zip(batch, found, strict=True))
                done += len(batch)
                if progress:
                    progress(done, len(jobs) * len(settings))
            extra = parts.read(number, len(batches)) if parts and measure else None
            if measure and extra is None:
                extra = dict(measure(setting))
                if parts:
                    parts.write(number, len(batches), extra)
        for index, (cell, condition) in enumerate(jobs):
            rows.append({**_row(cell, condition, setting, *answers[index]), **(extra or {})})
    grid = NeedleGrid.from_rows(
        rows, {**(meta or {}), "identity": dict(model.identity), "fingerprint": fingerprint}
    )
    if out is not None and parts is not None:
        save_cells(cells, out.path(f"{parts.stem}-cells.jsonl.gz"))
        out.save(name, grid)
        parts.remove()
    return grid


def _answer(
    model: NeedleModel,
    jobs: Sequence[tuple[Cell, str]],
    config: NeedleConfig,
    indicator: bool,
) -> list[list[Any]]:
    """For each cell and condition the prompt's length in tokens, and the response."""
    chats = [render_cell(model, cell, config, condition, indicator=indicator) for cell, condition in jobs]
    for (cell, condition), chat in zip(jobs, chats, strict=True):
        if chat.n_tokens + config.max_new_tokens > model.n_ctx:
            raise InputError(
                f"cell {cell.number} ({condition}) has {chat.n_tokens} tokens, which with "
                f"{config.max_new_tokens} new ones do not fit the window of {model.n_ctx}; "
                "ask for shorter contexts."
            )
    # The batch was planned by context; what the prompts add to it must not tear it apart.
    room = len(chats) * (max(chat.n_tokens for chat in chats) + config.max_new_tokens)
    texts = model.generate(chats, max_new_tokens=config.max_new_tokens, batch_tokens=room)
    return [[chat.n_tokens, text] for chat, text in zip(chats, texts, strict=True)]


def _row(cell: Cell, condition: str, setting: Setting, prompt_tokens: int, response: str) -> dict[str, Any]:
    return {
        **setting.columns,
        "condition": condition,
        "cell": cell.number,
        "needle": cell.needle.name,
        "context_tokens": cell.context_tokens,
        "prompt_tokens": prompt_tokens,
        "depth_percent": cell.depth_percent,
        "case": cell.case,
        "built_context_tokens": cell.context.tokens,
        "built_depth_percent": cell.context.depth_percent,
        "keywords": ", ".join(cell.needle.keywords),
        "response": response,
        "recall": score_recall(cell.needle.keywords, response),
        "memory_recall": score_recall(cell.needle.memory_keywords, response),
    }


def cell_record(cell: Cell) -> dict[str, Any]:
    """A cell as JSON values."""
    return json.loads(json.dumps(asdict(cell)))


def save_cells(cells: Sequence[Cell], path: Path) -> None:
    """Write the texts of a grid, one JSON object a line, gzipped; the same cells give the same bytes."""
    lines = "".join(json.dumps(cell_record(cell), ensure_ascii=False) + "\n" for cell in cells)
    write_atomic(path, gzip.compress(lines.encode(), mtime=0))


@dataclass(frozen=True)
class _Parts:
    """Finished batches of one grid, each in a file of its own until the grid is whole."""

    out: Run
    stem: str
    key: str

    def _path(self, setting: int, batch: int) -> Path:
        return self.out.path(f"{self.stem}.parts") / self.key / f"{setting:05d}-{batch:05d}.json"

    def read(self, setting: int, batch: int) -> Any:
        path = self._path(setting, batch)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write(self, setting: int, batch: int, content: Any) -> None:
        write_atomic(self._path(setting, batch), json.dumps(content))

    def remove(self) -> None:
        shutil.rmtree(self.out.path(f"{self.stem}.parts"), ignore_errors=True)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


__all__ = [
    "NEEDLES", "Cell", "Needle", "NeedleConfig", "Setting", "build_cells", "cell_record",
    "check_indicator", "describe_cell", "load_haystack", "load_needles", "run_needle", "run_settings",
    "save_cells", "score_recall",
]  # fmt: skip
