"""What an audit measures: needles, attention by role, and steering with its controls, each into its files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ctxlens.auditing.pace import LEAST, Pace, group_texts
from ctxlens.auditing.plan import CONDITIONS, Plan
from ctxlens.auditing.texts import Material, build_cells
from ctxlens.chat.condition import Condition
from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.errors import InputError
from ctxlens.evals.closed_book import run_closed_book
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.prompts import Cell, render_cell
from ctxlens.evals.needle.run import Setting, cell_record, run_settings, save_cells
from ctxlens.heads.answers import needle_tokens
from ctxlens.heads.choose import Head, draw_random_heads
from ctxlens.models import Model
from ctxlens.models.attention.steering import Steering
from ctxlens.results import Ability, HeadMap, NeedleGrid, RoleAllocation
from ctxlens.results.audit import TEMPLATE, choose_alpha
from ctxlens.runs import PartFormat, Parts, Progress, Run, digest

MAX_NEW_TOKENS = 24
"""Upper bound on an answer; its prefix leaves only the fact's words to write."""
NEEDLE_HEADS = 0.1
"""The part of all heads that is steered as the heads that attend to the facts."""


@dataclass(frozen=True)
class Bench:
    """One model in an audit.

    Attributes:
        model: the model.
        label: its name in files and tables.
        material: the texts.
        plan: the plan.
        seed: seed of texts and random heads.
        run: the run folder.
        batch_tokens: upper bound on the tokens of a batch.
        pace: keeps the budget; None measures everything.
        n_models: how many models share the planned time of the loss.
    """

    model: Model
    label: str
    material: Material
    plan: Plan
    seed: int
    run: Run
    batch_tokens: int = 8192
    pace: Pace | None = None
    n_models: int = 1

    def config(self, conditions: Sequence[Condition], lengths: Sequence[int], n_texts: int) -> NeedleConfig:
        """The configuration of some cells of the audit."""
        return NeedleConfig(
            lengths=tuple(lengths), depths=max(self.plan.facts), needles=self.material.facts,
            conditions=tuple(conditions), cases_per_cell=n_texts, max_new_tokens=MAX_NEW_TOKENS,
            seed=self.seed, score=("recall",),
        )  # fmt: skip

    def grid_config(self, conditions: Sequence[Condition] = CONDITIONS) -> NeedleConfig:
        """The configuration of the grid of all lengths."""
        return self.config(conditions, self.plan.lengths, self.plan.n_texts)

    def cells(self) -> list[Cell]:
        """The cells of all lengths."""
        return build_cells(self.model, self.material, self.grid_config(), self.plan.facts)

    def detail_cells(self) -> list[Cell]:
        """The cells of the length at which controls and cause are measured, as far as they were asked."""
        at = self.plan.detail_length
        asked = set(self.unsteered().where(context_tokens=at).frame["cell"])
        return [cell for cell in self.cells() if cell.number in asked]

    def unsteered(self) -> NeedleGrid:
        """The answers of the loss."""
        return NeedleGrid.load(self.run.path(f"stages/needle-{self.label}.parquet"))

    def ask(
        self,
        cells: Sequence[Cell],
        config: NeedleConfig,
        settings: Sequence[Setting],
        name: str,
        tell: Progress,
        *,
        stage: str,
        planned: float,
        least: int,
    ) -> NeedleGrid:
        """Ask some cells under several settings, into a file of the run folder, text by text as time allows.

        Args:
            cells: the cells.
            config: their configuration.
            settings: how they are asked.
            name: the file.
            tell: called with the number of answers that are done, and of all.
            stage: the stage of the audit.
            planned: planned seconds.
            least: texts that are asked in any case.
        """
        if self.run.has(name):
            return NeedleGrid.load(self.run.path(name))
        groups = group_texts([cell.case for cell in cells])
        n_texts, done, found = sum(map(len, groups)), 0, []
        part = stage if stage == "loss" else name
        most = n_texts if self.pace is None else self.pace.most_texts(part, n_texts)
        answers = len(cells) * len(config.conditions) * len(settings)
        for number, texts in enumerate(groups):
            stops = self.pace is not None and not self.pace.goes_on(stage, planned, done, n_texts, least)
            if stops or done >= most:
                break
            before = answers * done // n_texts
            found.append(
                self._ask_group(
                    [cell for cell in cells if cell.case in texts], config, settings,
                    str(Path(name).with_suffix(f".{number}.parquet")),
                    lambda n, _, before=before: tell(before + n, answers),
                    planned * len(texts) / n_texts,
                )
            )  # fmt: skip
            done += len(texts)
        if self.pace is not None:
            self.pace.finish(part, done)
        asked = {cell for grid in found for cell in grid.frame["cell"]}
        return self._join(name, found, [cell for cell in cells if cell.number in asked])

    def _ask_group(
        self,
        cells: Sequence[Cell],
        config: NeedleConfig,
        settings: Sequence[Setting],
        name: str,
        tell: Progress,
        planned: float,
    ) -> NeedleGrid:
        """Ask the cells of a few texts, and tell the pace how long that took if it was not done before."""
        fresh, begun = not self.run.has(name), self.pace.spent if self.pace else 0.0
        grid = run_settings(
            self.model, cells, config, settings, meta={"haystack": self.material.haystack.name},
            batch_tokens=self.batch_tokens, out=self.run, name=name, progress=tell,
        )  # fmt: skip
        if self.pace is not None and fresh:
            self.pace.measured(self.pace.spent - begun, planned)
        return grid

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


