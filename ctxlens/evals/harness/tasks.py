"""Tasks of lm-eval and of ctxlens, found by name."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ctxlens.errors import InputError
from ctxlens.evals.tasks import folder, group_names, task_names

_NEAR = 3
_OURS = "ctxlens_"
_DECLARED = re.compile(r"""^["']?(?:task|group|tag)["']? *: *["']?([^\s"'#\[{|>&*!]+)""", re.MULTILINE)
"""Matches the declaration of a task, group or tag in the text of a task file."""
_NO_TASKS = (".py", ".pyc", ".md", ".jpg", ".png")
_READERS = 16
"""Threads that read task files: on a disk that has not read them yet, most of the time is waiting."""
_SEED = 1234
"""lm-eval's default seed for drawing few-shot examples."""


def check_names(names: Sequence[str], include_path: str | Path | None = None) -> None:
    """Raise `InputError` if a task does not exist; the message suggests similar names.

    lm-eval's own index of its fourteen thousand task files takes long to build. It is built only for a name
    that occurs in the text of these files, but in none of their declarations.
    """
    _check_given(names, include_path)
    if include_path is None:
        own: Sequence[str] = [*task_names(), *group_names()]
        for name in names:
            if name.startswith(_OURS) and not _is_known(name, own):
                raise InputError(f"there is no task {name!r}{_offer(name, own)}")
    else:
        own = _make_manager(include_path, None).all_tasks
    if _find_unsure(names, own):
        _open(names, include_path, None)


def load_tasks(
    names: Sequence[str],
    *,
    include_path: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Load tasks with their documents; groups become their tasks.

    Args:
        names: tasks, groups or tags of ctxlens, of `include_path` or of lm-eval; or YAML files.
        include_path: a folder with further task files.
        metadata: values that tasks are built with, such as `data_dir`.
        num_fewshot: number of examples with their answers before every question; see `give_examples`. None:
            as each task is defined.

    Returns:
        lm-eval's tasks by name, ready to build their requests.

    Raises:
        InputError: a task does not exist (the message suggests similar names), its data cannot be loaded, or
            it takes no examples.
    """
    from ctxlens.evals.harness.examples import give_examples

    manager = _open(names, include_path, metadata)
    try:
        loaded = manager.load(list(names))["tasks"]
    except InputError:
        raise
    except Exception as error:  # data sets and task files may raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"the tasks {', '.join(names)} cannot be loaded: {reason}.") from error
    for name, task in loaded.items():
        task.set_fewshot_seed(seed=_SEED)
        if num_fewshot:
            give_examples(name, task, num_fewshot)
        elif num_fewshot == 0 or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return dict(loaded)


def _open(names: Sequence[str], include_path: str | Path | None, metadata: Mapping[str, Any] | None) -> Any:
    """lm-eval's task manager with an index that holds all these tasks."""
    _check_given(names, include_path)
    manager = _make_manager(include_path, metadata)
    if not all(_is_known(name, manager.all_tasks) for name in names):
        _find_unsure(names, manager.all_tasks)
        manager = _make_manager(include_path, metadata, include_defaults=True)
    for name in names:
        if not _is_known(name, manager.all_tasks):
            raise InputError(f"there is no task {name!r}{_offer(name, manager.all_tasks)}")
    return manager


def _check_given(names: Sequence[str], include_path: str | Path | None) -> None:
    if not names:
        raise InputError("no task is given; ctxlens_smoke needs no data, ctxlens_qa is SQuAD, QuAC and DROP.")
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"--include-path {include_path} is not a folder; give one with task files (YAML).")


def _make_manager(
    include_path: str | Path | None, metadata: Mapping[str, Any] | None, *, include_defaults: bool = False
) -> Any:
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders: list[str | Path] = [str(place) for place in (folder(), include_path) if place is not None]
    told: Any = dict(metadata or {})
    return TaskManager(include_path=folders, include_defaults=include_defaults, metadata=told)


def _find_unsure(names: Sequence[str], own: Sequence[str]) -> list[str]:
    """The names that occur in lm-eval's files without being declared there, so that only its index can tell.

    Args:
        names: the names asked for.
        own: names of ctxlens and of the user's folder, which are known without lm-eval's files.

    Raises:
        InputError: a name that occurs nowhere.
    """
    others = frozenset(name for name in names if not _is_known(name, own))
    if not others:
        return []
    declared, occurring = _read_lm_eval_names(others)
    for name in names:
        if name in others - declared - occurring:
            raise InputError(f"there is no task {name!r}{_offer(name, {*own, *declared})}")
    return sorted(others - declared)


@functools.lru_cache(maxsize=1)
def _read_lm_eval_names(wanted: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
    """The names that lm-eval's files declare, and which of the wanted names occur anywhere in their text."""
    package = importlib.util.find_spec("lm_eval")
    places = package.submodule_search_locations if package else None
    declared: set[str] = set()
    occurring: set[str] = set()
    paths = [path for place in places or () for path in _list_files(Path(place, "tasks"))]
    with ThreadPoolExecutor(_READERS) as readers:
        for text in readers.map(_read_text, paths):
            declared.update(_DECLARED.findall(text))
            occurring.update(name for name in wanted if name in text)
    return frozenset(declared), frozenset(occurring)


def _list_files(folder: str | Path) -> Iterator[str]:
    """The files below a folder that may be task files. Task files may include files of any name."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _list_files(entry.path)
            elif not entry.name.endswith(_NO_TASKS) and entry.is_file():
                yield entry.path


def _read_text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _is_known(name: str, known: Collection[str]) -> bool:
    return name in known or (name.endswith((".yaml", ".yml")) and Path(name).is_file())


def _offer(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=_NEAR, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else "; `lm-eval ls tasks` lists those of lm-eval."


__all__ = ["check_names", "load_tasks"]
