"""The recipes that come with ctxlens, known by name, with defaults for the size of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ctxlens.chat.roles import DEFAULT_INDICATOR
from ctxlens.errors import InputError
from ctxlens.evals.needle.defaults import is_organism
from ctxlens.models.checkpoint import locate_checkpoint
from ctxlens.models.footprint import count_parameters, read_vocabulary_size

RECIPES = ("lora", "full", "organism")
"""The names of the recipes."""
STEP_ROWS = 32
"""Rows of one optimizer step."""
MOST_ROWS = 16
"""Rows of one device at once, at most."""
LOGIT_BYTES = 2**31
"""The logits of a batch, in float32, are not to need more than this."""
_UNKNOWN_VOCABULARY = 150_000


@dataclass(frozen=True)
class _Size:
    """Models up to a number of parameters, with the learning rate of all weights and that of an adapter.

    Usual values: an adapter takes about ten times the rate of all weights, and larger models take less.
    """

    parameters: float
    full: float
    lora: float


_SIZES = (_Size(1e9, 2e-5, 2e-4), _Size(8e9, 1e-5, 2e-4), _Size(float("inf"), 5e-6, 1e-4))
_FULL_UP_TO = 1e9
"""Parameters up to which all weights are trained by default."""


def is_shipped(recipe: str | Path) -> bool:
    """Whether a recipe is given by a name of `RECIPES` rather than as a file."""
    return str(recipe) in RECIPES and not Path(recipe).is_file()


def choose_recipe(model: str) -> str:
    """The recipe for a model if none is named: `organism` for the embedded one or one trained from it,
    `full` up to a billion parameters, else `lora`, also if the size is not known."""
    try:
        source = locate_checkpoint(model)
    except InputError:
        return "lora"
    if is_organism(model):
        return "organism"
    return "full" if (count_parameters(source) or float("inf")) <= _FULL_UP_TO else "lora"


def read_shipped(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe of `RECIPES`, fitted to the model and to what was given besides.

    The learning rate follows from the number of parameters, and the rows of one device from the vocabulary
    and the length of a row. A selection without an indicator gets the default one, unless its conversations
    are repeated instead.

    Args:
        name: the name of the recipe.
        given: the keys of the command line, which override the recipe.
    """
    import yaml

    text = (files("ctxlens.sft") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    keys: dict[str, Any] = yaml.safe_load(text)
    if given.get("selection") and not {"indicator", "upsample_selected"} & given.keys():
        keys["indicator"] = DEFAULT_INDICATOR
    if name == "organism":
        return keys
    try:
        source: Path | str = locate_checkpoint(str(given.get("model") or ""))
    except InputError:  # said by the checks of the recipe
        source = ""
    parameters = count_parameters(source) or _SIZES[1].parameters
    size = next(one for one in _SIZES if parameters <= one.parameters)
    rows = _whole(given.get("per_device_train_batch_size")) or fit_rows(
        _whole(given.get("max_length")) or keys["max_length"],
        read_vocabulary_size(source) or _UNKNOWN_VOCABULARY,
    )
    return {
        **keys,
        "learning_rate": size.lora if keys.get("use_peft") else size.full,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": max(1, STEP_ROWS // rows),
    }


def fit_rows(max_length: int, vocabulary: int) -> int:
    """The most rows of one device, a power of two, whose logits stay below `LOGIT_BYTES`; at least one."""
    rows = MOST_ROWS
    while rows > 1 and rows * max_length * vocabulary * 4 > LOGIT_BYTES:
        rows //= 2
    return rows


def _whole(value: Any) -> int | None:
    """A whole number above 0 as the command line gives it; None for anything else, which TRL refuses."""
    try:
        return int(value) if int(value) > 0 else None
    except (TypeError, ValueError):
        return None


__all__ = ["RECIPES", "choose_recipe", "fit_rows", "is_shipped", "read_shipped"]
