"""Evaluations: models, conditions and tasks, every example answered in every combination, resumable.

```python
evaluation = run_evaluation(["organism-chat"], ["ctxlens_smoke"], ["template", "template+steered:0.1"], limit=20)
evaluation.mean("ctxlens_organism_qa", "contains", ("organism-chat", "template+steered:0.1"))
```
"""  # noqa: E501

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctxlens.chat.condition import Condition
from ctxlens.chat.data.reading import watch_files
from ctxlens.errors import InputError, RunExistsError
from ctxlens.evals.harness.adapter import CtxlensLM
from ctxlens.evals.harness.asking import (
    ANSWER_PREFIX,
    adapt,
    answers_begin,
    find_misfit,
    parse_conditions,
    tell_tasks,
)
from ctxlens.evals.harness.documents import check_data, check_files, describe_data
from ctxlens.evals.harness.samples import Asked, describe_requests, find_metrics, make_rows
from ctxlens.evals.harness.tasks import load_tasks
from ctxlens.models import Model, load_model
from ctxlens.models.checkpoint import hash_checkpoint, locate_checkpoint
from ctxlens.processes import ALONE, Processes
from ctxlens.results import Evaluation
from ctxlens.runs import PartFormat, Parts, Progress, Run, digest

_SEEDS = (0, 1234, 1234)
"""The seeds that lm-eval itself sets for Python, NumPy and torch."""

_EVALUATION_PARTS = PartFormat(".parquet", Evaluation.write, Evaluation.load)


