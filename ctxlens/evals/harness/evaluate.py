"""Models, conditions and tasks: every example answered in every combination, resumable.

```python
evaluation = run_evaluation(["organism-chat"], ["ctxlens_smoke"], ["vanilla", "steered:0.1"], limit=20)
evaluation.mean("ctxlens_organism_qa", "contains", ("organism-chat", "steered:0.1"))
```
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctxlens.chat.data.reading import watch_files
from ctxlens.errors import InputError, RunExistsError
from ctxlens.evals.harness.adapter import CtxlensLM
from ctxlens.evals.harness.conditions import Condition, parse_conditions
from ctxlens.evals.harness.documents import check_data, check_files, describe_data
from ctxlens.evals.harness.samples import describe_requests, find_metrics, make_rows
from ctxlens.evals.harness.tasks import load_tasks
from ctxlens.files import write_atomic
from ctxlens.models import Model, load_model
from ctxlens.models.loading import hash_checkpoint, locate_checkpoint
from ctxlens.processes import ALONE, Processes
from ctxlens.results import Evaluation
from ctxlens.runs import Run

Progress = Callable[[int, int], None]
_SEEDS = (0, 1234, 1234)
"""lm-eval's own for Python, NumPy and torch."""


@dataclass(frozen=True)
class _Unit:
    """What is answered and kept together."""

    model: str
    condition: Condition
    task: str
    examples: int

    @property
    def labels(self) -> dict[str, str]:
        return {"model": self.model, "condition": self.condition.name, "task": self.task}


def run_evaluation(
    models: Sequence[str | Path | Model],
    tasks: Sequence[str],
    conditions: str | Sequence[str] = ("vanilla",),
    *,
    limit: int | None = None,
    data_dir: str | Path | None = None,
    include_path: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    load: Callable[[str], Model] | None = None,
    batch_tokens: int = 8192,
    out: Run | None = None,
    name: str = "evaluation.parquet",
    processes: Processes = ALONE,
    progress: Progress | None = None,
) -> Evaluation:
    """Let models answer the examples of tasks under every condition.

    A model that has no indicator or no chat template is left out where a condition needs it, and so recorded
    in `meta["left_out"]`.

    Args:
        models: folders, Hub ids, packaged models, or loaded ones. Differences are from the first.
        tasks: tasks and groups of ctxlens (such as `ctxlens_qa`), of lm-eval, or of `include_path`.
        conditions: in words, see `ctxlens.evals.harness.conditions.HOW`.
        limit: take only the first examples of each task.
        data_dir: where tasks find their data; the Hub by default.
        include_path: a folder with further task files.
        metadata: what tasks are told besides.
        load: how a model is loaded by its name; by default natively, in float32.
        batch_tokens: prompt and new tokens worked on at once.
        out: a run folder. Finished tasks are kept there, and the answers of the one under way, so that a run
            that was stopped, however roughly, goes on from there.
        name: file name of the result in the run folder.
        processes: those that share the examples; all return the same result.
        progress: called with the numbers of finished and of all examples (of this process).

    Raises:
        InputError: unknown tasks or conditions; no model that any condition fits; several processes without
            a run folder.
        RunExistsError: `out` holds another evaluation under that name, or one of other data.
    """
    if processes.count > 1 and out is None:
        raise InputError("several processes need a run folder to share their answers in; give one (--out).")
    asked = parse_conditions(conditions)
    named = {str(getattr(model, "name", model)): model for model in models}
    if len(named) < len(models) or not models:
        raise InputError("give at least one model, and each only once.")
    metadata = {"pretrained": next(iter(named)), **(metadata or {})}
    if data_dir is not None:
        metadata["data_dir"] = str(data_dir)
    made_of = {
        "models": {label: _identify(model) for label, model in named.items()},
        "conditions": [_describe(condition) for condition in asked],
        "tasks": list(tasks),
        "limit": limit,
        "metadata": metadata,
    }
    fingerprint = _hash(made_of)
    recorded = out.manifest.get("data", {}).get(name) if out is not None else None
    if out is not None and recorded:
        check_files(recorded, data_dir, out.folder)
    if out is not None and out.has(name):
        done = Evaluation.load(out.path(name))
        if done.meta.get("fingerprint") != fingerprint:
            raise RunExistsError(f"{out.path(name)} holds another evaluation; choose another --out folder.")
        return done
    with watch_files() as read:
        loaded = load_tasks(tasks, include_path=include_path, metadata=metadata)
    data = describe_data(read, loaded, data_dir)
    if out is not None and recorded:
        check_data(recorded, data, out.folder)
    elif out is not None and processes.is_first:
        out = out.record("data", {**out.manifest.get("data", {}), name: data})
    units = [
        _Unit(label, condition, task, min(limit or len(loaded[task].eval_docs), len(loaded[task].eval_docs)))
        for label in named
        for condition in asked
        for task in loaded
    ]
    key = _hash([fingerprint, out.manifest.get("created") if out else None])
    store = _Parts(out.path(f"{Path(name).stem}.parts") / key if out else None)
    missing = [number for number in range(len(units)) if not store.has(number)]
    processes.wait()
    report = _Report(progress, sum(unit.examples for unit in units))
    current: tuple[str, Model] | None = None
    for number, unit in enumerate(units):
        if number in missing:
            if current is None or current[0] != unit.model:
                current = (unit.model, _load(named[unit.model], load))
            part = _answer(
                current[1], unit, loaded[unit.task],
                batch_tokens=batch_tokens, processes=processes,
                cache=store.cache(number), report=report,
            )  # fmt: skip
            if part is not None:
                store.write(number, part)
            processes.wait()
        report.add(unit.examples)
    if processes.is_first:
        whole = _join([store.read(number) for number in range(len(units))])
        whole = Evaluation(whole.frame, {**whole.meta, **made_of, "data": data, "fingerprint": fingerprint})
        if out is None:
            return whole
        out.save(name, whole)
        store.remove()
    processes.wait()
    assert out is not None
    return Evaluation.load(out.path(name))


