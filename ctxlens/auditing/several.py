"""Several checkpoints, one after another: the same plan and texts for all, and one page over them."""

from __future__ import annotations

import functools
import gc
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ctxlens.auditing.plan import Plan
from ctxlens.auditing.run import Audit
from ctxlens.auditing.run import audit as audit_one
from ctxlens.errors import CtxlensError, InputError, first_line
from ctxlens.models import Model, load_model
from ctxlens.report import write_report
from ctxlens.results import Checkpoints, NeedleGrid, RoleAllocation
from ctxlens.results.checkpoints import Checkpoint, compare_checkpoints
from ctxlens.results.shown import Shown, count
from ctxlens.results.steps import order_checkpoints
from ctxlens.runs import MANIFEST, Run

if TYPE_CHECKING:
    import pandas as pd

PLAN, RESULT, PAGE = "plan.json", "checkpoints.parquet", "report.html"
Source = Model | str | Path
AuditOne = Callable[[str, Path, Plan | None], Audit]
"""Loads and audits one checkpoint: its name, its folder, and the plan of the first (None for the first)."""


@dataclass(frozen=True, repr=False)
class Audits(Shown):
    """Audits of several checkpoints.

    Attributes:
        folder: the folder that holds the page over all checkpoints, and a run folder for each.
        audits: the audits by name, in the order of training.
        failed: why a checkpoint was not measured, by name.
        comparison: the checkpoints side by side; None if they were only planned, or all failed.
    """

    folder: Path
    audits: Mapping[str, Audit]
    failed: Mapping[str, str] = field(default_factory=dict)
    comparison: Checkpoints | None = None

    def to_frame(self) -> pd.DataFrame:
        """One row per checkpoint and quantity, as in `Checkpoints`."""
        return self._compared().to_frame()

    def overview(self) -> pd.DataFrame:
        """Estimates by checkpoint."""
        return self._compared().overview()

    def describe(self) -> str:
        """The folder, and how many checkpoints were audited."""
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return f"{str(self.folder)!r}, {count(len(self.audits), 'checkpoint')}{failed}"

    def figure(self, **options: Any) -> Any:
        """Draw recall, loss and bias by training step."""
        return self._compared().figure(**options)

    def _compared(self) -> Checkpoints:
        if self.comparison is None:
            raise InputError("these audits were only planned, so there is nothing to compare.")
        return self.comparison


@overload
def audit(model: Sequence[Source], **options: Any) -> Audits: ...
@overload
def audit(model: Source, **options: Any) -> Audit: ...
@functools.wraps(audit_one)
def audit(model: Source | Sequence[Source], **options: Any) -> Audit | Audits:
    if isinstance(model, list | tuple):
        return _audit_list(model, **options)
    return audit_one(model, **options)  # pyright: ignore[reportArgumentType]


def _audit_list(models: Sequence[Source], *, out: str | Path = "runs/audit", **options: Any) -> Audits:
    """`audit` of a list of models."""
    by_name = {one.name if isinstance(one, Model) else str(one): one for one in models}
    if len(by_name) < len(models):
        raise InputError("a model is given twice; give each model once.")
    overwrite = bool(options.pop("overwrite", False))

    def one(name: str, folder: Path, plan: Plan | None) -> Audit:
        source = by_name[name]
        repository, revision = split_revision(name)
        model = source if isinstance(source, Model) else load_model(repository, revision=revision)
        return audit_one(model, out=folder, plan=plan, **options)

    kept = {key: options.get(key) for key in ("budget", "lengths", "seed")}
    kept["against"] = getattr(options.get("against"), "name", options.get("against"))
    kept["haystack"] = str(getattr(options.get("haystack"), "name", options.get("haystack")))
    kept["facts"] = [fact.name for fact in options.get("facts", ())]
    return audit_several(list(by_name), one, out=out, config=kept, overwrite=overwrite)


