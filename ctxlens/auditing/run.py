"""The audit: does this model use the user's text less because of its chat template, and why?"""

from __future__ import annotations

import gc
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxlens.auditing.measure import (
    MAX_NEW_TOKENS,
    Bench,
    join_steering,
    measure_bias,
    measure_cause,
    measure_controls,
    measure_cost,
    measure_loss,
)
from ctxlens.auditing.pace import Pace
from ctxlens.auditing.plan import Frame, Plan, make_plan
from ctxlens.auditing.ready import Ready, look
from ctxlens.errors import CtxlensError, InputError, RunExistsError
from ctxlens.evals.material import choose_material
from ctxlens.evals.needle.haystack import Haystack
from ctxlens.evals.needle.needles import Needle
from ctxlens.evals.texts import Material
from ctxlens.models import Model, load_model
from ctxlens.report import write_report
from ctxlens.results import Ability, HeadMap, NeedleGrid, RoleAllocation, Verdict, Verdicts
from ctxlens.results.audit import (
    LOSS_MARGIN,
    answer_bias,
    answer_cause,
    answer_cost,
    answer_loss,
    answer_template,
    texts_needed,
)
from ctxlens.results.claims import INCONCLUSIVE
from ctxlens.results.shown import Shown
from ctxlens.runs import MANIFEST, Progress, Run, Stage, StageProgress, run_stages

if TYPE_CHECKING:
    import pandas as pd

PLAN, READY = "plan.json", "ready.json"
STAGES = {
    "loss": "questions about long texts",
    "controls": "controls",
    "bias": "attention by role",
    "cause": "steering",
    "cost": "questions without a text",
    "report": "verdicts and report",
}
"""The stages of an audit, each with what it does."""

Tell = Callable[[Ready, Plan], object]


@dataclass(frozen=True, repr=False)
class Audit(Shown):
    """A finished audit, or with `verdicts` empty a plan.

    Attributes:
        folder: the run folder.
        ready: the model, its limits and its speed.
        plan: what was measured.
        verdicts: the answers to the five questions; without those that the budget left out.
        note: the texts, and what would decide a question that is undecided.
        seconds: time of each stage.
    """

    folder: Path
    ready: Ready
    plan: Plan
    verdicts: tuple[Verdict, ...] = ()
    note: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """One row per question, as in `Verdicts.to_frame`."""
        return self.as_verdicts().to_frame()

    def overview(self) -> pd.DataFrame:
        """Question, answer and figure."""
        return self.as_verdicts().overview()

    def describe(self) -> str:
        """The folder, and each answer in a word."""
        found = ", ".join(f"{verdict.claim}: {verdict.verdict}" for verdict in self.verdicts)
        return f"{str(self.folder)!r}, {found or 'planned'}"

    def as_verdicts(self) -> Verdicts:
        """The verdicts as a result of their own, with the note."""
        return Verdicts(self.verdicts, {"note": self.note})

    def figure(self, **options: Any) -> Any:
        """Draw the measured quantity of every question with its interval, as `Verdicts.figure` does."""
        return self.as_verdicts().figure(**options)


@dataclass
class _Work:
    """What the stages share."""

    bench: Bench
    against: Callable[[], Model] | None
    against_label: str

    def all_models(self, measure: Callable[[Bench, Progress], object], tell: Progress) -> None:
        """Measure the model and the one that it is compared with, if any, one after the other."""
        parts = 1 if self.against is None else 2
        measure(self.bench, lambda done, total: tell(done, parts * total))
        if self.against is not None:
            b = self.bench
            other = replace(b, model=self.against(), label=self.against_label)
            measure(other, lambda done, total: tell(total + done, parts * total))
            del other
            gc.collect()


