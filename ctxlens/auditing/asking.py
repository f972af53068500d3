"""How the demo and the audit measure one model: its answers under several settings, and where it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ctxlens.auditing.pace import Pace, group_texts
from ctxlens.chat.condition import Condition
from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.prompts import Cell, render_cell
from ctxlens.evals.needle.run import Setting, cell_record, run_settings, save_cells
from ctxlens.heads.answers import needle_tokens
from ctxlens.models import Model
from ctxlens.results import HeadMap, NeedleGrid, RoleAllocation
from ctxlens.runs import PartFormat, Parts, Progress, Run, digest

_FACT = Role.INDICATOR
"""The role that stands for the fact's tokens while they are read; these questions carry no indicator."""
_ALLOCATIONS = PartFormat(".safetensors", RoleAllocation.write, RoleAllocation.load)


@dataclass(frozen=True)
class Share:
    """What a budget grants to a set of questions.

    Attributes:
        stage: the stage of the audit.
        planned: planned seconds.
        least: texts that are asked in any case.
    """

    stage: str
    planned: float
    least: int


@dataclass(frozen=True, kw_only=True)
class Asker:
    """One model that is measured into a run folder.

    Attributes:
        model: the model.
        label: its name in files and tables.
        run: the run folder.
        batch_tokens: upper bound on the tokens of a batch.
        pace: keeps a budget; None measures everything.
    """

    model: Model
    label: str
    run: Run
    batch_tokens: int = 8192
    pace: Pace | None = None

    def ask(
        self,
        cells: Sequence[Cell],
        config: NeedleConfig,
        settings: Sequence[Setting],
        name: str,
        tell: Progress,
        *,
        share: Share | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> NeedleGrid:
        """Ask some cells under several settings, into a file of the run folder.

        With a pace and a share of its budget, a few texts are asked at a time, as many as the time allows.

        Args:
            cells: the cells.
            config: their configuration.
            settings: how they are asked.
            name: the file.
            tell: called with the number of answers that are done, and of all.
            share: what the budget grants.
            meta: further entries of the grid's `meta`.
        """
        if self.pace is None or share is None:
            return self._ask(cells, config, settings, name, tell, meta)
        if self.run.has(name):
            return NeedleGrid.load(self.run.path(name))
        groups = group_texts([cell.case for cell in cells])
        n_texts, done, found = sum(map(len, groups)), 0, []
        part = share.stage if share.stage == "loss" else name
        answers = len(cells) * len(config.conditions) * len(settings)
        for number, texts in enumerate(groups):
            goes_on = self.pace.goes_on(share.stage, share.planned, done, n_texts, share.least)
            if done >= self.pace.most_texts(part, n_texts) or not goes_on:
                break
            some = [cell for cell in cells if cell.case in texts]
            file = str(Path(name).with_suffix(f".{number}.parquet"))
            fresh, begun, before = not self.run.has(file), self.pace.spent, answers * done // n_texts

            def told(n: int, _: int, before: int = before) -> None:
                tell(before + n, answers)

            found.append(self._ask(some, config, settings, file, told, meta))
            done += len(texts)
            if fresh:
                self.pace.measured(self.pace.spent - begun, share.planned * len(texts) / n_texts)
        self.pace.finish(part, done)
        asked = {cell for grid in found for cell in grid.frame["cell"]}
        return self._join(name, found, [cell for cell in cells if cell.number in asked])

    def _ask(
        self,
        cells: Sequence[Cell],
        config: NeedleConfig,
        settings: Sequence[Setting],
        name: str,
        tell: Progress,
        meta: Mapping[str, Any] | None,
    ) -> NeedleGrid:
        return run_settings(
            self.model, cells, config, settings, meta=meta, batch_tokens=self.batch_tokens, out=self.run,
            name=name, progress=tell,
        )  # fmt: skip

    def _join(self, name: str, found: Sequence[NeedleGrid], cells: Sequence[Cell]) -> NeedleGrid:
        """Write the grid of all groups, and its texts, in place of the groups' files."""
        path = self.run.path(name)
        grid = NeedleGrid.concat(found)
        grid = NeedleGrid(grid.frame, {**grid.meta, "cells": digest([cell_record(cell) for cell in cells])})
        save_cells(cells, path.with_name(f"{path.stem}-cells.jsonl.gz"))
        self.run.save(name, grid)
        for group in path.parent.glob(f"{path.stem}.[0-9]*"):
            group.unlink()
        return grid

    def read(self, cells: Sequence[Cell], config: NeedleConfig, tell: Progress) -> None:
        """Read the attention by role where the answer begins, under every condition; sinks are measured.

        Two files are written for each condition: `allocation-LABEL-CONDITION.safetensors`, and
        `stages/map-fact-LABEL-CONDITION.safetensors` with the attention to the fact that is asked for. The
        prefix of the answer is not part of the condition's name there.

        Args:
            cells: the cells.
            config: their configuration.
            tell: called with the number of texts that are read, and of all.
        """
        done, total = 0, len(config.conditions) * len(cells)
        for condition in config.conditions:
            view = name_view(condition)
            if self.run.has(self._map_name(view)):  # written last; a kill may have come after it
                tell(done := done + len(cells), total)
                continue
            made_of = [config.as_dict(), [cell_record(cell) for cell in cells]]
            parts = Parts(self.run, f"roles-{self.label}-{view}", made_of, form=_ALLOCATIONS)
            found: list[RoleAllocation] = []
            for cell in cells:

                def read(cell: Cell = cell, condition: Condition = condition) -> RoleAllocation:
                    return read_with_fact(self.model, render_cell(self.model, cell, config, condition), cell)

                found.append(parts.get(str(cell.number), read))
                tell(done := done + 1, total)
            self._save_roles(view, found, [cell.case for cell in cells])
            parts.remove()

    def _save_roles(self, view: str, found: Sequence[RoleAllocation], texts: Sequence[int]) -> None:
        """Write the attention by role of all texts, and the attention to their facts."""
        marked = RoleAllocation.concat(found)
        meta = {**marked.meta, "model": self.label, "condition": view}
        self.run.save(f"allocation-{self.label}-{view}.safetensors", replace(without_fact(marked), meta=meta))
        effects = np.moveaxis(marked.share(_FACT), -1, 0).astype(float)
        quantity = "share of attention to the fact that is asked for"
        fact = HeadMap(effects, np.asarray(texts), "fact", {**meta, "quantity": quantity})
        self.run.save(self._map_name(view), fact)

    def _map_name(self, view: str) -> str:
        """The file with the attention to the facts under a condition."""
        return f"stages/map-fact-{self.label}-{view}.safetensors"


def name_view(condition: str | Condition) -> str:
    """A condition's name without the prefix of the answer, as attention files have it."""
    return replace(Condition.parse(condition), prefix=False).name


def read_with_fact(model: Model, chat: RenderedChat, cell: Cell) -> RoleAllocation:
    """Attention by role with sinks, in one pass with the attention to the fact (role `indicator`)."""
    role = chat.role.copy()
    role[needle_tokens(chat, cell)] = int(_FACT)
    read = model.read_roles(replace(chat, role=role), sinks=True)
    return replace(read, query_labels=(f"cell {cell.number}",))


def without_fact(allocation: RoleAllocation) -> RoleAllocation:
    """The allocation with the fact's tokens counted as the user's again."""

    def merge(values: np.ndarray) -> np.ndarray:
        merged = values.copy()
        merged[..., Role.USER] += merged[..., _FACT]
        merged[..., _FACT] = 0
        return merged

    resting = None if allocation.resting is None else merge(allocation.resting)
    return replace(
        allocation, shares=merge(allocation.shares), key_counts=merge(allocation.key_counts), resting=resting
    )


__all__ = ["Asker", "Share", "name_view", "read_with_fact", "without_fact"]