def run_evaluation(
    models: Sequence[str | Path | Model],
    tasks: Sequence[str],
    conditions: str | Sequence[str | Condition] = ("template",),
    *,
    limit: int | None = None,
    answer_prefix: str = ANSWER_PREFIX,
    num_fewshot: int | None = None,
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

    A model that has no indicator or no chat template is left out under the conditions that need it;
    `meta["left_out"]` says so.

    Args:
        models: folders, Hub ids, packaged models, or loaded ones. Differences are from the first.
        tasks: tasks and groups of ctxlens (such as `ctxlens_qa`), of lm-eval, or of `include_path`.
        conditions: spelled as in `ctxlens.chat.condition.SPELLING`, without assistant.
        limit: take only the first examples of each task.
        answer_prefix: how every answer begins under conditions with prefix; see `answers_begin`.
        num_fewshot: number of examples with their answers before every question, the same under every
            condition; see `give_examples`. None: as each task is defined.
        data_dir: where tasks find their data; the Hub by default.
        include_path: a folder with further task files.
        metadata: further values that tasks are built with.
        load: loads a model by its name; by default natively, in float32.
        batch_tokens: upper bound on the prompt and new tokens in one batch.
        out: a run folder. It keeps finished tasks and the answers of the task under way, so that a run that
            was stopped or killed goes on from there.
        name: file name of the result in the run folder.
        processes: the processes that share the examples; all return the same result.
        progress: called with the numbers of finished and of all examples (of this process).

    Raises:
        InputError: unknown tasks or conditions; no model fits any condition; several processes without a run
            folder.
        RunExistsError: `out` holds another evaluation under that name, or one of other data.
    """
    if processes.count > 1 and out is None:
        raise InputError("several processes need a run folder to share their answers in; give one (--out).")
    asked = parse_conditions(conditions)
    named = _name_models(models)
    told = tell_tasks(next(iter(named)), metadata, data_dir)
    made_of = {
        "models": {label: _identify(model) for label, model in named.items()},
        "conditions": [condition.name for condition in asked],
        "tasks": list(tasks),
        "limit": limit,
        "metadata": told,
        **_describe_prefix(asked, answer_prefix),
        **({} if num_fewshot is None else {"num_fewshot": num_fewshot}),
    }
    recorded = _read_recorded_data(out, name)
    if out is not None and recorded is not None:
        check_files(recorded, data_dir, out.folder)
    if out is not None and out.has(name):
        return _load_finished(out, name, made_of)
    with watch_files() as read:
        loaded = load_tasks(tasks, include_path=include_path, metadata=told, num_fewshot=num_fewshot)
    data = describe_data(read, loaded, data_dir)
    if out is not None:
        _check_or_record_data(out, name, recorded, data, processes)
    units = _list_units(named, asked, loaded, limit)
    parts = Parts(out, Path(name).stem, made_of, form=_EVALUATION_PARTS)
    report = _Report(progress, units)
    worker = _Worker(named, loaded, load, batch_tokens, answer_prefix, processes, parts, report)
    worker.answer(units)
    return _collect(parts, units, {**made_of, "data": data}, out, name, processes)


def _describe_prefix(conditions: Sequence[Condition], prefix: str) -> dict[str, str]:
    """The prefix of answers for the record of a run; nothing if no condition has one.

    Raises:
        InputError: it is needed, and has no text.
    """
    if not any(condition.prefix for condition in conditions):
        return {}
    if not prefix.strip():
        raise InputError("the answer prefix has no text; give words with which every answer begins.")
    return {"answer_prefix": prefix}


def first_prompts(
    model: Model,
    tasks: Sequence[str],
    conditions: str | Sequence[str | Condition],
    *,
    answer_prefix: str = ANSWER_PREFIX,
    num_fewshot: int | None = None,
    data_dir: str | Path | None = None,
    include_path: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> list[tuple[str, str, str]]:
    """Task, condition and text of each task's first prompt under every condition that fits the model."""
    told = tell_tasks(model.name, metadata, data_dir)
    loaded = load_tasks(tasks, include_path=include_path, metadata=told, num_fewshot=num_fewshot)
    shown = []
    for name, task in loaded.items():
        for condition in parse_conditions(conditions):
            if find_misfit(model, condition):
                continue
            lm = adapt(model, condition)
            with answers_begin(task, condition, answer_prefix):
                task.build_all_requests(
                    limit=1, apply_chat_template=condition.template, fewshot_as_multiturn=condition.template,
                    chat_template=lm.apply_chat_template if condition.template else None,
                )  # fmt: skip
            shown.append((name, condition.name, lm.describe(task.instances[0])[0]))
    return shown


@dataclass(frozen=True)
class _Unit:
    """What is answered and kept together: one task, asked of one model under one condition.

    Attributes:
        part: name under which the answers are kept.
        model: the model's label.
        condition: how it is asked.
        task: the task's name.
        examples: number of examples.
    """

    part: str
    model: str
    condition: Condition
    task: str
    examples: int

    @property
    def labels(self) -> dict[str, str]:
        return {"model": self.model, "condition": self.condition.name, "task": self.task}


class _Report:
    """Passes on how many of all examples are done."""

    def __init__(self, progress: Progress | None, units: Sequence[_Unit]) -> None:
        self._progress, self._done = progress, 0
        self._total = sum(unit.examples for unit in units)

    def show(self, more: int) -> None:
        """Tell the examples of finished units and `more` of the unit under way."""
        if self._progress:
            self._progress(self._done + more, self._total)

    def add(self, more: int) -> None:
        """Count a unit as finished."""
        self._done += more
        self.show(0)


# Load what is finished


def _load_finished(out: Run, name: str, made_of: Mapping[str, Any]) -> Evaluation:
    """The finished result.

    Raises:
        RunExistsError: it was made of something else.
    """
    done = Evaluation.load(out.path(name))
    if digest({key: done.meta.get(key) for key in made_of}) != digest(made_of):
        raise RunExistsError(f"{out.path(name)} holds another evaluation; choose another --out folder.")
    return done


def _read_recorded_data(out: Run | None, name: str) -> dict[str, Any] | None:
    """What the run folder has recorded about the data of a result; None if there is nothing."""
    return None if out is None else out.manifest.get("data", {}).get(name)


def _check_or_record_data(
    out: Run, name: str, recorded: Mapping[str, Any] | None, data: Mapping[str, Any], processes: Processes
) -> None:
    """Compare the data with those that the run was begun with; record them where this is the beginning."""
    if recorded is not None:
        check_data(recorded, data, out.folder)
    elif processes.is_first:
        out.record("data", {**out.manifest.get("data", {}), name: data})


# Do the work


@dataclass
class _Worker:
    """Answers units one after another and keeps their answers.

    Attributes:
        models: the models by label, loaded or not; one at a time is loaded.
        tasks: lm-eval's tasks by name.
        load: loads a model by its name; None: natively.
        batch_tokens: upper bound on the prompt and new tokens in one batch.
        answer_prefix: how answers begin under conditions with prefix.
        processes: the processes that share the examples.
        parts: where answers are kept.
        report: told after every batch.
    """

    models: Mapping[str, str | Path | Model]
    tasks: Mapping[str, Any]
    load: Callable[[str], Model] | None
    batch_tokens: int
    answer_prefix: str
    processes: Processes
    parts: Parts
    report: _Report
    _current: tuple[str, Model] | None = field(default=None, init=False)

    def answer(self, units: Sequence[_Unit]) -> None:
        """Answer the units that are not finished yet; the first process keeps the answers of all."""
        missing = {unit.part for unit in units if not self.parts.has(unit.part)}
        # No process may write a part before all have seen which ones are missing.
        self.processes.wait()
        for unit in units:
            if unit.part in missing:
                found = self._answer_or_leave_out(unit)
                if found is not None:
                    self.parts.write(unit.part, found)
                self.processes.wait()
            self.report.add(unit.examples)

    def _answer_or_leave_out(self, unit: _Unit) -> Evaluation | None:
        """The answers of a unit, none if the model does not fit; None in a process that is not the first."""
        model = self._model(unit.model)
        if reason := find_misfit(model, unit.condition):
            left_out = [{"model": unit.model, "condition": unit.condition.name, "reason": reason}]
            return Evaluation.from_rows([], {"left_out": left_out}) if self.processes.is_first else None
        gathered = self.processes.gather(self._answer_own_share(model, unit))
        if gathered is None:
            return None
        task = self.tasks[unit.task]
        samples = [sample for share, _ in gathered for sample in share]
        requests = {number: one for _, share in gathered for number, one in share.items()}
        rows = make_rows(task, samples, requests, unit.labels)
        metrics, better = find_metrics(task, rows)
        meta = {"metrics": {unit.task: metrics}, "higher_is_better": better, "left_out": []}
        return Evaluation.from_rows(rows, meta)

    def _answer_own_share(self, model: Model, unit: _Unit) -> tuple[list[Any], dict[int, Asked]]:
        """What lm-eval logs of this process's examples, and what became of their requests."""
        from lm_eval.evaluator import evaluate

        # Processes divide the examples here: lm-eval's own division needs every metric to have a value in
        # each of them.
        mine = list(range(unit.examples))[self.processes.rank :: self.processes.count]
        if not mine:
            return [], {}
        task = self.tasks[unit.task]
        lm = adapt(model, unit.condition, batch_tokens=self.batch_tokens)
        lm.on_batch = lambda done, total: self.report.show(unit.examples * done // max(total, 1))
        _set_seeds()
        kept_in = self.parts.side_path(unit.part, f"rank{self.processes.rank}.db")
        with _cached(lm, kept_in) as caching, answers_begin(task, unit.condition, self.answer_prefix):
            found: Any = evaluate(
                caching,
                {"tasks": {unit.task: task}},
                samples={unit.task: mine},
                bootstrap_iters=0,
                apply_chat_template=unit.condition.template,
                fewshot_as_multiturn=unit.condition.template,
            )
            requests = {mine[number]: one for number, one in describe_requests(lm, task).items()}
        return found["samples"][unit.task], requests

    def _model(self, label: str) -> Model:
        """The model with this label, loaded; the one before it is let go."""
        if self._current is None or self._current[0] != label:
            self._current = None
            self._current = (label, _load_model(self.models[label], self.load))
        return self._current[1]


def _list_units(
    models: Mapping[str, Any], conditions: Sequence[Condition], tasks: Mapping[str, Any], limit: int | None
) -> list[_Unit]:
    """All units in the order in which they are answered, model by model."""
    examples = {name: len(task.eval_docs) for name, task in tasks.items()}
    if limit:
        examples = {name: min(limit, number) for name, number in examples.items()}
    wanted = [(label, condition, task) for label in models for condition in conditions for task in tasks]
    return [
        _Unit(f"{number:05d}", label, condition, task, examples[task])
        for number, (label, condition, task) in enumerate(wanted)
    ]


def _set_seeds() -> None:
    for seed, plant in zip(_SEEDS, (random.seed, np.random.seed, torch.manual_seed), strict=True):
        plant(seed)


@contextmanager
def _cached(lm: CtxlensLM, path: Path | None) -> Iterator[Any]:
    """The adapter with lm-eval's cache of answers in this file; the adapter itself if there is no file."""
    if path is None:
        yield lm
        return
    from lm_eval.api.model import CachingLM

    cached: Any = CachingLM(lm, str(path))
    with closing(cached.dbdict):
        yield cached


def _name_models(models: Sequence[str | Path | Model]) -> dict[str, str | Path | Model]:
    """The models by the label that tables give them."""
    named = {str(getattr(model, "name", model)): model for model in models}
    if len(named) < len(models) or not models:
        raise InputError("give at least one model, and each only once.")
    return named


def _load_model(model: str | Path | Model, load: Callable[[str], Model] | None) -> Model:
    if isinstance(model, Model):
        return model
    return load(str(model)) if load else load_model(model, backend="native")


def _identify(model: str | Path | Model) -> dict[str, Any]:
    """What tells a model from others, without loading it."""
    if isinstance(model, Model):
        return {key: str(value) for key, value in model.identity.items()}
    source = locate_checkpoint(model)
    return {"path": str(source), "sha256": hash_checkpoint(source)}


# Collect


def _collect(
    parts: Parts,
    units: Sequence[_Unit],
    meta: Mapping[str, Any],
    out: Run | None,
    name: str,
    processes: Processes,
) -> Evaluation:
    """The whole result; with a run folder the first process writes it there, and all read it."""
    if out is None:
        return _join(parts, units, meta)
    if processes.is_first:
        out.save(name, _join(parts, units, meta))
        parts.remove()
    processes.wait()
    return Evaluation.load(out.path(name))


def _join(parts: Parts, units: Sequence[_Unit], meta: Mapping[str, Any]) -> Evaluation:
    """The answers of all units in one table, with what their `meta` says put together.

    Raises:
        InputError: no model could be asked under any condition.
    """
    found: list[Evaluation] = [parts.read(unit.part) for unit in units]
    left_out = list({json.dumps(one): one for part in found for one in part.meta["left_out"]}.values())
    filled = [part for part in found if len(part)]
    if not filled:
        why = "; ".join(f"{one['model']}, {one['condition']}: {one['reason']}" for one in left_out)
        raise InputError(f"no model can be asked under any of the conditions ({why}).")
    metrics: dict[str, list[str]] = {}
    better: dict[str, bool] = {}
    for part in filled:
        metrics.update(part.meta["metrics"])
        better.update(part.meta["higher_is_better"])
    joined = {"metrics": metrics, "higher_is_better": better, "left_out": left_out, **meta}
    return Evaluation(Evaluation.concat(filled).frame, joined)


__all__ = ["first_prompts", "run_evaluation"]
