"""All head experiments on one model in one run folder; finished results are not computed again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ctxlens.errors import InputError
from ctxlens.evals.closed_book import AnsweredQuestion
from ctxlens.heads.answers import Answers
from ctxlens.heads.choose import Head
from ctxlens.heads.copying import copying_map, user_share_map
from ctxlens.heads.cumulative import cumulative_curves
from ctxlens.heads.gradient import gradient_map
from ctxlens.heads.maps import act_on_each_head, rank_heads
from ctxlens.heads.sweep import steering_sweep
from ctxlens.heads.tradeoff import side_effects
from ctxlens.models import Model
from ctxlens.models.attention.steering import Steering
from ctxlens.results import Ability, HeadCurves, HeadMap, NeedleGrid
from ctxlens.runs import Progress, Run

KINDS = ("retrieval", "gradient", "steer", "ablate", "cumulative", "sweep")
"""The experiments in the order in which they run: which heads read and copy the needle; the derivative by
every head's bias; steering one head at a time; switching one head off at a time; acting on the first k heads
of each ranking; recall and side effects by α."""
ABLATIONS = ("zero", "mean", "blind")
_R = TypeVar("_R", HeadMap, HeadCurves, NeedleGrid, Ability)

Tell = Callable[[str], Progress]
"""Returns the progress callback of a stage, given the stage's name."""