def measure_loss(bench: Bench, tell: Progress) -> NeedleGrid:
    """Ask every question without and with the template."""
    return bench.ask(
        bench.cells(), bench.grid_config(), [Setting(bench.label)], f"stages/needle-{bench.label}.parquet",
        tell, stage="loss", planned=bench.plan.seconds["loss"] / bench.n_models, least=LEAST["loss"],
    )  # fmt: skip


def measure_controls(bench: Bench, tell: Progress) -> NeedleGrid:
    """Ask the questions under the controls."""
    return bench.ask(
        bench.detail_cells(), bench.grid_config(bench.plan.controls), [Setting(bench.label)],
        "stages/controls.parquet", tell, stage="controls", planned=bench.plan.seconds["controls"],
        least=LEAST["controls"],
    )  # fmt: skip


def measure_bias(bench: Bench, tell: Progress) -> None:
    """Read the attention by role where the answer begins, sinks aside, one question per text.

    Two files are written for each condition: `allocation-LABEL-CONDITION.safetensors`, and
    `map-fact-LABEL-CONDITION.safetensors` with the attention to the fact that is asked for.
    """
    config = bench.config(CONDITIONS, [bench.plan.role_length], bench.plan.role_texts)
    cells = build_cells(bench.model, bench.material, config, min(bench.plan.facts))
    cells = [one_of_text(cells, text) for text in range(bench.plan.role_texts)]
    done, total = 0, len(CONDITIONS) * len(cells)
    for condition in CONDITIONS:
        view = replace(condition, prefix=False).name
        parts = Parts(bench.run, f"roles-{bench.label}-{view}", [bench.plan.as_dict()], form=_ALLOCATIONS)
        found: list[RoleAllocation] = []
        for cell in cells:

            def read(cell: Cell = cell, condition: Condition = condition) -> RoleAllocation:
                return read_with_fact(bench.model, render_cell(bench.model, cell, config, condition), cell)

            found.append(parts.get(str(cell.number), read))
            tell(done := done + 1, total)
        save_roles(bench, view, found)
        parts.remove()


def one_of_text(cells: Sequence[Cell], text: int) -> Cell:
    """One question about a text; over the texts, the questions come from all depths in turn."""
    of_text = [cell for cell in cells if cell.case == text]
    return of_text[text % len(of_text)]


_FACT = Role.INDICATOR
"""The role that stands for the fact's tokens while they are read; audits give no indicator."""


def read_with_fact(model: Model, chat: RenderedChat, cell: Cell) -> RoleAllocation:
    """Attention by role with sinks, in one pass with the attention to the fact (role `indicator`)."""
    role = chat.role.copy()
    role[needle_tokens(chat, cell)] = int(_FACT)
    read = model.read_roles(replace(chat, role=role), sinks=True)
    return replace(read, query_labels=(f"cell {cell.number}",))


def save_roles(bench: Bench, view: str, found: Sequence[RoleAllocation]) -> None:
    """Write the attention by role of all texts, and the attention to their facts."""
    marked = RoleAllocation.concat(found)
    meta = {**marked.meta, "model": bench.label, "condition": view}
    bench.run.save(f"allocation-{bench.label}-{view}.safetensors", replace(without_fact(marked), meta=meta))
    effects = np.moveaxis(marked.share(_FACT), -1, 0).astype(float)
    quantity = "share of attention to the fact that is asked for"
    fact = HeadMap(effects, np.arange(len(found)), "fact", {**meta, "quantity": quantity})
    bench.run.save(f"stages/map-fact-{bench.label}-{view}.safetensors", fact)


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


def find_fact_heads(fact: HeadMap) -> tuple[Head, ...]:
    """The heads with the most attention to the fact, without the template, on the texts that choose α."""
    chosen = fact.of_contexts([int(text) for text in fact.contexts if text % 2 == 0])
    n = max(1, round(NEEDLE_HEADS * chosen.values.size))
    return tuple(sorted(chosen.ranking()[:n]))


