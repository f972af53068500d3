"""Refuses a recipe for what can be seen without TRL, torch and transformers, which take seconds to import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ctxlens.chat.data import open_conversations
from ctxlens.chat.roles import check_arguments
from ctxlens.errors import InputError, RunExistsError
from ctxlens.models.checkpoint import find_chat_template, locate_checkpoint, read_chat_template
from ctxlens.runs import MANIFEST, Run
from ctxlens.sft.keys import RECORDED_KEYS, TrainConfig, unknown_keys
from ctxlens.sft.keys.trl import read_trl_keys
from ctxlens.sft.recipe import DEFAULT_OUT, Recipe
from ctxlens.sft.watching import check_readings

STUDY = "train"

_NUMBERS = {"int": int, "float": float}


def check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe early; the training itself checks the rest.

    Raises:
        InputError: an unknown key, or text for a number; no data set; a model, data set, selection or
            template that is not there; values for variables that the template does not use; or readings of
            context use without a chat template, or in too short a window.
        RunExistsError: the folder of the results holds another run.
    """
    _check_keys(recipe)
    config = recipe.config
    if not config.dataset:
        raise InputError(f"{recipe.path} names no dataset; add `dataset: FILE_OR_HUB_ID`.")
    source = locate_checkpoint(config.model)
    template = read_chat_template(config.chat_template) or find_chat_template(source)
    if template and config.template_args:
        check_arguments(template, config.template_args)
    check_readings(config, source, template)
    _check_files(config)
    _check_folder(recipe)


def _check_keys(recipe: Recipe) -> None:
    known = read_trl_keys()
    if not known:
        return
    every = {*TrainConfig.model_fields, *known}
    given = dict(_read_words(recipe.words))
    for names, where in ((recipe.arguments, str(recipe.path)), (given, "the command line")):
        unknown = [name for name in names if name not in every and name.removeprefix("no_") not in every]
        if unknown:
            raise InputError(unknown_keys(unknown, every, where))
    for name, value in {**recipe.arguments, **given}.items():
        kind = known.get(name, "").removesuffix(" | None")
        if isinstance(value, str) and kind in _NUMBERS and value.lower() not in ("none", "null"):
            try:
                _NUMBERS[kind](value)
            except ValueError:
                raise InputError(
                    f"{recipe.path}: argument --{name}: invalid {kind} value: {value!r}."
                ) from None


def _read_words(words: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    """The keys on the command line and their values; None for a flag."""
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            after = None if following.startswith("--") else following
            yield name.replace("-", "_"), value if equals else after


def _check_files(config: TrainConfig) -> None:
    for key in ("selection", "replay"):
        path = getattr(config, key)
        if path and not Path(path).exists():
            raise InputError(f"{key}: there is no file or folder {path}.")
    if Path(config.dataset).expanduser().is_file() or Path(config.dataset).suffix:
        open_conversations(config.dataset, split=config.split, layout=config.layout, limit=config.limit)


def _check_folder(recipe: Recipe) -> None:
    given = {**recipe.arguments, **dict(_read_words(recipe.words))}
    folder = Path(str(given.get("output_dir") or DEFAULT_OUT))
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


__all__ = ["STUDY", "check_recipe"]