@dataclass(frozen=True)
class HeadStudy:
    """Head experiments on one model and one set of cells.

    Attributes:
        model: the model.
        answers: the cells, how they are asked and what is measured.
        run: the run folder of the results; with None the study can be described but not run.
        alpha: strength of steering in maps and curves.
        alphas: steering strengths of the sweep.
        ablations: the kinds of ablation that are mapped.
        actions: the actions of the cumulative curves, from `ctxlens.heads.ACTIONS`.
        heads: the heads of the maps, by default all.
        n_draws: number of random head sets in the sweep; 0 for no random controls at all.
        curve_draws: number of random orders for the curves; they are cheap.
        questions: questions without context that measure the side effects of the sweep; empty to skip them.
        seed: seed of the draws.

    Raises:
        InputError: alpha is outside (0, 1], or the model lacks a head.
    """

    model: Model
    answers: Answers
    run: Run | None
    alpha: float = 0.1
    alphas: Sequence[float] = (0.7, 0.5, 0.3, 0.1, 0.03)
    ablations: Sequence[str] = ABLATIONS
    actions: Sequence[str] = ("steer", "blind")
    heads: Sequence[Head] | None = None
    n_draws: int = 3
    curve_draws: int = 10
    questions: Sequence[AnsweredQuestion] = field(default=(), repr=False)
    seed: int = 0

    def __post_init__(self) -> None:
        heads = "all" if self.heads is None else tuple(self.heads)
        for alpha in (self.alpha, *self.alphas):
            Steering(alpha, heads=heads).check_heads(self.model.n_layers, self.model.n_heads)

    def run_kinds(self, kinds: Sequence[str], tell: Tell) -> None:
        """Run experiments and save each to its files in the run folder.

        Args:
            kinds: names from `KINDS`.
            tell: returns the progress callback of a stage.

        Raises:
            InputError: an experiment is unknown, or the study has no run folder.
        """
        check_kinds(kinds)
        for kind in KINDS:
            if kind in kinds:
                _EXPERIMENTS[kind](self, tell)
        shutil.rmtree(self._folder.path("parts"), ignore_errors=True)

    @property
    def _folder(self) -> Run:
        if self.run is None:
            raise InputError("the study has no run folder; give it one with replace(study, run=...).")
        return self.run

    def _kept(self, name: str, kind: type[_R], compute: Callable[[], _R]) -> _R:
        if not self._folder.has(name):
            self._folder.save(name, compute())
        return kind.load(self._folder.path(name))

    def retrieval(self, tell: Tell) -> dict[str, HeadMap]:
        """Read which heads attend to the user's text, and which copy the needle (Wu et al. 2024)."""
        return {
            "user share": self._kept(
                "map-user-share.safetensors",
                HeadMap,
                lambda: user_share_map(self.model, self.answers, progress=tell("attention to the user")),
            ),
            "copying": self._kept(
                "map-copying.safetensors",
                HeadMap,
                lambda: copying_map(self.model, self.answers, out=self.run, progress=tell("copying heads")),
            ),
        }

    def gradient(self, tell: Tell) -> HeadMap:
        """Differentiate the needle's log-probability by every head's steering."""
        return self._kept(
            "map-gradient.safetensors",
            HeadMap,
            lambda: gradient_map(self.model, self.answers, out=self.run, progress=tell("gradients")),
        )

    def _map(self, kind: str, tell: Tell) -> HeadMap:
        def compute() -> HeadMap:
            return act_on_each_head(
                self.model, self.answers, kind, alpha=self.alpha, heads=self.heads, out=self.run,
                progress=tell(f"heads, {kind}"),
            )  # fmt: skip

        return self._kept(f"map-{kind}.safetensors", HeadMap, compute)

    def steer(self, tell: Tell) -> None:
        """Steer one head at a time."""
        self._map("steer", tell)

    def ablate(self, tell: Tell) -> None:
        """Switch one head off at a time, with every requested kind of ablation."""
        for kind in self.ablations:
            self._map(kind, tell)

    def cumulative(self, tell: Tell) -> None:
        """Act on the first k heads of each ranking, on texts that were not used for the ranking."""
        ranked_on, judged = self.answers.split()
        maps: dict[str, HeadMap] = {**self.retrieval(tell), "gradient": self.gradient(tell)}
        measured = [kind for kind in self.ablations if self._folder.has(f"map-{kind}.safetensors")]
        if measured and self.heads is None:  # one is enough, because their rankings are similar
            kind = "blind" if "blind" in measured else measured[0]
            maps[kind] = self._map(kind, tell)
        # Heads are ranked on texts other than those on which the rankings are evaluated.
        ranked_contexts = {
            int(context)
            for context, cell in zip(self.answers.contexts, self.answers.cells, strict=True)
            if any(cell is one for one in ranked_on.cells)
        }
        rankings = {name: rank_heads(one.of_contexts(ranked_contexts)) for name, one in maps.items()}
        for action in self.actions:

            def compute(action: str = action) -> HeadCurves:
                return cumulative_curves(
                    self.model, judged, rankings, action, alpha=self.alpha,
                    n_draws=self.curve_draws if self.n_draws else 0,
                    seed=self.seed, out=self.run, progress=tell(f"first k heads, {action}"),
                )  # fmt: skip

            self._kept(f"curves-{action}.parquet", HeadCurves, compute)

    def sweep(self, tell: Tell) -> None:
        """Steer sets of heads at every α, and measure the side effects if there are questions."""
        config = replace(self.answers.config, conditions=(self.answers.condition,))
        sets = ("all", "retrieval", "random") if self.n_draws else ("all", "retrieval")
        grid = steering_sweep(
            self.model, self.answers.cells, config, alphas=self.alphas, head_sets=sets, n_draws=self.n_draws,
            indicator=self.answers.indicator, seed=self.seed, batch_tokens=self.answers.batch_tokens,
            out=self.run, progress=tell("steering sweep"),
        )  # fmt: skip
        if not self.questions:
            return

        def ask() -> Ability:
            return side_effects(
                self.model, grid, self.questions, template=self.answers.condition != "plain+prefix",
                max_new_tokens=config.max_new_tokens, out=self.run, progress=tell("side effects"),
            )  # fmt: skip

        self._kept("steering-ability.parquet", Ability, ask)

    def describe(self) -> dict[str, Any]:
        """Describe everything that the results depend on, for the manifest."""
        return {
            "model": dict(self.model.identity),
            "condition": self.answers.condition,
            "indicator": self.answers.indicator,
            "measure": self.answers.measure,
            **self.answers.config.as_dict(),
            "alpha": self.alpha,
            "alphas": list(self.alphas),
            "heads": None if self.heads is None else [list(head) for head in self.heads],
            "draws": self.n_draws,
            "questions": len(self.questions),
        }


_EXPERIMENTS: Mapping[str, Callable[[HeadStudy, Tell], object]] = {
    "retrieval": HeadStudy.retrieval,
    "gradient": HeadStudy.gradient,
    "steer": HeadStudy.steer,
    "ablate": HeadStudy.ablate,
    "cumulative": HeadStudy.cumulative,
    "sweep": HeadStudy.sweep,
}


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise `InputError` for an unknown experiment, or if none is given."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise InputError(f"unknown kind {', '.join(unknown) or '(none)'}; choose from {', '.join(KINDS)}.")


__all__ = ["ABLATIONS", "KINDS", "HeadStudy", "check_kinds"]
