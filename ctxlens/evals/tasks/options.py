"""What users say about tasks, and documents as lm-eval wants them.

lm-eval hands the loader of every task all of its `metadata`, the model's arguments among it. Each loader
takes the keys that begin with its own name, and refuses those of them that it does not know.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ctxlens.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


def take_options(metadata: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one task: `{name}_{key}` in the metadata, else the default.

    Args:
        metadata: all that lm-eval was given.
        name: what the task's keys begin with.
        defaults: the known keys, without that beginning.

    Raises:
        InputError: a key that begins so and is not known.
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
    """Documents as the only split of a data set, `test`."""
    from datasets import Dataset

    return {"test": Dataset.from_list([dict(doc) for doc in docs])}


def check_count(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least `least`.

    Raises:
        InputError: it is not one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return value


__all__ = ["check_count", "make_split", "take_options"]
