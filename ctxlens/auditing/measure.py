"""What an audit measures: needles, attention by role, and steering with its controls, each into its files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ctxlens.auditing.plan import CONDITIONS, PER_TEXT, Plan
from ctxlens.auditing.texts import Material, build_cells
from ctxlens.chat.condition import Condition
from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.errors import InputError
from ctxlens.evals.closed_book import run_closed_book
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.prompts import Cell, render_cell
from ctxlens.evals.needle.run import Setting, run_settings
from ctxlens.heads.answers import needle_tokens
from ctxlens.heads.choose import Head, draw_random_heads
from ctxlens.models import Model
from ctxlens.models.attention.steering import Steering
from ctxlens.results import Ability, HeadMap, NeedleGrid, RoleAllocation
from ctxlens.results.audit import TEMPLATE, choose_alpha
from ctxlens.runs import PartFormat, Parts, Progress, Run

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
    """

    model: Model
    label: str
    material: Material
    plan: Plan
    seed: int
    run: Run
    batch_tokens: int = 8192

    def config(self, conditions: Sequence[Condition], lengths: Sequence[int], n_texts: int) -> NeedleConfig:
        """The configuration of some cells of the audit."""
        return NeedleConfig(
            lengths=tuple(lengths), depths=PER_TEXT, needles=self.material.facts,
            conditions=tuple(conditions), cases_per_cell=n_texts, max_new_tokens=MAX_NEW_TOKENS,
            seed=self.seed, score=("recall",),
        )  # fmt: skip

    def grid_config(self, conditions: Sequence[Condition] = CONDITIONS) -> NeedleConfig:
        """The configuration of the grid of all lengths."""
        return self.config(conditions, self.plan.lengths, self.plan.n_texts)

    def cells(self) -> list[Cell]:
        """The cells of all lengths."""
        return build_cells(self.model, self.material, self.grid_config(), PER_TEXT)

    def longest_cells(self) -> list[Cell]:
        """The cells of the longest length."""
        return [cell for cell in self.cells() if cell.context_tokens == self.plan.lengths[-1]]

    def ask(
        self,
        cells: Sequence[Cell],
        config: NeedleConfig,
        settings: Sequence[Setting],
        name: str,
        tell: Progress,
    ) -> NeedleGrid:
        """Ask some cells under several settings, into a file of the run folder."""
        return run_settings(
            self.model, cells, config, settings, meta={"haystack": self.material.haystack.name},
            batch_tokens=self.batch_tokens, out=self.run, name=name, progress=tell,
        )  # fmt: skip


def measure_loss(bench: Bench, tell: Progress) -> NeedleGrid:
    """Ask every question without and with the template."""
    name = f"stages/needle-{bench.label}.parquet"
    return bench.ask(bench.cells(), bench.grid_config(), [Setting(bench.label)], name, tell)


def measure_controls(bench: Bench, tell: Progress) -> NeedleGrid:
    """Ask the questions about the longest texts under the controls."""
    config = bench.grid_config(bench.plan.controls)
    name = "stages/controls.parquet"
    return bench.ask(bench.longest_cells(), config, [Setting(bench.label)], name, tell)


def measure_bias(bench: Bench, tell: Progress) -> None:
    """Read the attention by role where the answer begins, sinks aside, one question per text.

    Two files are written for each condition: `allocation-LABEL-CONDITION.safetensors`, and
    `map-fact-LABEL-CONDITION.safetensors` with the attention to the fact that is asked for.
    """
    config = bench.config(CONDITIONS, [bench.plan.role_length], bench.plan.role_texts)
    cells = build_cells(bench.model, bench.material, config, PER_TEXT)
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
    return [cell for cell in cells if cell.case == text][text % PER_TEXT]


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
    cells = bench.longest_cells()
    choosing = [cell for cell in cells if cell.case % 2 == 0]
    judging = [cell for cell in cells if cell.case % 2 == 1]
    template, plain = bench.grid_config(CONDITIONS[1:]), bench.grid_config(CONDITIONS[:1])
    n_trials, n_judged = 2 * len(plan.alphas) * len(choosing), (3 + plan.draws) * len(judging)
    total = n_trials + n_judged

    def setting(alpha: float, chosen: Sequence[Head] | str, name: str, draw: int = 0) -> Setting:
        steered = Steering(alpha, heads="all" if isinstance(chosen, str) else tuple(chosen))
        return Setting(bench.label, steering=steered, heads=name, draw=draw)

    trials = [setting(alpha, "all", "all") for alpha in plan.alphas]
    trials += [setting(alpha, heads, "retrieval") for alpha in plan.alphas]
    tried = bench.ask(
        choosing, template, trials, "stages/steering-choose.parquet", lambda done, _: tell(done, total)
    )
    unsteered = NeedleGrid.load(bench.run.path(f"stages/needle-{bench.label}.parquet"))
    best = {name: choose_alpha(tried, unsteered, name) for name in ("all", "retrieval")}
    others = draw_others(heads, model.n_layers, model.n_heads, plan.draws, bench.seed)
    judged = [setting(best["all"], "all", "all"), setting(best["retrieval"], heads, "retrieval")]
    judged += [setting(best["retrieval"], drawn, "random", draw) for draw, drawn in enumerate(others)]
    bench.ask(judging, template, judged, "stages/steering-judge.parquet",
              lambda done, _: tell(n_trials + done, total))  # fmt: skip
    bench.ask(judging, plain, judged[:1], "stages/steering-plain.parquet",
              lambda done, _: tell(total - len(judging) + done, total))  # fmt: skip
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
    longest = bench.plan.lengths[-1]
    unsteered = NeedleGrid.load(bench.run.path(f"stages/needle-{bench.label}.parquet"))
    steered = [
        NeedleGrid.load(bench.run.path(f"stages/steering-{part}.parquet")) for part in ("choose", "judge")
    ]
    return NeedleGrid.concat([unsteered.where(context_tokens=longest, condition=TEMPLATE), *steered])


_ALLOCATIONS = PartFormat(".safetensors", RoleAllocation.write, RoleAllocation.load)

__all__ = [
    "Bench", "find_fact_heads", "join_steering", "measure_bias", "measure_cause", "measure_controls",
    "measure_cost", "measure_loss",
]  # fmt: skip