def audit_several(
    names: Sequence[str],
    one: AuditOne,
    *,
    out: str | Path,
    config: Mapping[str, Any],
    overwrite: bool = False,
) -> Audits:
    """Audit checkpoints one after another, in the order of training, and put them side by side.

    The first that can be loaded makes the plan, and all others follow it, so that all get the same texts. A
    checkpoint that cannot be loaded or audited is left out, and the reason is kept. The weights of a
    checkpoint are freed before the next one is loaded.

    Args:
        names: the checkpoints.
        one: loads and audits one of them.
        out: the folder.
        config: what all checkpoints have in common. More checkpoints can be added to a folder later.
        overwrite: start again; the earlier folder is kept as `OUT.old`.

    Raises:
        InputError: a name is given twice, or every checkpoint fails.
        RunExistsError: the folder holds another run.
    """
    names = order_checkpoints(names)
    folders = name_folders(names)
    run = Run.open(out, study="checkpoints", config=config, overwrite=overwrite)
    found: dict[str, Audit] = {}
    failed: dict[str, str] = {}
    for name in names:
        plan = Plan.from_dict(run.read_json(PLAN)) if run.has(PLAN) else None
        try:
            found[name] = one(name, run.path(folders[name]), plan)
        except (CtxlensError, OSError, RuntimeError) as error:
            failed[name] = first_line(error) + "."
        else:
            if plan is None:
                run.write_json(PLAN, found[name].plan.as_dict())
        gc.collect()
        free_accelerator()
    if not found:
        if [path.name for path in run.folder.iterdir()] == [MANIFEST]:
            shutil.rmtree(run.folder)
        raise InputError(f"no checkpoint could be audited: {say_failures(failed)}")
    if not all(one.verdicts for one in found.values()):
        return Audits(run.folder, found, failed)
    return Audits(run.folder, found, failed, write_comparison(run, found, failed, folders))


def write_comparison(
    run: Run, found: Mapping[str, Audit], failed: Mapping[str, str], folders: Mapping[str, str]
) -> Checkpoints:
    """Compare the checkpoints from their files, and write the table and the page over all."""
    read = [read_checkpoint(folders[name], audit) for name, audit in found.items()]
    meta = {
        "folders": {folders[name]: folders[name] for name in found},
        "failed": {folders[name]: sentence for name, sentence in failed.items()},
        "given": {folders[name]: name for name in found},
    }
    compared = compare_checkpoints(read, meta)
    run.save(RESULT, compared)
    write_report([run.folder], run.path(PAGE), title=f"Does the context get lost in {len(read)} checkpoints?")
    return compared


def read_checkpoint(name: str, audit: Audit) -> Checkpoint:
    """What an audit has measured, from its folder."""
    grid = NeedleGrid.load(audit.folder / "needle.parquet")
    label = str(grid.frame["model"].iloc[0])
    views = [
        RoleAllocation.load(audit.folder / f"allocation-{label}-{view}.safetensors")
        for view in ("plain", "template")
    ]
    return Checkpoint(name, grid.where(model=label), (views[0], views[1]), audit.verdicts)


def say_failures(failed: Mapping[str, str]) -> str:
    """Why checkpoints failed; once if all have the same reason."""
    if len(set(failed.values())) == 1:
        return next(iter(failed.values()))
    return " ".join(f"{name}: {sentence}" for name, sentence in failed.items())


def split_revision(name: str) -> tuple[str, str | None]:
    """A Hub id and its revision: `owner/name@step1000`; None without one, or for a path that exists."""
    match = re.fullmatch(r"([\w][\w.-]*/[\w][\w.-]*)@([\w][\w./-]*)", name)
    if match is None or Path(name).exists():
        return name, None
    return match[1], match[2]


def name_folders(names: Sequence[str]) -> dict[str, str]:
    """A folder name for each checkpoint: as many of the last parts of its path as tell it from the others.

    Raises:
        InputError: a name is given twice.
    """
    if len(set(names)) < len(names):
        raise InputError("a model is given twice; give each model once.")
    parts = [
        [re.sub(r"[^A-Za-z0-9.]+", "-", part) for part in Path(name).parts if part != "/"] for name in names
    ]
    depth = next(n for n in range(1, 99) if len({tuple(one[-n:]) for one in parts}) == len(names) or n == 98)
    return {name: "-".join(one[-depth:]) for name, one in zip(names, parts, strict=True)}


def free_accelerator() -> None:
    """Give the memory of weights that are gone back to the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


__all__ = ["Audits", "audit", "audit_several", "name_folders", "split_revision"]