def first_prompts(
    model: Model,
    tasks: Sequence[str],
    conditions: str | Sequence[str],
    *,
    data_dir: str | Path | None = None,
    include_path: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> list[tuple[str, str, str]]:
    """Task, condition and text of the first prompt of every task under every condition that fits."""
    metadata = {"pretrained": model.name, **(metadata or {})}
    if data_dir is not None:
        metadata["data_dir"] = str(data_dir)
    loaded = load_tasks(tasks, include_path=include_path, metadata=metadata)
    shown = []
    for name, task in loaded.items():
        for condition in parse_conditions(conditions):
            if _unfit(model, condition):
                continue
            lm = _adapter(model, condition)
            task.build_all_requests(
                limit=1, apply_chat_template=condition.template, fewshot_as_multiturn=condition.template,
                chat_template=lm.apply_chat_template if condition.template else None,
            )  # fmt: skip
            shown.append((name, condition.name, lm.describe(task.instances[0])[0]))
    return shown


def _answer(
    model: Model,
    unit: _Unit,
    task: Any,
    *,
    batch_tokens: int,
    processes: Processes,
    cache: Path | None,
    report: _Report,
) -> Evaluation | None:
    """The answers of one unit; None in a process that is not the first."""
    from lm_eval.evaluator import evaluate

    if reason := _unfit(model, unit.condition):
        left_out = [{"model": unit.model, "condition": unit.condition.name, "reason": reason}]
        return Evaluation.from_rows([], {"left_out": left_out}) if processes.is_first else None
    # lm-eval's own division among processes needs every metric to have a value in each of them.
    mine = list(range(unit.examples))[processes.rank :: processes.count]
    lm = _adapter(model, unit.condition, batch_tokens=batch_tokens)
    lm.on_batch = lambda done, total: report.show(unit.examples * done // max(total, 1))
    for seed, plant in zip(_SEEDS, (random.seed, np.random.seed, torch.manual_seed), strict=True):
        plant(seed)
    samples: list[Any] = []
    asked: dict[int, tuple[str, bool]] = {}
    if mine:
        kept: Any = nullcontext(lm) if cache is None else _keep(lm, cache, processes.rank)
        with kept as caching:
            found: Any = evaluate(
                caching,
                {"tasks": {unit.task: task}},
                samples={unit.task: mine},
                bootstrap_iters=0,
                apply_chat_template=unit.condition.template,
                fewshot_as_multiturn=unit.condition.template,
            )
        samples = found["samples"][unit.task]
        asked = {mine[number]: one for number, one in describe_requests(lm, task).items()}
    parts = processes.gather((samples, asked))
    if parts is None:
        return None
    samples = [sample for part, _ in parts for sample in part]
    requests = {number: one for _, part in parts for number, one in part.items()}
    rows = make_rows(task, samples, requests, unit.labels)
    metrics, better = find_metrics(task, rows)
    meta = {"metrics": {unit.task: metrics}, "higher_is_better": better, "left_out": []}
    return Evaluation.from_rows(rows, meta)


@contextmanager
def _keep(lm: CtxlensLM, cache: Path, rank: int) -> Iterator[Any]:
    """The adapter with lm-eval's cache of the answers given so far, closed at the end."""
    from lm_eval.api.model import CachingLM

    cache.parent.mkdir(parents=True, exist_ok=True)
    cached: Any = CachingLM(lm, f"{cache}_rank{rank}.db")
    with closing(cached.dbdict):
        yield cached


def _adapter(model: Model, condition: Condition, **options: Any) -> CtxlensLM:
    s = condition.steering
    steering = {} if s is None else {"alpha": s.alpha, "heads": s.heads}
    options = {"processes": ALONE, **options}
    return CtxlensLM(model, indicator=condition.indicator, **steering, **options)


def _unfit(model: Model, condition: Condition) -> str:
    """Why a model cannot be asked under a condition; empty if it can."""
    if condition.indicator and model.indicator is None:
        return "it has no indicator token"
    if condition.template and not model.tokenizer.chat_template:
        return "it has no chat template"
    if condition.steering is not None:
        try:
            condition.steering.check_heads(model.n_layers, model.n_heads)
        except InputError as error:
            return str(error).rstrip(".")
    return ""


def _load(model: str | Path | Model, load: Callable[[str], Model] | None) -> Model:
    if isinstance(model, Model):
        return model
    return load(str(model)) if load else load_model(model, backend="native")


def _identify(model: str | Path | Model) -> dict[str, Any]:
    if isinstance(model, Model):
        return {key: str(value) for key, value in model.identity.items()}
    source = locate_checkpoint(model)
    return {"path": str(source), "sha256": hash_checkpoint(source)}


def _describe(condition: Condition) -> dict[str, Any]:
    steering = None if condition.steering is None else condition.steering.describe()
    return {"name": condition.name, "template": condition.template, "indicator": condition.indicator,
            "steering": steering}  # fmt: skip


def _join(parts: Sequence[Evaluation]) -> Evaluation:
    """The parts under one another, with what their `meta` says put together.

    Raises:
        InputError: no model could be asked under any condition.
    """
    import pandas as pd

    left_out = list({json.dumps(one): one for part in parts for one in part.meta["left_out"]}.values())
    filled = [part for part in parts if len(part)]
    if not filled:
        why = "; ".join(f"{one['model']}, {one['condition']}: {one['reason']}" for one in left_out)
        raise InputError(f"no model can be asked under any of the conditions ({why}).")
    meta: dict[str, Any] = {"metrics": {}, "higher_is_better": {}, "left_out": left_out}
    for part in filled:
        meta["metrics"].update(part.meta["metrics"])
        meta["higher_is_better"].update(part.meta["higher_is_better"])
    return Evaluation(pd.concat([part.frame for part in filled], ignore_index=True), meta)


class _Parts:
    """Finished units until all are there: each in a file of its own, or in memory."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[int, Evaluation] = {}

    def has(self, number: int) -> bool:
        return (self._folder / f"{number:05d}.parquet").exists() if self._folder else number in self._memory

    def read(self, number: int) -> Evaluation:
        return (
            Evaluation.load(self._folder / f"{number:05d}.parquet") if self._folder else self._memory[number]
        )

    def write(self, number: int, part: Evaluation) -> None:
        if self._folder is None:
            self._memory[number] = part
        else:
            write_atomic(self._folder / f"{number:05d}.parquet", part.save)
            for path in self._folder.glob(f"{number:05d}_rank*"):
                path.unlink(missing_ok=True)

    def cache(self, number: int) -> Path | None:
        return self._folder / f"{number:05d}" if self._folder else None

    def remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder.parent, ignore_errors=True)


class _Report:
    """Tells how many examples of how many are done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def show(self, more: int) -> None:
        if self._progress:
            self._progress(self._done + more, self._total)

    def add(self, more: int) -> None:
        self._done += more
        self.show(0)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


__all__ = ["first_prompts", "run_evaluation"]
