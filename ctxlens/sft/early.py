"""Refuses a recipe for what can be seen without TRL, torch and transformers, which take seconds to import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ctxlens.chat.data import open_conversations
from ctxlens.chat.roles import check_arguments
from ctxlens.errors import InputError, Problems, RunExistsError, require_package
from ctxlens.models.checkpoint import (
    find_chat_template,
    lacks_chat_template,
    locate_checkpoint,
    read_chat_template,
)
from ctxlens.models.footprint import count_parameters
from ctxlens.runs import MANIFEST, Run
from ctxlens.sft.keys import RECORDED_KEYS, TrainConfig, unknown_keys
from ctxlens.sft.keys.trl import read_trl_keys
from ctxlens.sft.recipe import DEFAULT_OUT, Overrides, Recipe, read_recipe
from ctxlens.sft.room import check_room, estimate_bytes
from ctxlens.sft.shipped import is_shipped
from ctxlens.sft.watching import check_readings

STUDY = "train"

_NUMBERS = {"int": int, "float": float}


def check_training(path: str | Path, overrides: Overrides = (), problems: Problems | None = None) -> Recipe:
    """Read a recipe and refuse it early, with everything that is wrong in one message.

    Args:
        path: the recipe, as `read_recipe` takes it.
        overrides: its overrides.
        problems: what is known to be wrong already.

    Raises:
        InputError: see `read_recipe` and `check_recipe`.
    """
    found = Problems() if problems is None else problems
    recipe = read_recipe(path, overrides, found)
    check_recipe(recipe, found)
    found.report()
    return recipe


def check_recipe(recipe: Recipe, problems: Problems | None = None) -> None:
    """Refuse a recipe early; the training itself checks the rest.

    Args:
        recipe: the recipe.
        problems: takes note of what is wrong; by default everything is raised in one message.

    Raises:
        InputError: an unknown key, or text for a number; no data set; a model, data set, selection or
            template that is not there; a model without a template; values for variables that the template
            does not use; readings of context use in too short a window; an adapter without the package for
            it; a disk that is too full.
        RunExistsError: the folder of the results holds another run.
    """
    found = Problems() if problems is None else problems
    checks: tuple[Callable[[Recipe], None], ...] = (
        _check_keys, _check_numbers, _check_dataset, _check_model, _check_context, _check_files,
        _check_packages, _check_folder, _check_room,
    )  # fmt: skip
    for check in checks:
        with found:
            check(recipe)
    if problems is None:
        found.report()


def _check_keys(recipe: Recipe) -> None:
    known = read_trl_keys()
    if not known:
        return
    every, told = {*TrainConfig.model_fields, *known}, []
    for names, where in ((recipe.arguments, str(recipe.path)), (recipe.named, "the command line")):
        unknown = [name for name in names if name not in every and name.removeprefix("no_") not in every]
        told += [unknown_keys(unknown, every, where)] if unknown else []
    if told:
        raise InputError(" ".join(told))


def _check_numbers(recipe: Recipe) -> None:
    known, told = read_trl_keys(), []
    for name, value in recipe.given.items():
        kind = known.get(name, "").removesuffix(" | None")
        if isinstance(value, str) and kind in _NUMBERS and value.lower() not in ("none", "null"):
            try:
                _NUMBERS[kind](value)
            except ValueError:
                told.append(f"{recipe.path}: argument --{name}: invalid {kind} value: {value!r}.")
    if told:
        raise InputError(" ".join(told))


def _check_dataset(recipe: Recipe) -> None:
    config = recipe.config
    if not config.dataset and is_shipped(recipe.path):
        raise InputError("no data set is named; give one as --dataset: a file, a folder or a Hub id.")
    if not config.dataset:
        raise InputError(f"{recipe.path} names no dataset; add `dataset: FILE_OR_HUB_ID`.")
    if Path(config.dataset).expanduser().is_file() or Path(config.dataset).suffix:
        open_conversations(config.dataset, split=config.split, layout=config.layout, limit=config.limit)


def _check_model(recipe: Recipe) -> None:
    """The model is there, and has a template that takes the given values."""
    config = recipe.config
    if is_shipped(recipe.path) and "model" not in config.model_fields_set:
        raise InputError(f"no model is named; give one: ctxlens train MODEL --recipe {recipe.path}.")
    source, template = _find_template(recipe)
    if template is None and lacks_chat_template(source):
        raise InputError(
            f"{config.model} has no chat template, so conversations cannot be rendered for it; give one: "
            "chatml, which comes with ctxlens, or a file (--chat-template)."
        )
    if template and config.template_args:
        check_arguments(template, config.template_args)


def _check_context(recipe: Recipe) -> None:
    """Readings of context use have a template to compare, and a window that holds their texts."""
    source, template = _find_template(recipe)
    if template is not None or not lacks_chat_template(source):  # else `_check_model` has said so
        check_readings(recipe.config, source, template)


def _find_template(recipe: Recipe) -> tuple[Path | str, Any]:
    """Where the model is, and the chat template that it is trained with; None if none is known."""
    source = locate_checkpoint(recipe.config.model)
    return source, read_chat_template(recipe.config.chat_template) or find_chat_template(source)


def _check_files(recipe: Recipe) -> None:
    for key in ("selection", "replay"):
        path = getattr(recipe.config, key)
        if path and not Path(path).exists():
            raise InputError(f"{key}: there is no file or folder {path}.")


def _check_packages(recipe: Recipe) -> None:
    if _trains_adapter(recipe):
        otherwise = ", or train all weights with --recipe full" if is_shipped(recipe.path) else ""
        require_package("use_peft", "peft", otherwise)


def _check_room(recipe: Recipe) -> None:
    """The disk holds the checkpoints of a new run, as far as the size of the model is known."""
    folder = _folder(recipe)
    needed = estimate_size(recipe)
    if needed is not None and (recipe.config.overwrite or not (folder / MANIFEST).is_file()):
        check_room(folder, needed)


def estimate_size(recipe: Recipe) -> int | None:
    """Bytes that a recipe's checkpoints need; None if its model is not there, or its size not known."""
    try:
        parameters = count_parameters(locate_checkpoint(recipe.config.model))
    except InputError:
        return None
    if parameters is None:
        return None
    given = recipe.given
    kept = str(given.get("save_total_limit"))
    return estimate_bytes(
        parameters,
        dtype=str(given.get("dtype") or "float32"),
        adapter=_trains_adapter(recipe),
        saves=str(given.get("save_strategy", "no")) != "no",
        kept=int(kept) if kept.isdigit() else 1,
    )


