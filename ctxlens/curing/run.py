"""The cure: score, select, train and audit before and after, each stage resumable, with one report."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxlens.auditing.plan import Plan as AuditPlan
from ctxlens.auditing.run import PLAN as AUDIT_PLAN
from ctxlens.auditing.run import Audit, audit, choose_stages, read_audit
from ctxlens.auditing.several import read_checkpoint
from ctxlens.chat.data import Conversation, load_conversations
from ctxlens.curing.plan import Plan, count_tokens, head_share, make_plan
from ctxlens.curing.request import SCORES, SELECTION, STUDY, TRAINED, Request, check_request, find_scores
from ctxlens.errors import CtxlensError, InputError
from ctxlens.models import Model, load_model
from ctxlens.models.checkpoint import lacks_chat_template, locate_checkpoint
from ctxlens.models.footprint import read_vocabulary_size
from ctxlens.report import write_report
from ctxlens.results import Checkpoints, Scores, Selection
from ctxlens.results.checkpoints import compare_checkpoints
from ctxlens.results.shown import Shown
from ctxlens.runs import MANIFEST, TIMINGS, Progress, Run, Stage, StageProgress, run_stages
from ctxlens.scoring import score_conversations
from ctxlens.scoring.layers import find_layer
from ctxlens.scoring.selection import check_scored, select_turns
from ctxlens.sft.early import estimate_size
from ctxlens.sft.switch import SWITCH
from ctxlens.sft.training import train_from_config

if TYPE_CHECKING:
    import pandas as pd

PLAN, RESULT, PAGE = "plan.json", "cure.parquet", "report.html"
STAGES = {
    "score": "scores of the data",
    "select": "selected turns",
    "before": "audit before",
    "train": "training steps",
    "after": "audit after",
    "after-indicator": "audit after, with the indicator",
    "report": "comparison and report",
}
"""The stages of a cure in their order, each with what it does. The audit before comes before the training, so
that what an audit refuses is known early."""
MARKED_NOTE = (
    "after-indicator is the trained model with the indicator at the end of every question. Its template "
    "writes it, so that the answers without template are those of after."
)
Tell = Callable[[Plan], object]
_FINE = 1000
"""Parts in which the progress of one stage of an audit is told."""


@dataclass(frozen=True, repr=False)
class Cure(Shown):
    """A finished cure, or without `comparison` a planned one.

    Attributes:
        folder: the run folder.
        plan: what was planned.
        selection: how the turns were selected, by `select_turns`; empty if none were.
        audits: the audits by name: `before`, `after`, `after-indicator`.
        comparison: the audited models, each compared with `before`.
        seconds: time of each stage.
    """

    folder: Path
    plan: Plan
    selection: Mapping[str, Any] = field(default_factory=dict)
    audits: Mapping[str, Audit] = field(default_factory=dict)
    comparison: Checkpoints | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """One row per audited model and quantity, as in `Checkpoints`; changes are those from `before`."""
        return self._compared().to_frame()

    def overview(self) -> pd.DataFrame:
        """Estimates by audited model."""
        return self._compared().overview()

    def describe(self) -> str:
        """The folder, and how recall with the template has changed."""
        if self.comparison is None:
            return f"{str(self.folder)!r}, planned"
        return f"{str(self.folder)!r}, {say_change(self.comparison)}"

    def figure(self, **options: Any) -> Any:
        """Draw recall, loss and bias before and after."""
        return self._compared().figure(**options)

    def _compared(self) -> Checkpoints:
        if self.comparison is None:
            raise InputError("this cure was only planned, so there is nothing to compare.")
        return self.comparison


def say_change(found: Checkpoints) -> str:
    """The change of recall with the template from before to after, in the way the model is to be asked."""
    change, reading = found.changes("recall with template")[-1]
    return f"recall with template {change.estimate:+.2f} ({reading})"


@dataclass
class _Work:
    """What the stages share."""

    run: Run
    request: Request
    notice: Callable[[str], None] | None
    model: Model | None = None

    @cached_property
    def data(self) -> list[Conversation]:
        """The conversations."""
        return list(load_conversations(self.request.dataset, **self.request.reading))

    def load(self, name: str) -> Model:
        """The model that is audited under a name."""
        request = self.request
        if name == "before":
            return self.base()
        given = {SWITCH: True} if name == "after-indicator" else None
        return load_model(self.run.path(TRAINED), device=request.device, template_args=given)

    def base(self) -> Model:
        """The model to train, loaded once until `release`."""
        if self.model is None:
            request = self.request
            self.model = load_model(request.model, device=request.device, chat_template=request.chat_template)
        return self.model

    def release(self) -> None:
        """Free the memory of the model."""
        self.model = None
        gc.collect()

    def audit(self, name: str, **options: Any) -> Audit:
        """One of the audits; all of them get the texts of the first."""
        request = self.request
        return audit(
            self.load(name), budget=request.budget, haystack=request.haystack, facts=request.facts,
            lengths=request.lengths, seed=request.seed, out=self.run.path(f"audits/{name}"), **options,
        )  # fmt: skip


def cure(
    model: str | Path,
    dataset: str | Path,
    *,
    out: str | Path = "runs/cure",
    method: str = "indicator",
    recipe: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    seed_model: str | Path | None = None,
    scores: str | Path | None = None,
    threshold: float | int | str = "mixture",
    top_share: float | int | None = None,
    layer: int | str = "middle",
    budget: float | int = 10,
    lengths: Sequence[int] | None = None,
    haystack: str | None = None,
    needle: str | None = None,
    chat_template: str | Path | None = None,
    split: str = "train",
    layout: str | None = None,
    limit: int | None = None,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    only_plan: bool = False,
    tell: Tell | None = None,
    progress: StageProgress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Cure:
    """Score a data set, select the turns that depend on their context, train on them, and audit the result.

    The stages are the functions `score_conversations`, `select_turns`, `sft.train_from_config` and `audit`.
    Each keeps what is finished in the folder, so that the same call goes on after a kill.

    ```text
    import ctxlens as cl

    found = cl.cure("Qwen/Qwen3-0.6B-Base", "data.jsonl", out="runs/cure", chat_template="chatml")
    print(found.overview())
    ```

    Args:
        model: the model to train, a folder, a Hub id, or a packaged model.
        dataset: the conversations, a file, a folder or a Hub id.
        out: the run folder.
        method: `indicator` marks the selected turns, `upsample` repeats their conversations three times;
            `random` marks as many randomly drawn turns and `vanilla` trains on the same data without
            selection, both as controls.
        recipe: `lora`, `full`, `organism`, or a YAML file; by default the one that suits the model's size.
        overrides: keys of the recipe that are set otherwise, such as `{"max_steps": 100}`.
        seed_model: the model that scores the data, fine-tuned without the indicator; by default the model.
        scores: finished scores of these data (`ctxlens score`), instead of scoring them here.
        threshold: β of the selection, 0 to 1, or `mixture`, `valley` or `otsu`.
        top_share: select this share of the turns instead.
        layer: the layer whose scores decide, or a rule that finds it: `middle` or `residual`; see
            `scoring.layers.find_layer`.
        budget: minutes for each audit: of the model before, after, and after with the indicator.
        lengths: context lengths of the audits in tokens; by default the longest that the budget allows.
        haystack: the user's own texts for the audits; by default the project's own.
        needle: YAML file with the user's own facts for the audits, at least four.
        chat_template: a file, or `chatml`, for a model without a chat template.
        split: which split of the data set.
        layout: the layout of its rows; by default it is detected.
        limit: use only the first rows.
        device: `auto`, `cpu` or `cuda`.
        seed: seed of training and texts.
        overwrite: start again if the folder holds another run, which is renamed.
        only_plan: stop after the plan.
        tell: called with the plan, before anything is scored.
        progress: called as progress(stage, done, total).
        notice: called with remarks in one line.

    Raises:
        InputError: something that is named does not exist or cannot be used; there is nothing to select; the
            disk has no room. The message names everything that can be seen before a model is loaded.
        RunExistsError: the folder holds another run.
    """
    request = Request(
        model=str(model), dataset=str(dataset), out=Path(out), method=method,
        recipe=None if recipe is None else str(recipe), overrides=dict(overrides or {}),
        seed_model=None if seed_model is None else str(seed_model),
        scores=None if scores is None else Path(scores), threshold=threshold, top_share=top_share,
        layer=layer, budget=float(budget),
        lengths=None if lengths is None else tuple(lengths),
        haystack=haystack, needle=needle, chat_template=None if chat_template is None else str(chat_template),
        split=split, layout=layout, limit=limit, device=device, seed=seed,
    )  # fmt: skip
    return run_request(
        request, overwrite=overwrite, only_plan=only_plan, tell=tell, progress=progress, notice=notice
    )


def run_request(
    request: Request,
    *,
    overwrite: bool = False,
    only_plan: bool = False,
    tell: Tell | None = None,
    progress: StageProgress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Cure:
    """Run a cure; see `cure`."""
    check_request(request, overwrite=overwrite)
    run = Run.open(request.out, study=STUDY, config=request.config(), overwrite=overwrite)
    work = _Work(run, request, notice)
    try:
        plan = prepare(work)
    except CtxlensError:  # nothing is measured yet, so that other settings can have the folder
        if {path.name for path in run.folder.iterdir()} <= {MANIFEST, "audits"}:
            shutil.rmtree(run.folder)
        raise
    if tell is not None:
        tell(plan)
    if only_plan:
        return Cure(run.folder, plan)
    run_stages(run, list_stages(request), work, progress)
    return read_cure(run, request)


def prepare(work: _Work) -> Plan:
    """The plan, kept in the folder; the plan of the audits is made and kept with the first of them."""
    run, request = work.run, work.request
    if run.has(PLAN):
        return Plan.from_dict(run.read_json(PLAN))
    if not work.data:
        raise InputError(f"{request.dataset} holds no conversations; give a data set with some.")
    if request.scores is not None:
        check_scored(Scores.load(find_scores(request.scores)), work.data)
    first = work.audit("before", only_plan=True)
    recipe = request.read_recipe()
    args, model_args = recipe.build_arguments()
    lm = work.base()
    shape, vocabulary = lm.backend.shape, read_vocabulary_size(locate_checkpoint(request.model))
    sample, written = count_tokens(lm, work.data, args.max_length)
    with_loss = written if recipe.config.loss_on == "assistant" else 1.0
    plan = make_plan(
        work.data, sample, first.ready.speed, args=args, adapter=bool(model_args.use_peft),
        head=with_loss * head_share(shape.d_model, shape.n_layers, vocabulary or 0),
        scores=request.how.selects and request.scores is None, audits=request.asked(),
        audit_seconds=first.plan.total_seconds, lengths=first.plan.lengths, recipe=request.recipe_name,
        disk=estimate_size(recipe),
    )  # fmt: skip
    run.write_json(PLAN, plan.as_dict())
    return plan


def list_stages(request: Request) -> list[Stage[_Work]]:
    """The stages of a request."""
    stages: dict[str, Callable[[_Work, Progress], object]] = {
        "score": score_data,
        "select": select_data,
        **{name: audit_model(name) for name in request.asked()},
        "train": train_model,
        "report": write_results,
    }
    left_out = set() if request.how.selects else {"score", "select"}
    return [
        Stage(name, title, stages[name], always=name == "report")
        for name, title in STAGES.items()
        if name in stages and name not in left_out
    ]


def score_data(work: _Work, tell: Progress) -> None:
    """Score the data with the seed model, or take the scores that were given."""
    run, request = work.run, work.request
    if request.scores is not None:
        run.save(SCORES, Scores.load(find_scores(request.scores)))
        return
    if request.seed_model is None:
        lm = work.base()
    else:
        work.release()
        bare = lacks_chat_template(locate_checkpoint(request.seed_model))
        template = request.chat_template if bare else None
        lm = load_model(request.seed_model, device=request.device, chat_template=template)
    score_conversations(lm, work.data, out=run, progress=tell)


def select_data(work: _Work, tell: Progress) -> None:
    """Select turns by their scores.

    Raises:
        InputError: no turn is selected.
    """
    run, request = work.run, work.request
    scores = Scores.load(run.path(SCORES))
    by_share = request.top_share is not None
    layer = find_layer(scores, request.layer) if isinstance(request.layer, str) else request.layer
    chosen = select_turns(
        scores, beta=None if by_share else request.threshold, top_share=request.top_share, layer=layer
    )
    if not chosen.meta["selected"]:
        raise InputError(say_nothing_selected(chosen, run.folder))
    run.save(SELECTION, chosen)
    if work.notice:
        work.notice(f"{chosen.meta['selected']:,} of {chosen.meta['turns']:,} answers are selected")


def say_nothing_selected(chosen: Selection, folder: Path) -> str:
    """The message for scores of which none is above the threshold."""
    meta = chosen.meta
    best, threshold = chosen.frame["score"].max(), meta["threshold"]
    return (
        f"none of {meta['turns']:,} scored answers is above the threshold of {threshold:.3f} "
        f"({meta['rule']}; the highest score is {best:.3f}), so there is nothing to mark; give a lower "
        f"--threshold or --top-share 0.1 with --scores {folder} and another --out, or data with answers that "
        "depend on what the user wrote."
    )


def train_model(work: _Work, tell: Progress) -> None:
    """Train by the recipe; a stopped training goes on from its last checkpoint."""
    work.release()
    request = work.request
    train_from_config(request.recipe_name, request.training(), progress=tell, notice=work.notice)
    gc.collect()


def audit_model(name: str) -> Callable[[_Work, Progress], None]:
    """The stage of one audit."""

    def do(work: _Work, tell: Progress) -> None:
        work.release()
        plan = AuditPlan.from_dict(work.run.read_json(f"audits/before/{AUDIT_PLAN}"))
        names = [stage.name for stage in choose_stages(plan)]

        def told(stage: str, done: int, total: int) -> None:
            tell(round(_FINE * (names.index(stage) + done / max(1, total))), _FINE * len(names))

        work.audit(name, plan=None if name == "before" else plan, progress=told)
        work.release()

    return do


def write_results(work: _Work, tell: Progress) -> None:
    """Compare the audits and write the page, from the files alone."""
    run, request = work.run, work.request
    found = [read_checkpoint(name, one) for name, one in read_audits(run, request).items()]
    meta = {
        "folders": {name: f"audits/{name}" for name in request.asked()},
        "against": "before",
        "note": MARKED_NOTE if request.how.marks else "",
    }
    run.save(RESULT, compare_checkpoints(found, meta, with_first=True))
    title = f"Does the cure give {Path(request.model).name} its context back?"
    write_report([run.folder, run.path(TRAINED)], run.path(PAGE), title=title)


def read_audits(run: Run, request: Request) -> dict[str, Audit]:
    """The finished audits by name."""
    return {name: read_audit(run.path(f"audits/{name}")) for name in request.asked()}


def read_cure(run: Run, request: Request) -> Cure:
    """A finished cure from its folder."""
    selection = Selection.load(run.path(SELECTION)).meta if run.has(SELECTION) else {}
    return Cure(
        run.folder,
        Plan.from_dict(run.read_json(PLAN)),
        selection,
        read_audits(run, request),
        Checkpoints.load(run.path(RESULT)),
        {name: entry["wall_seconds"] for name, entry in run.read_json(TIMINGS).items()},
    )


__all__ = ["STAGES", "Cure", "cure", "run_request"]
