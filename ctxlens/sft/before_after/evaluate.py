"""Compares a delivered checkpoint with the model before the training, and writes the results beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ctxlens.errors import RunExistsError
from ctxlens.files import plain_value, write_atomic
from ctxlens.models import Model
from ctxlens.report import write_report
from ctxlens.report.plots.still import drift_still
from ctxlens.results import Ability, Drift, NeedleGrid
from ctxlens.runs import Run, StageProgress, package_versions
from ctxlens.sft.before_after.comparison import models_rows, treatments_rows
from ctxlens.sft.before_after.measure import (
    ABILITY,
    DRIFT,
    DRIFT_INDICATOR,
    GRID,
    NO_DRIFT,
    Measurement,
)
from ctxlens.sft.before_after.plan import EvaluationPlan
from ctxlens.sft.before_after.section import insert_section, make_section

STUDY = "evaluation"
RESULT = "evaluation.json"
CARD = "README.md"


def evaluate_checkpoint(
    folder: str | Path,
    plan: EvaluationPlan,
    *,
    base: Mapping[str, Any],
    trained: Mapping[str, Any],
    load_base: Callable[[], Model],
    load_trained: Callable[[], Model],
    progress: StageProgress | None = None,
) -> Path:
    """Measure, compare, draw, and put the section into the checkpoint's `README.md`.

    All results go into a separate folder inside the checkpoint's, so that no server takes result files for
    weights: grids, closed-book answers and drift as results, `drift.svg`, `report.html`, and finally
    `evaluation.json`. An interrupted evaluation resumes; a finished one is not changed.

    Args:
        folder: the checkpoint.
        plan: what to ask.
        base: name and fingerprint of the model before the training, for the manifest.
        trained: name and fingerprint of the checkpoint, for the manifest.
        load_base: loads the model before the training, when it is needed.
        load_trained: loads the checkpoint, when it is needed.
        progress: called as progress(stage, done, total); for the stages see `measure.STAGES`.

    Returns:
        The evaluation's folder.

    Raises:
        RunExistsError: the folder holds another evaluation.
        ModelFailureError: a model fails on all of its first texts.
    """
    folder = Path(folder)
    config = {**plan.settings, "model": dict(trained), "base": dict(base)}
    try:
        run = Run.open(folder / plan.folder, study=STUDY, config=config)
    except RunExistsError as error:
        reason = str(error).partition(";")[0]
        raise RunExistsError(
            f"{reason}; give another evaluate_folder to keep both, or remove that folder."
        ) from error
    if not run.has(RESULT):
        start = time.perf_counter()
        Measurement(run, plan, load_base, load_trained, progress).run_stages()
        _deliver(folder, run, plan, str(base.get("name") or "the model before"), time.perf_counter() - start)
    return run.folder


def _deliver(folder: Path, run: Run, plan: EvaluationPlan, base_name: str, seconds: float) -> None:
    grid = NeedleGrid.load(run.path(GRID))
    ability = Ability.load(run.path(ABILITY)) if run.has(ABILITY) else None
    drifts = [Drift.load(run.path(name)) for name in (DRIFT, DRIFT_INDICATOR) if run.has(name)]
    no_drift = run.read_json(NO_DRIFT)["reason"] if run.has(NO_DRIFT) else ""
    against_base, treatments = models_rows(grid, ability), treatments_rows(grid)
    if drifts:
        title = "Change of the attention on the user's tokens, by layer and head"
        write_atomic(run.path("drift.svg"), drift_still(drifts, title=title))
    write_report([run.folder], run.path("report.html"), title=f"{folder.resolve().name}: before and after")
    section = make_section(plan, base_name, against_base, treatments, drifts, no_drift=no_drift)
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {folder.resolve().name}\n"
    write_atomic(card, insert_section(text, section))
    record = {
        "base": base_name,
        "rows": [row.as_dict() for row in against_base],
        "treatments": [row.as_dict() for row in treatments],
        "closed_book": len(plan.questions),
        "drift": [_summarise(drift) for drift in drifts] or no_drift,
        "failed_cells": len(grid.failed),
        "seconds": round(seconds, 2),
        "versions": package_versions(),
    }
    run.write_json(RESULT, plain_value(record))


def _summarise(drift: Drift) -> dict[str, Any]:
    """The change of the user's share by layer, raw and without sinks: mean over heads, and retrieval head."""
    changes = {
        heads: [one[2].as_dict() for one in drift.by_layer("user", heads=heads)]
        for heads in ("mean", "retrieval")
    }
    found = {"sides": list(drift.sides), "layers": list(drift.layers), "user_share_change": changes}
    if "without sinks" in drift.views:
        found["user_share_change_without_sinks"] = {
            heads: [one[2].as_dict() for one in drift.by_layer("user", "without sinks", heads=heads)]
            for heads in ("mean", "retrieval")
        }
    return found


__all__ = ["CARD", "RESULT", "STUDY", "evaluate_checkpoint"]