def _trains_adapter(recipe: Recipe) -> bool:
    """Whether `use_peft` is set, as a value or as a flag of the command line."""
    is_flag = recipe.named.get("use_peft", "") is None
    return is_flag or str(recipe.given.get("use_peft")).lower() in {"true", "1", "yes"}


def _folder(recipe: Recipe) -> Path:
    return Path(str(recipe.given.get("output_dir") or DEFAULT_OUT))


def _check_folder(recipe: Recipe) -> None:
    folder = _folder(recipe)
    if recipe.config.overwrite or not (folder / MANIFEST).is_file():
        return
    manifest = Run.read(folder).manifest
    config = manifest.get("config") or {}
    changed = [key for key in RECORDED_KEYS if key in config and config[key] != getattr(recipe.config, key)]
    if (config.get("template_args") or {}) != (recipe.config.template_args or {}):
        changed.append("template_args")
    if (config.get("model") or {}).get("name") != recipe.config.model:
        changed.append("model")
    if manifest.get("study") != STUDY or changed:
        study = f"study {manifest.get('study')!r}, not {STUDY!r}"
        why = study if manifest.get("study") != STUDY else f"other settings: {', '.join(sorted(changed))}"
        raise RunExistsError(
            f"{folder} already holds another run ({why}); choose another folder, or set overwrite: true."
        )


__all__ = ["STUDY", "check_recipe", "check_training", "estimate_size"]