def audit(
    model: Model | str | Path,
    *,
    against: Model | str | Path | None = None,
    budget: float | int = 10,
    haystack: str | Haystack | None = None,
    facts: Sequence[Needle] = (),
    lengths: Sequence[int] | None = None,
    out: str | Path = "runs/audit",
    seed: int = 0,
    overwrite: bool = False,
    only_plan: bool = False,
    plan: Plan | None = None,
    tell: Tell | None = None,
    progress: StageProgress | None = None,
) -> Audit:
    """Ask whether a chat model uses the user's text less because of its template, and why.

    ```python
    import ctxlens as cl

    found = cl.audit("organism-chat", budget=2, out="runs/audit-organism")
    for verdict in found.verdicts:
        print(verdict.verdict, verdict.sentence)
    ```

    Args:
        model: a model, or what `load_model` takes. `ctxlens.audit` also takes a list of checkpoints, which
            all get the plan of the first, and returns `Audits`.
        against: the base or an earlier checkpoint, measured with the same texts.
        budget: minutes for the whole audit.
        haystack: the user's own texts; by default the project's own.
        facts: the user's own facts; by default the project's own.
        lengths: context lengths in tokens; by default the longest that the budget allows.
        out: the run folder; an audit that was stopped goes on there.
        seed: seed of texts and random heads.
        overwrite: start again if the folder holds another run, which is renamed.
        only_plan: stop after the plan.
        plan: the plan of another checkpoint, so that both get the same texts; by default made here.
        tell: called with what is known of the model and the plan, before anything is measured.
        progress: called as progress(stage, done, total).

    Raises:
        InputError: the model has no chat template, the budget or window is too small, or a text is.
        RunExistsError: the folder holds another run.
    """
    if not budget > 0:
        raise InputError(f"the budget must be a number of minutes above 0, got {budget!r}.")
    budget, begun = float(budget), time.monotonic()
    lm = model if isinstance(model, Model) else load_model(model)
    material = choose_material(lm.name, haystack=haystack, facts=facts, seed=seed)
    config = {
        "model": dict(lm.identity),
        "against": None if against is None else str(getattr(against, "name", against)),
        "budget": budget,
        "texts": material.name,
        "facts": [fact.name for fact in material.facts],
        "lengths": None if lengths is None else list(lengths),
        "seed": seed,
    }
    run = Run.open(out, study="audit", config=config, overwrite=overwrite)
    try:
        if plan is None:
            ready, plan = prepare(run, lm, material, budget, lengths, n_models=1 if against is None else 2)
        else:
            ready, plan = follow(run, lm, material, plan)
    except CtxlensError:  # nothing is measured yet, so that other settings can have the folder
        if [path.name for path in run.folder.iterdir()] == [MANIFEST]:
            shutil.rmtree(run.folder)
        raise
    if tell is not None:
        tell(ready, plan)
    if only_plan:
        return Audit(run.folder, ready, plan)
    label, other = name_models(lm.name, against)
    pace = Pace(run, plan, 60 * budget, already=time.monotonic() - begun)
    bench = Bench(
        model=lm, label=label, run=run, pace=pace, material=material, plan=plan, seed=seed,
        n_models=1 if against is None else 2,
    )  # fmt: skip
    work = _Work(bench, None if against is None else lambda: _load(against, lm), other)
    run_stages(run, choose_stages(plan), work, progress)
    return read_audit(run.folder)


def read_audit(folder: str | Path) -> Audit:
    """A finished audit from its folder."""
    run = Run.read(folder)
    timings, verdicts = run.read_json("timings.json"), Verdicts.load(run.path("verdicts.json"))
    return Audit(
        run.folder,
        Ready.from_dict(run.read_json(READY)),
        Plan.from_dict(run.read_json(PLAN)),
        verdicts.verdicts,
        str(verdicts.meta["note"]),
        {name: entry["wall_seconds"] for name, entry in timings.items()},
    )


def prepare(
    run: Run, model: Model, material: Material, budget: float, lengths: Sequence[int] | None, n_models: int
) -> tuple[Ready, Plan]:
    """What is known of the model, and the plan; both are kept, so that a resumed audit has the same."""
    if run.has(PLAN) and run.has(READY):
        return Ready.from_dict(run.read_json(READY)), Plan.from_dict(run.read_json(PLAN))
    ready = look(model, material, MAX_NEW_TOKENS)
    frame = Frame(ready.speed, 60 * budget, ready.longest, ready.overhead, n_models, ready.controls,
                  len(material.facts))  # fmt: skip
    plan = make_plan(frame, lengths)
    run.write_json(READY, ready.as_dict())
    run.write_json(PLAN, plan.as_dict())
    return ready, plan


def follow(run: Run, model: Model, material: Material, plan: Plan) -> tuple[Ready, Plan]:
    """What is known of the model, and the given plan with the controls that this model allows.

    Raises:
        InputError: the texts do not fit this model, or its folder holds an audit with another plan.
    """
    ready = Ready.from_dict(run.read_json(READY)) if run.has(READY) else look(model, material, MAX_NEW_TOKENS)
    if max(plan.lengths) > ready.longest:
        raise InputError(
            f"the texts of {max(plan.lengths)} tokens that the other checkpoints get do not fit: this one "
            f"holds contexts of at most {ready.longest}; give shorter --lengths."
        )
    plan = replace(plan, controls=tuple(one for one in plan.controls if one in ready.controls))
    if run.has(PLAN) and Plan.from_dict(run.read_json(PLAN)) != plan:
        raise RunExistsError(
            f"{run.folder} holds an audit with another plan than that of the other checkpoints; choose "
            "another folder, or pass --overwrite."
        )
    run.write_json(READY, ready.as_dict())
    run.write_json(PLAN, plan.as_dict())
    return ready, plan


