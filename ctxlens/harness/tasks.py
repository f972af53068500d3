"""Tasks of lm-eval and of ctxlens by name."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctxlens.errors import InputError
from ctxlens.tasks import folder

_NEAR = 3
_SEED = 1234
"""The seed with which lm-eval draws its examples by default."""


def load_tasks(
    names: Sequence[str], *, include_path: str | Path | None = None, metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Load tasks with their documents; groups become their tasks.

    Args:
        names: tasks, groups or tags of ctxlens, of a folder of one's own, or of lm-eval; or YAML files.
        include_path: a folder with further task files.
        metadata: what tasks are told, such as `data_dir`.

    Returns:
        lm-eval's tasks by name, each ready to be asked.

    Raises:
        InputError: no such task (the nearest names are offered), or one whose data cannot be had.
    """
    from lm_eval.tasks import TaskManager

    if not names:
        raise InputError("no task is given; ctxlens_smoke needs no data, ctxlens_qa is SQuAD, QuAC and DROP.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [str(folder())]
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise InputError(f"--include-path {include_path} is no folder; give one with task files (YAML).")
        folders.append(str(include_path))
    options = {"include_path": folders, "metadata": dict(metadata or {})}
    # lm-eval's own fourteen thousand task files take long to look through.
    manager: Any = TaskManager(include_defaults=False, **options)
    if not all(_is_known(name, manager) for name in names):
        manager = TaskManager(include_defaults=True, **options)
    for name in names:
        if not _is_known(name, manager):
            raise InputError(f"there is no task {name!r}{_offer(name, manager.all_tasks)}.")
    try:
        loaded = manager.load(list(names))["tasks"]
    except InputError:
        raise
    except Exception as error:  # data sets and task files may raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"the tasks {', '.join(names)} cannot be loaded: {reason}.") from error
    for task in loaded.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    return dict(loaded)


def _is_known(name: str, manager: Any) -> bool:
    return name in manager.all_tasks or (name.endswith((".yaml", ".yml")) and Path(name).is_file())


def _offer(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=_NEAR, cutoff=0.5)
    return (
        f"; did you mean {' or '.join(near)}?"[:-1] if near else "; lm-eval ls tasks lists those of lm-eval"
    )


__all__ = ["load_tasks"]
