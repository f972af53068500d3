"""Asks both models, stage by stage: needles, closed-book questions, attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from ctxlens.chat.condition import Condition
from ctxlens.errors import InputError
from ctxlens.evals.closed_book import run_closed_book
from ctxlens.evals.needle.run import Setting, run_settings
from ctxlens.heads.drift import Side, needle_conversations, read_drift
from ctxlens.models import Model
from ctxlens.results import Ability, NeedleGrid
from ctxlens.runs import Run, StageProgress
from ctxlens.sft.before_after.comparison import BASE, TRAINED
from ctxlens.sft.before_after.plan import EvaluationPlan

STAGES = {
    f"needle {BASE}": "needles, before",
    f"needle {TRAINED}": "needles, after",
    "ability": "closed-book questions",
    "drift": "attention drift",
}
"""The stages in order, each with its title."""

GRID, ABILITY, NO_DRIFT = "needle.parquet", "ability.parquet", "no_drift.json"
DRIFT, DRIFT_INDICATOR = "drift.safetensors", "drift-indicator.safetensors"
_DRIFT_CELLS = 40


class Measurement:
    """One evaluation in its folder; results that are already there are not measured again.

    Args:
        run: the evaluation's folder.
        plan: what is asked.
        load_base: loads the model before the training, when it is needed.
        load_trained: loads the checkpoint, when it is needed.
        progress: called with stage, done and total.
    """

    def __init__(
        self,
        run: Run,
        plan: EvaluationPlan,
        load_base: Callable[[], Model],
        load_trained: Callable[[], Model],
        progress: StageProgress | None = None,
    ) -> None:
        self.run, self.plan, self.progress = run, plan, progress
        self._load = {BASE: load_base, TRAINED: load_trained}

    @cached_property
    def base(self) -> Model:
        """The model that the training started from."""
        return self._load[BASE]()

    @cached_property
    def trained(self) -> Model:
        """The delivered checkpoint."""
        return self._load[TRAINED]()

    def run_stages(self) -> None:
        """Measure what is missing; afterwards the folder contains grid, ability and drift."""
        if not self.run.has(GRID):
            self.run.save(GRID, NeedleGrid.concat([self.ask_needles(name) for name in (BASE, TRAINED)]))
        if self.plan.questions and not self.run.has(ABILITY):
            self.run.save(ABILITY, self.ask_questions())
        for name, condition in self.drifts().items():
            if not self.run.has(name) and not self.run.has(NO_DRIFT):
                self.read_drift(name, condition)

    def ask_needles(self, name: str) -> NeedleGrid:
        """The needle grid of one model; the trained one is asked with and without its indicator."""
        model = self.base if name == BASE else self.trained
        settings = [Setting(name)]
        if name == TRAINED and model.indicator is not None:
            settings.append(Setting(name, indicator=True))
        return run_settings(
            model,
            self.plan.cells,
            self.plan.config,
            settings,
            meta={"haystack": self.plan.haystack, "wording": self.plan.config.template},
            out=self.run,
            name=f"stages/needle-{name}.parquet",
            progress=lambda done, total: self._tell(f"needle {name}", done, total),
        )

    def ask_questions(self) -> Ability:
        """Closed-book answers of both models, with and without template and indicator."""
        asked = [(BASE, self.base, False), (TRAINED, self.trained, False)]
        if self.trained.indicator is not None:
            asked.append((TRAINED, self.trained, True))
        templates = (False, True) if len(self.plan.config.conditions) > 1 else (False,)
        tables = []
        for name, model, indicator in asked:
            for template in templates:
                label = f"{name}, {Condition(template=template).name}"
                table = run_closed_book(
                    model,
                    self.plan.questions,
                    indicator=indicator,
                    template=template,
                    label=label,
                    max_new_tokens=self.plan.config.max_new_tokens,
                )
                tables.append(Ability(table.frame.assign(of=name), table.meta))
                self._tell("ability", len(tables), len(asked) * len(templates))
        return Ability.concat(tables)

    def drifts(self) -> dict[str, str]:
        """The drift files of this evaluation, each with the condition of the trained model."""
        grid = NeedleGrid.load(self.run.path(GRID)).frame
        conditions = {DRIFT: "template" if len(self.plan.config.conditions) > 1 else "plain"}
        if grid["indicator"].astype(bool).any():
            conditions[DRIFT_INDICATOR] = "indicator"
        return conditions

    def read_drift(self, name: str, condition: str) -> None:
        """Compare the attention of both models where the answer begins."""
        cells = self.plan.cells[:: -(-len(self.plan.cells) // _DRIFT_CELLS)]
        conversations, contexts = needle_conversations(cells, self.plan.config)
        start = Side(self.base, "plain" if condition == "plain" else "template", BASE)
        try:
            found = read_drift(
                start,
                Side(self.trained, condition, TRAINED),
                conversations,
                contexts=contexts,
                render_options={"continue_final_message": True},
                progress=lambda done, total: self._tell("drift", done, total),
            )
        except InputError as error:  # attention that cannot be read, or does not fit the memory
            self.run.write_json(NO_DRIFT, {"reason": str(error)})
            return
        self.run.save(name, found)

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self.progress:
            self.progress(stage, done, total)


__all__ = [
    "ABILITY",
    "DRIFT",
    "DRIFT_INDICATOR",
    "GRID",
    "NO_DRIFT",
    "STAGES",
    "Measurement",
]