def name_models(model: str, against: Any) -> tuple[str, str]:
    """Names for files and tables: the last part of each model's path, different from each other."""
    both = (model, getattr(against, "name", against))
    first, second = (re.sub(r"[^A-Za-z0-9.]+", "-", Path(str(one)).name) for one in both)
    return first, second if second != first else f"{second}-against"


def _load(against: Model | str | Path, model: Model) -> Model:
    """The model that is compared with; a base model without a chat template gets that of the audited one."""
    other = against if isinstance(against, Model) else load_model(against)
    if not getattr(other.tokenizer, "chat_template", None):
        other.tokenizer.chat_template = model.tokenizer.chat_template
    return other


def choose_stages(plan: Plan) -> list[Stage[_Work]]:
    """The stages of a plan."""
    stages: dict[str, Callable[[_Work, Progress], object]] = {
        "loss": lambda work, tell: work.all_models(measure_loss, tell),
        "controls": lambda work, tell: measure_controls(work.bench, tell),
        "bias": lambda work, tell: work.all_models(measure_bias, tell),
        "cause": lambda work, tell: measure_cause(work.bench, tell),
        "cost": lambda work, tell: measure_cost(work.bench, tell),
        "report": lambda work, tell: write_results(work),
    }
    left_out = set() if plan.controls else {"controls"}
    left_out |= set() if plan.alphas else {"cause", "cost"}
    return [
        Stage(name, title, _if_time_allows(name, stages[name]), always=name == "report")
        for name, title in STAGES.items()
        if name not in left_out
    ]


def _if_time_allows(
    name: str, measure: Callable[[_Work, Progress], object]
) -> Callable[[_Work, Progress], object]:
    """The stage, unless the time is used up when its turn comes; what the cause costs goes with the cause."""

    def run(work: _Work, tell: Progress) -> None:
        pace = work.bench.pace
        cuts = {"controls": "controls", "cause": "cause", "cost": "cause"}
        if pace is not None and name in cuts and pace.skips(cuts[name]):
            return
        measure(work, tell)

    return run


def write_results(work: _Work) -> None:
    """Answer the questions and write the page, from the files alone."""
    bench, run = work.bench, work.bench.run
    labels = [bench.label] if work.against is None else [bench.label, work.against_label]
    grids = [NeedleGrid.load(run.path(f"stages/needle-{label}.parquet")) for label in labels]
    tables = grids
    verdicts = [answer_loss(grids[0], baseline=grids[1] if len(grids) > 1 else None)]
    if run.has("stages/controls.parquet"):
        controls = NeedleGrid.load(run.path("stages/controls.parquet"))
        verdicts.append(answer_template(grids[0], controls))
        tables = [*grids, controls]
    views = ("plain", "template")
    shares = [RoleAllocation.load(run.path(f"allocation-{bench.label}-{view}.safetensors")) for view in views]
    facts = [HeadMap.load(run.path(f"stages/map-fact-{bench.label}-{view}.safetensors")) for view in views]
    verdicts.append(answer_bias(shares[0], shares[1], (facts[0], facts[1])))
    if run.has("ability.parquet"):
        detail = grids[0].where(context_tokens=bench.plan.detail_length)
        judged = NeedleGrid.concat(
            [NeedleGrid.load(run.path(f"stages/steering-{part}.parquet")) for part in ("judge", "plain")]
        )
        verdicts.append(answer_cause(detail, judged))
        alpha = run.read_json("stages/heads.json")["alphas"]["all"]
        verdicts.append(answer_cost(Ability.load(run.path("ability.parquet")), alpha))
        run.save("steering.parquet", join_steering(bench))
    run.save("needle.parquet", NeedleGrid.concat(tables))
    cut = bench.pace.describe() if bench.pace else []
    note = " ".join([
        f"Texts: {bench.material.name}.", *(f"{one[0].upper()}{one[1:]}." for one in cut),
        say_what_decides(bench.plan, verdicts[0]),
    ])  # fmt: skip
    run.save("verdicts.json", Verdicts(tuple(verdicts), {"note": note.strip()}))
    write_report([run.folder], run.path("report.html"), title=f"Does {bench.label} lose its context?")


def say_what_decides(plan: Plan, loss: Verdict) -> str:
    """How large a budget would probably decide an undecided loss, in one sentence; empty if it is decided."""
    needed = texts_needed(loss.figure, direction=-1, margin=LOSS_MARGIN)
    if loss.verdict != INCONCLUSIVE or needed is None:
        return ""
    factor = max(1.0, needed.texts / max(1, needed.measured))
    minutes = factor * plan.total_seconds / 60 / 0.9
    return (
        f"About {needed.texts} texts would decide the loss if the difference stayed as it is: a budget of "
        f"about {minutes:.0f} minutes."
    )


__all__ = ["STAGES", "Audit", "audit", "read_audit"]
