"""Read run folders: all results, by the type that each file declares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from ctxlens.errors import InputError
from ctxlens.files import read_lines
from ctxlens.report.paths import without_paths
from ctxlens.report.plots.conditions import steered_name
from ctxlens.results import (
    Ability,
    Dialogues,
    Evaluation,
    NeedleGrid,
    Ratings,
    RoleAllocation,
    Scores,
    Selection,
    TokenView,
    Verdict,
    Verdicts,
    load_result,
)
from ctxlens.results.fastchat import QUESTIONS, Question, read_dialogues, read_questions, read_ratings
from ctxlens.runs import MANIFEST, Run

EXTRAS = ("timings", "steer", "train", "layer", "card")
"""JSON files that studies write next to their results; they are read as plain JSON."""

READINGS = Path("context") / "readings.jsonl"
"""Readings of context use during a training, in its folder; they are read into `extras["context"]`."""
_CHECKPOINTS = ("model", "adapter_model")
_LARGEST_JSON = 1_000_000
R = TypeVar("R")


@dataclass(frozen=True)
class RunContents:
    """All results of one run folder that can be drawn.

    Attributes:
        name: the folder's name, unique among the runs of a report.
        manifest: study, configuration, versions.
        results: results by file name without suffix, in the order of the names.
        extras: the contents of the files named in `EXTRAS`. For answers in FastChat's layout, `models` says
            how each model was asked.
        unreadable: one sentence for each file that looks like a result but cannot be read.
    """

    name: str
    manifest: Mapping[str, Any]
    results: Mapping[str, Any]
    extras: Mapping[str, Any] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()

    @property
    def study(self) -> str:
        """The name of the study, for instance `needle`."""
        return str(self.manifest.get("study", "run"))

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's settings."""
        config = self.manifest.get("config")
        return config if isinstance(config, dict) else {}

    @property
    def is_demo(self) -> bool:
        """Whether this is a run of the demo, on the embedded model."""
        return self.study == "demo"

    def all(self, kind: type[R]) -> dict[str, R]:
        """The results of one type, by name."""
        return {name: one for name, one in self.results.items() if isinstance(one, kind)}

    def grids(self, *, steered: bool) -> dict[str, NeedleGrid]:
        """Needle grids with several values of α (steered), or those with a single one."""
        grids = self.all(NeedleGrid)
        return {
            name: g for name, g in grids.items() if len(g) and (g.frame["alpha"].nunique() > 1) == steered
        }

    def allocations(self) -> dict[str, dict[str, RoleAllocation]]:
        """Allocations by model and condition, as their `meta` names them; else by file name."""
        found: dict[str, dict[str, RoleAllocation]] = {}
        for name, one in self.all(RoleAllocation).items():
            model = short_name(one.meta.get("model", name))
            condition = steered_name(one.meta.get("condition", "as given"), one.meta.get("steering") or ())
            if condition in found.setdefault(model, {}):
                condition = name
            found[model][condition] = one
        order = {"plain": 0, "template": 1}
        return {
            model: dict(sorted(parts.items(), key=lambda item: order.get(item[0], 2)))
            for model, parts in sorted(found.items(), key=lambda item: _model_order(item[0]))
        }

    def scored(self) -> list[tuple[str, Scores | None, Selection | None]]:
        """Score tables and selections by name, paired in their order: first with first, and so on."""
        scores = {name: table for name, table in self.all(Scores).items() if len(table)}
        selections = {name: table for name, table in self.all(Selection).items() if len(table)}
        pairs = zip_longest(scores.items(), selections.items(), fillvalue=("", None))
        return [(name or chosen, table, selection) for (name, table), (chosen, selection) in pairs]

    def ability(self) -> Ability | None:
        """Closed-book answers without steering; None if there are none."""
        tables = [_unsteered(table) for table in self.all(Ability).values()]
        tables = [table for table in tables if len(table)]
        return Ability.concat(tables) if tables else None

    def steered_ability(self, models: Sequence[str]) -> Ability | None:
        """Closed-book answers of these models under steering; None if there are none.

        A table without the column `heads` is one in which all heads were steered.
        """
        for table in self.all(Ability).values():
            frame = table.frame
            if "alpha" not in frame or not (frame["alpha"] != 1.0).any():
                continue
            rows = frame[frame["model"].isin(list(models)) & ~frame["indicator"].astype(bool)]
            if "heads" not in rows:
                rows = rows.assign(heads="all")
            return Ability(rows.reset_index(drop=True), table.meta) if len(rows) else None
        return None

    def token_views(self) -> list[TokenView]:
        """Token views in the order of their names."""
        return list(self.all(TokenView).values())

    def dialogues(self) -> Dialogues | None:
        """The answers of all models to questions of several turns; None if there are none."""
        tables = [table for table in self.all(Dialogues).values() if len(table)]
        return Dialogues.concat(tables) if tables else None

    def ratings(self) -> dict[str, Ratings]:
        """Ratings by judge. Where a judge has two tables, the one with the judge's words is taken."""
        tables = [table for table in self.all(Ratings).values() if len(table)]
        tables.sort(key=lambda table: "judgment" in table.frame)
        return {str(table.meta.get("judge", "a judge")): table for table in tables}

    def verdicts(self) -> dict[str, Verdict]:
        """Verdicts by claim."""
        return {v.claim: v for group in self.all(Verdicts).values() for v in group.verdicts}


