"""What run folders hold: results by their type, as the files themselves tell it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ctxlens.errors import InputError
from ctxlens.results import (
    Ability,
    NeedleGrid,
    RoleAllocation,
    Scores,
    Selection,
    TokenView,
    Verdict,
    Verdicts,
    load_result,
)
from ctxlens.runs import MANIFEST, Run

STAGES = "stages.json"
R = TypeVar("R")


@dataclass(frozen=True)
class RunContents:
    """One run folder with everything in it that can be drawn.

    Attributes:
        name: the folder's name, unique among the runs of a report.
        manifest: study, configuration, versions.
        results: results by file name without suffix, in the order of the names.
        stages: what `stages.json` says about command and times, if it is there.
        unreadable: one sentence for each file that looks like a result and is none.
    """

    name: str
    manifest: Mapping[str, Any]
    results: Mapping[str, Any]
    stages: Mapping[str, Any] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()

    @property
    def is_demo(self) -> bool:
        """Whether this is a run of the demo, on the embedded model."""
        return self.manifest.get("study") == "demo"

    def all(self, kind: type[R]) -> dict[str, R]:
        """The results of one type, by name."""
        return {name: one for name, one in self.results.items() if isinstance(one, kind)}

    def grids(self, *, steered: bool) -> dict[str, NeedleGrid]:
        """Needle grids with several α, or with one."""
        grids = self.all(NeedleGrid)
        return {name: g for name, g in grids.items() if len(g) and (g.frame["alpha"].nunique() > 1) == steered}

    def allocations(self) -> dict[str, dict[str, RoleAllocation]]:
        """Allocations by model and condition, as their `meta` says (else by file name)."""
        found: dict[str, dict[str, RoleAllocation]] = {}
        for name, one in self.all(RoleAllocation).items():
            model = str(one.meta.get("model", name))
            condition = str(one.meta.get("condition", "as given"))
            if condition in found.setdefault(model, {}):
                condition = name
            found[model][condition] = one
        order = {"plain": 0, "template": 1}
        return {
            model: dict(sorted(parts.items(), key=lambda item: order.get(item[0], 2)))
            for model, parts in sorted(found.items(), key=lambda item: _model_order(item[0]))
        }

    def scored(self) -> list[tuple[str, Scores, Selection | None]]:
        """Score tables, each with the selection made from it (where there is one of each)."""
        scores, selections = self.all(Scores), list(self.all(Selection).values())
        return [
            (name, table, selections[i] if i < len(selections) else None)
            for i, (name, table) in enumerate(scores.items())
            if len(table)
        ]

    def abilities(self, *, steered: bool) -> Ability | None:
        """The ability table with, or without, steered rows."""
        for table in self.all(Ability).values():
            if (("alpha" in table.frame) and bool((table.frame["alpha"] != 1.0).any())) == steered:
                return table
        return None

    def token_views(self) -> list[TokenView]:
        """Token views in the order of their names."""
        return list(self.all(TokenView).values())

    def verdicts(self) -> dict[str, Verdict]:
        """Verdicts by claim."""
        return {v.claim: v for group in self.all(Verdicts).values() for v in group.verdicts}


def collect_runs(folders: Sequence[str | Path]) -> list[RunContents]:
    """Read run folders.

    Raises:
        InputError: no folder is given, or one of them holds no run.
    """
    if not folders:
        raise InputError("No run folder was given; name at least one folder that a ctxlens command has written.")
    paths = [Path(folder) for folder in folders]
    names: list[str] = []
    for path in paths:
        name = path.resolve().name or str(path)
        names.append(name if name not in names else str(path))
    return [_collect(path, name) for path, name in zip(paths, names, strict=True)]


def _collect(folder: Path, name: str) -> RunContents:
    run = Run.read(folder)
    results: dict[str, Any] = {}
    unreadable: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name in (MANIFEST, STAGES) or path.suffix not in (".parquet", ".safetensors", ".json"):
            continue
        try:
            results[path.stem] = load_result(path)
        except (InputError, KeyError, TypeError) as error:
            if path.suffix != ".json" or path.stem == "verdicts":
                unreadable.append(f"{path.name} is left out: {error}")
    stages: Any = {}
    if run.has(STAGES):
        try:
            stages = run.read_json(STAGES)
        except ValueError as error:
            unreadable.append(f"{STAGES} is left out: {error}")
    return RunContents(
        name, run.manifest, results, stages if isinstance(stages, dict) else {}, tuple(unreadable)
    )


def _model_order(name: str) -> tuple[int, str]:
    known = ("base", "vanilla", "indicator")
    return (known.index(name) if name in known else len(known), name)