def draw_others(
    heads: Sequence[Head], n_layers: int, n_heads: int, n_draws: int, seed: int
) -> list[tuple[Head, ...]]:
    """As many other heads, of the same layers where these have enough of them."""
    try:
        return draw_random_heads(heads, n_heads, n_draws=n_draws, seed=seed)
    except InputError:
        rng = random.Random(f"audit-heads-{seed}")
        others = [(i, j) for i in range(n_layers) for j in range(n_heads) if (i, j) not in set(heads)]
        n = min(len(heads), len(others))
        return [tuple(sorted(rng.sample(others, n))) for _ in range(n_draws)]


def measure_cause(bench: Bench, tell: Progress) -> None:
    """Choose α on the even texts and steer with it on the odd ones, with both controls.

    `stages/steering-choose.parquet` holds the trials, `stages/steering-judge.parquet` the judged texts under
    the template, `stages/steering-plain.parquet` those without it.
    """
    model, plan = bench.model, bench.plan
    fact = HeadMap.load(bench.run.path(f"stages/map-fact-{bench.label}-plain.safetensors"))
    heads = find_fact_heads(fact)
    cells = bench.detail_cells()
    choosing = [cell for cell in cells if cell.case % 2 == 0]
    judging = [cell for cell in cells if cell.case % 2 == 1]
    template, plain = bench.grid_config(CONDITIONS[1:]), bench.grid_config(CONDITIONS[:1])
    n_trials, n_judged = 2 * len(plan.alphas) * len(choosing), (3 + plan.draws) * len(judging)
    total = n_trials + n_judged
    per_answer = plan.seconds["cause"] / total

    def setting(alpha: float, chosen: Sequence[Head] | str, name: str, draw: int = 0) -> Setting:
        steered = Steering(alpha, heads="all" if isinstance(chosen, str) else tuple(chosen))
        return Setting(bench.label, steering=steered, heads=name, draw=draw)

    def ask(
        asked: Sequence[Cell], config: NeedleConfig, settings: Sequence[Setting], name: str, before: int
    ) -> NeedleGrid:
        return bench.ask(
            asked, config, settings, f"stages/steering-{name}.parquet",
            lambda done, _: tell(before + done, total), stage="cause",
            planned=per_answer * len(asked) * len(settings), least=LEAST["cause"] // 2,
        )  # fmt: skip

    trials = [setting(alpha, "all", "all") for alpha in plan.alphas]
    trials += [setting(alpha, heads, "retrieval") for alpha in plan.alphas]
    tried = ask(choosing, template, trials, "choose", 0)
    best = {name: choose_alpha(tried, bench.unsteered(), name) for name in ("all", "retrieval")}
    others = draw_others(heads, model.n_layers, model.n_heads, plan.draws, bench.seed)
    judged = [setting(best["all"], "all", "all"), setting(best["retrieval"], heads, "retrieval")]
    judged += [setting(best["retrieval"], drawn, "random", draw) for draw, drawn in enumerate(others)]
    found = ask(judging, template, judged, "judge", n_trials)
    measured = set(found.frame["cell"])
    again = [cell for cell in judging if cell.number in measured]
    ask(again, plain, judged[:1], "plain", total - len(judging))
    bench.run.write_json("stages/heads.json", {"alphas": best, "facts": heads, "random": others})


def measure_cost(bench: Bench, tell: Progress) -> None:
    """Ask what needs no text, unsteered and with the α that all heads were steered with."""
    alpha = bench.run.read_json("stages/heads.json")["alphas"]["all"]
    tables = []
    for number, one in enumerate((1.0, alpha)):
        with bench.model.steer(one):
            table = run_closed_book(
                bench.model, bench.material.questions, label=bench.label, max_new_tokens=MAX_NEW_TOKENS
            )
        tables.append(Ability(table.frame.assign(alpha=one), table.meta))
        tell(number + 1, 2)
    bench.run.save("ability.parquet", Ability.concat(tables))


def join_steering(bench: Bench) -> NeedleGrid:
    """All steered cells with the unsteered ones of the same texts, for figures."""
    at = bench.plan.detail_length
    steered = [
        NeedleGrid.load(bench.run.path(f"stages/steering-{part}.parquet")) for part in ("choose", "judge")
    ]
    return NeedleGrid.concat([bench.unsteered().where(context_tokens=at, condition=TEMPLATE), *steered])


_ALLOCATIONS = PartFormat(".safetensors", RoleAllocation.write, RoleAllocation.load)

__all__ = [
    "Bench", "find_fact_heads", "join_steering", "measure_bias", "measure_cause", "measure_controls",
    "measure_cost", "measure_loss",
]  # fmt: skip
