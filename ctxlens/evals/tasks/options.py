"""The options of tasks, and documents in the form that lm-eval expects.

lm-eval passes its whole `metadata`, including the model's arguments, to the loader of every task. Each loader
takes the keys that begin with its own name, and refuses those that it does not know.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ctxlens.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


def take_options(metadata: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one task: `{name}_{key}` from the metadata, or else the default.

    Args:
        metadata: everything that lm-eval was given.
        name: the prefix of the task's keys.
        defaults: the known keys, without the prefix, and their defaults.

    Raises:
        InputError: a key has the prefix but is not known.
    """
    given = {key.removeprefix(f"{name}_"): key for key in metadata if key.startswith(f"{name}_")}
    for key in given:
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1) or list(defaults)
            raise InputError(
                f"unknown option {name}_{key}; did you mean {' or '.join(f'{name}_{key}' for key in near)}?"
            )
    return {key: metadata[given[key]] if key in given else value for key, value in defaults.items()}


def make_split(docs: Sequence[Mapping[str, Any]]) -> dict[str, Dataset]:
    """Documents as a data set whose only split is `test`."""
    from datasets import Dataset

    return {"test": Dataset.from_list([dict(doc) for doc in docs])}


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Check that a value is a whole number of at least `least`, and return it.

    Raises:
        InputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return value


__all__ = ["check_count", "make_split", "take_options"]