def collect_runs(folders: Sequence[str | Path]) -> list[RunContents]:
    """Read run folders.

    Raises:
        InputError: no folder is given, or a folder holds no run.
    """
    if not folders:
        raise InputError(
            "no run folder was given; name at least one folder that a ctxlens command has written."
        )
    paths = [Path(folder) for folder in folders]
    return [_collect(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    names = [one[-1] for one in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        twice = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(one[-depth:]) if name in twice else name for name, one in zip(names, parts, strict=True)
        ]
    return names


def _collect(folder: Path, name: str) -> RunContents:
    run = Run.read(folder)
    results: dict[str, Any] = {}
    extras: dict[str, Any] = {}
    unreadable: list[str] = []
    for path in [*sorted(folder.iterdir()), *_evaluation_files(folder)]:
        if path.name == MANIFEST or path.suffix not in (".parquet", ".safetensors", ".json"):
            continue
        if path.stem.split("-")[0] in _CHECKPOINTS:
            continue
        try:
            if path.suffix == ".json" and path.stem in EXTRAS:
                extras[path.stem] = json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix != ".json" or path.stat().st_size <= _LARGEST_JSON:
                at = path.relative_to(folder)
                results[str(at.with_suffix(""))] = load_result(path)
        except (InputError, KeyError, TypeError, ValueError) as error:
            if path.suffix != ".json" or path.stem in ("verdicts", *EXTRAS):
                unreadable.append(without_paths(f"{path.name} is left out: {error}"))
    _collect_readings(folder, extras, unreadable)
    _collect_fastchat(folder, results, extras, unreadable)
    results = {key: _with_short_names(one) for key, one in results.items()}
    return RunContents(name, _pathless(run.manifest), results, extras, tuple(unreadable))


def _pathless(value: Any) -> Any:
    """A value of a manifest in which no text holds a path of this machine."""
    if isinstance(value, Mapping):
        return {without_paths(str(key)): _pathless(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_pathless(one) for one in value]
    return without_paths(value) if isinstance(value, str) else value


def _with_short_names(result: Any) -> Any:
    """A table with short names of models, unless two models would then share one."""
    if not isinstance(result, NeedleGrid | Ability | Evaluation) or "model" not in result.frame:
        return result
    names = {name: short_name(name) for name in result.frame["model"].unique()}
    if len(set(names.values())) < len(names) or all(name == short for name, short in names.items()):
        return result
    return replace(result, frame=result.frame.assign(model=result.frame["model"].map(names)))


def _collect_readings(folder: Path, extras: dict[str, Any], unreadable: list[str]) -> None:
    """Add the readings of a training to the extras; the folder of the readings may be given, too."""
    for path in (folder / READINGS, folder / READINGS.name):
        try:
            if lines := read_lines(path):
                extras["context"] = lines
                return
        except InputError as error:
            unreadable.append(f"{path.name} is left out: {error}")


def _collect_fastchat(
    folder: Path, results: dict[str, Any], extras: dict[str, Any], unreadable: list[str]
) -> None:
    """Add answers, judgments and settings (`extras["models"]`) of a folder in FastChat's layout."""
    try:
        questions = read_questions(folder / QUESTIONS)
    except InputError as error:
        questions = {}
        unreadable.append(without_paths(f"{QUESTIONS} is left out: {error}"))
    if not questions:
        pairs = [
            zip(table.frame["question_id"], table.frame["category"], strict=True)
            for table in results.values()
            if isinstance(table, Ratings)
        ]
        questions = {str(key): Question(str(category)) for one in pairs for key, category in one}
    for path in sorted(folder.glob("model_*/*.jsonl"), key=lambda path: (path.parent.name, path.stem)):
        at = f"{path.parent.name}/{path.stem}"
        try:
            if path.parent.name == "model_answer":
                results[at] = read_dialogues(path, questions)
            elif path.parent.name == "model_judgment":
                found = read_ratings(path, questions)
                results |= {f"{at}/{judge}": ratings for judge, ratings in found.items()}
        except InputError as error:
            unreadable.append(without_paths(f"{path.name} is left out: {error}"))
    for path in sorted(folder.glob("models/*.json")):
        try:
            extras.setdefault("models", {})[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            unreadable.append(without_paths(f"models/{path.name} is left out: {error}"))


def _evaluation_files(folder: Path) -> list[Path]:
    """The files of evaluations in subfolders of a training run."""
    inner = [path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))]
    return [
        path
        for one in inner
        if Run.read(one).manifest.get("study") == "evaluation"
        for path in sorted(one.iterdir())
    ]


def short_name(model: object) -> str:
    """A model's name for headings; for a path, its last part."""
    name = str(model)
    return Path(name).name or name if name.startswith(("/", ".", "~")) else name


def _unsteered(table: Ability) -> Ability:
    return table.where(alpha=1.0) if "alpha" in table.frame else table


def _model_order(name: str) -> tuple[int, str]:
    known = ("base", "vanilla", "indicator")
    return (known.index(name) if name in known else len(known), name)
