"""What an audit measures: needles, attention by role, and steering with its controls, each into its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ctxlens.auditing.asking import Asker, Share
from ctxlens.auditing.pace import LEAST
from ctxlens.auditing.plan import CONDITIONS, Plan
from ctxlens.chat.condition import Condition
from ctxlens.evals.closed_book import run_closed_book
from ctxlens.evals.needle.config import NeedleConfig
from ctxlens.evals.needle.prompts import Cell
from ctxlens.evals.needle.run import Setting
from ctxlens.evals.texts import Material, build_cells
from ctxlens.heads.choose import Head, draw_random_heads
from ctxlens.heads.sweep import sweep_settings
from ctxlens.results import Ability, HeadMap, NeedleGrid
from ctxlens.results.audit import TEMPLATE, choose_alpha
from ctxlens.runs import PartFormat, Parts, Progress, digest

MAX_NEW_TOKENS = 24
"""Upper bound on an answer; its prefix leaves only the fact's words to write."""
NEEDLE_HEADS = 0.1
"""The part of all heads that is steered as the heads that attend to the facts."""
_ABILITIES = PartFormat(".parquet", Ability.write, Ability.load)


@dataclass(frozen=True, kw_only=True)
class Bench(Asker):
    """One model in an audit.

    Attributes:
        material: the texts.
        plan: the plan.
        seed: seed of texts and random heads.
        n_models: how many models share the planned time of the loss.
    """

    material: Material
    plan: Plan
    seed: int
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

    @property
    def source(self) -> dict[str, str]:
        """Where the texts come from, for the grids."""
        return {"haystack": self.material.haystack.name}

    def unsteered(self) -> NeedleGrid:
        """The answers of the loss."""
        return NeedleGrid.load(self.run.path(f"stages/needle-{self.label}.parquet"))


def measure_loss(bench: Bench, tell: Progress) -> NeedleGrid:
    """Ask every question without and with the template."""
    share = Share("loss", bench.plan.seconds["loss"] / bench.n_models, LEAST["loss"])
    return bench.ask(
        bench.cells(), bench.grid_config(), [Setting(bench.label)], f"stages/needle-{bench.label}.parquet",
        tell, share=share, meta=bench.source,
    )  # fmt: skip


def measure_controls(bench: Bench, tell: Progress) -> NeedleGrid:
    """Ask the questions under the controls."""
    share = Share("controls", bench.plan.seconds["controls"], LEAST["controls"])
    return bench.ask(
        bench.detail_cells(), bench.grid_config(bench.plan.controls), [Setting(bench.label)],
        "stages/controls.parquet", tell, share=share, meta=bench.source,
    )  # fmt: skip


def measure_bias(bench: Bench, tell: Progress) -> None:
    """Read the attention by role where the answer begins, one question per text."""
    config = bench.config(CONDITIONS, [bench.plan.role_length], bench.plan.role_texts)
    cells = build_cells(bench.model, bench.material, config, min(bench.plan.facts))
    bench.read([one_of_text(cells, text) for text in range(bench.plan.role_texts)], config, tell)


def one_of_text(cells: Sequence[Cell], text: int) -> Cell:
    """One question about a text; over the texts, the questions come from all depths in turn."""
    of_text = [cell for cell in cells if cell.case == text]
    return of_text[text % len(of_text)]


def find_fact_heads(fact: HeadMap) -> tuple[Head, ...]:
    """The heads with the most attention to the fact, without the template, on the texts that choose α."""
    chosen = fact.of_contexts([int(text) for text in fact.contexts if text % 2 == 0])
    n = max(1, round(NEEDLE_HEADS * chosen.values.size))
    return tuple(sorted(chosen.ranking()[:n]))


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

    def steer(alphas: Sequence[float], *sets: tuple[str, int, Any]) -> list[Setting]:
        return sweep_settings(model, sets, alphas, label=bench.label)[1:]

    def ask(
        asked: Sequence[Cell], config: NeedleConfig, settings: Sequence[Setting], name: str, before: int
    ) -> NeedleGrid:
        share = Share("cause", per_answer * len(asked) * len(settings), LEAST["cause"] // 2)
        return bench.ask(
            asked, config, settings, f"stages/steering-{name}.parquet",
            lambda done, _: tell(before + done, total), share=share, meta=bench.source,
        )  # fmt: skip

    trials = steer(plan.alphas, ("all", 0, "all"), ("retrieval", 0, heads))
    tried = ask(choosing, template, trials, "choose", 0)
    best = {name: choose_alpha(tried, bench.unsteered(), name) for name in ("all", "retrieval")}
    others = draw_random_heads(
        heads, model.n_heads, n_draws=plan.draws, seed=bench.seed, n_layers=model.n_layers
    )
    drawn = [("random", draw, chosen) for draw, chosen in enumerate(others)]
    everything = steer([best["all"]], ("all", 0, "all"))
    judged = [*everything, *steer([best["retrieval"]], ("retrieval", 0, heads), *drawn)]
    found = ask(judging, template, judged, "judge", n_trials)
    measured = set(found.frame["cell"])
    again = [cell for cell in judging if cell.number in measured]
    ask(again, plain, everything, "plain", total - len(judging))
    bench.run.write_json("stages/heads.json", {"alphas": best, "facts": heads, "random": others})


def measure_cost(bench: Bench, tell: Progress) -> None:
    """Ask what needs no text, unsteered and with the α that all heads were steered with."""
    if bench.run.has("ability.parquet"):
        return
    alpha = bench.run.read_json("stages/heads.json")["alphas"]["all"]
    made_of = [digest(bench.model.identity), [question.question for question in bench.material.questions]]
    parts = Parts(bench.run, "cost", made_of, form=_ABILITIES)

    def answer(one: float) -> Ability:
        with bench.model.steer(one):
            table = run_closed_book(
                bench.model, bench.material.questions, label=bench.label, max_new_tokens=MAX_NEW_TOKENS
            )
        return Ability(table.frame.assign(alpha=one), table.meta)

    tables = []
    for number, one in enumerate((1.0, alpha)):
        tables.append(parts.get(f"alpha-{one}", partial(answer, one)))
        tell(number + 1, 2)
    bench.run.save("ability.parquet", Ability.concat(tables))
    parts.remove()


def join_steering(bench: Bench) -> NeedleGrid:
    """All steered cells with the unsteered ones of the same texts, for figures."""
    at = bench.plan.detail_length
    steered = [
        NeedleGrid.load(bench.run.path(f"stages/steering-{part}.parquet")) for part in ("choose", "judge")
    ]
    return NeedleGrid.concat([bench.unsteered().where(context_tokens=at, condition=TEMPLATE), *steered])


__all__ = [
    "Bench", "find_fact_heads", "join_steering", "measure_bias", "measure_cause", "measure_controls",
    "measure_cost", "measure_loss",
]  # fmt: skip
