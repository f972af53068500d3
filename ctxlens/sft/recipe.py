"""Training recipes: a YAML file and its overrides, split into ctxlens' own keys and TRL's."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, cast

from ctxlens.errors import InputError, Problems, first_line
from ctxlens.sft.arguments import HUB_TOKEN, default_arguments, without_renaming_notes
from ctxlens.sft.keys import TrainConfig, unknown_keys
from ctxlens.sft.shipped import RECIPES, is_shipped, read_shipped

DEFAULT_OUT = "runs/train"
NULL_WORDS = frozenset({"null", "none", "~", ""})
"""Words that mean None where a recipe or a command line gives them to a key that may be None."""

_MODEL = "model_name_or_path"
"""TRL's name for our key `model`; if both are given, TRL's is used."""

Overrides = Sequence[str] | Mapping[str, Any]
"""Command-line words (`["--learning_rate", "1e-4"]`), or a mapping, in which None means not given."""


@dataclass(frozen=True)
class Recipe:
    """A recipe with its overrides, before any argument class of TRL is built.

    Attributes:
        path: the YAML file, or the name of a recipe that comes with ctxlens.
        config: ctxlens' own keys.
        environment: environment variables of the `env` block.
        arguments: the file's keys that are not ours.
        words: the command-line words that are not ours; they override `arguments`.
    """

    path: Path
    config: TrainConfig
    environment: Mapping[str, str]
    arguments: Mapping[str, Any]
    words: tuple[str, ...]

    @property
    def named(self) -> dict[str, str | None]:
        """TRL's keys among the command-line words with their values; None for a flag."""
        return dict(_read_words(self.words))

    @property
    def given(self) -> dict[str, Any]:
        """TRL's keys with their values as they were written; command-line words come before the file."""
        return {**self.arguments, **self.named}

    def set_environment(self) -> None:
        """Set the variables of the `env` block.

        This must precede `build_arguments`, which looks for CUDA, because CUDA reads `CUDA_VISIBLE_DEVICES`
        only once.
        """
        os.environ.update(self.environment)

    def build_arguments(self) -> tuple[Any, Any]:
        """Build TRL's `SFTConfig` and `ModelConfig`.

        Raises:
            InputError: unknown keys, or values that TRL refuses.
        """
        from trl.trainer.model_config import ModelConfig
        from trl.trainer.sft_config import SFTConfig

        kinds = (SFTConfig, ModelConfig)
        try:
            parser = _make_parser(kinds)
            parser.set_defaults_with_config(
                **default_arguments(use_cpu=self._wants_cpu or None, model=self._model_for_format),
                output_dir=DEFAULT_OUT,
            )
            from_file = parser.set_defaults_with_config(**self.arguments)
            with without_renaming_notes():
                args, model_args, from_words = parser.parse_args_into_dataclasses(
                    list(self.words), return_remaining_strings=True, look_for_args_file=False
                )
        except (ValueError, TypeError, AttributeError, OSError) as error:
            raise InputError(f"{self.path}: {first_line(error)}.") from error
        known = {*TrainConfig.model_fields, *(f.name for kind in kinds for f in fields(kind))}
        for unknown, where in ((from_file[::2], str(self.path)), (from_words, "the command line")):
            names = [word.removeprefix("--") for word in unknown if word.startswith("--")] or list(unknown)
            if names:
                raise InputError(unknown_keys(names, known, where))
        return args, model_args

    @property
    def _model_for_format(self) -> str | None:
        """The model by which the number format is chosen; None if the recipe names the format."""
        names = {name for key in ("bf16", "fp16") for name in (f"--{key}", f"--no_{key}")}
        is_named = {"bf16", "fp16"} & set(self.arguments) or names & {
            word.partition("=")[0] for word in self.words
        }
        return None if is_named else self.config.model

    @property
    def _wants_cpu(self) -> bool:
        """Whether the CPU is asked for; the command line decides before the file."""
        if "--use_cpu" not in self.words:
            return bool(self.arguments.get("use_cpu"))
        after = self.words[self.words.index("--use_cpu") + 1 :][:1]
        return not after or after[0].startswith("--") or after[0].lower() in {"true", "1", "yes"}


def read_recipe(path: str | Path, overrides: Overrides = (), problems: Problems | None = None) -> Recipe:
    """Read a recipe: a YAML mapping with the keys of `TrainConfig` and of TRL, and an `env` block.

    Nothing is changed or loaded; TRL's keys are checked by `Recipe.build_arguments`.

    Args:
        path: the YAML file, or a name of `ctxlens.sft.shipped.RECIPES`.
        overrides: values that override the file's; see `Overrides`. `"null"` removes an optional key of ours.
        problems: takes note of wrong values of our keys, which are then left out; by default they are raised.

    Raises:
        InputError: there is no such file, it is not a YAML mapping, or one of our keys has a wrong value.
    """
    override, words = _read_overrides(overrides, path)
    named = dict(_read_words(words))
    given = read_shipped(str(path), {**override, **named}) if is_shipped(path) else _read_yaml(Path(path))
    environment = given.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise InputError(f"{path}: env must be a mapping of environment variables, got {environment!r}.")
    own, arguments = _split(given)
    values = {key: _without_null(key, value) for key, value in {**own, **override}.items()}
    return Recipe(
        Path(path),
        _make_config(values, path, problems),
        {str(key): str(value) for key, value in environment.items()},
        arguments,
        tuple(words),
    )


def _make_config(values: Mapping[str, Any], path: str | Path, problems: Problems | None) -> TrainConfig:
    """Our keys; with `problems`, those that cannot be used are noted there and left out."""
    try:
        return TrainConfig(**values)
    except InputError as error:
        told = InputError(f"{path}: {error}")
        if problems is None:
            raise told from error
        problems.add(told)
    return TrainConfig(**{key: value for key, value in values.items() if _is_usable(key, value)})


def _is_usable(key: str, value: Any) -> bool:
    try:
        TrainConfig(**{key: value})
    except InputError:
        return False
    return True


def _read_overrides(overrides: Overrides, path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Our keys among the overrides with their values, and the other overrides as words."""
    if isinstance(overrides, Mapping):
        override, rest = _split({key: value for key, value in overrides.items() if value is not None})
        return override, [word for key, value in rest.items() for word in (f"--{key}", str(value))]
    return _split_words(overrides, path)


def read_config(path: str | Path, overrides: Overrides = ()) -> tuple[TrainConfig, Any, Any]:
    """Read a recipe completely, without setting its environment variables; see `read_recipe`.

    Returns:
        The three parts of the recipe: ctxlens' keys, an `SFTConfig`, and a `ModelConfig` (type of the
        weights, LoRA, quantization).

    Raises:
        InputError: the file or one of its keys or values cannot be used; the message names both.
    """
    recipe = read_recipe(path, overrides)
    return recipe.config, *recipe.build_arguments()


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise InputError(
            f"the recipe {path} does not exist; give a YAML file, or one of {', '.join(RECIPES)}."
        )
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be used as a recipe: {first_line(error)}.") from error
    if not isinstance(given, dict):
        raise InputError(
            f"{path} cannot be used as a recipe: expected keys with values, such as `learning_rate: 2e-5`, "
            f"but the file contains {'nothing' if given is None else f'a {type(given).__name__}'}."
        )
    return {str(key): value for key, value in given.items()}


def _split(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keys into ours and the others."""
    own = {key: value for key, value in given.items() if key in TrainConfig.model_fields}
    if given.get(_MODEL):
        own["model"] = given[_MODEL]
    return own, {key: value for key, value in given.items() if key not in own and key != _MODEL}


class _Words(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}.")


def _split_words(words: Sequence[str], path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Split command-line words into our keys with their values, and the other words in their order."""
    parser = _Words(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for key, field in TrainConfig.model_fields.items():
        names = dict.fromkeys((f"--{key}", f"--{key.replace('_', '-')}"))
        alone: dict[str, Any] = {"nargs": "?", "const": True} if field.annotation is bool else {}
        parser.add_argument(*names, dest=key, **alone)
    parser.add_argument(f"--{_MODEL}", f"--{_MODEL.replace('_', '-')}", dest=_MODEL)
    try:
        namespace, rest = parser.parse_known_args(list(words))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return _split(vars(namespace))[0], rest


def _read_words(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The keys among command-line words and their values; None for a flag."""
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            after = None if following.startswith("--") else following
            yield name.replace("-", "_"), value if equals else after


def _without_null(key: str, value: Any) -> Any:
    """None for a word that means it; all keys that may be None have None as their default."""
    is_null = isinstance(value, str) and value.lower() in NULL_WORDS
    return None if is_null and TrainConfig.model_fields[key].default is None else value


def _make_parser(kinds: Sequence[type]) -> Any:
    """TRL's parser, which raises instead of leaving the process."""
    from trl.scripts.utils import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{message}.")

    return Parser(cast(Any, kinds))


def describe_command(path: str | Path, overrides: Overrides, *, evaluate: bool = False) -> str:
    """The command that runs a recipe, for the model card; an access token of the Hub is left out.

    Args:
        path: the recipe.
        overrides: its overrides.
        evaluate: describe the command that evaluates the finished run, and therefore must not start again.
    """
    if isinstance(overrides, Mapping):
        given = {key: value for key, value in overrides.items() if value is not None and key != HUB_TOKEN}
        if evaluate:
            given = {key: value for key, value in given.items() if key != "overwrite"} | {"evaluate": "true"}
        words = ["ctxlens", "train", "--config", str(path)]
        words += [f"{key}={_write(value)}" for key, value in given.items()]
    else:
        words = ["python", "-m", "ctxlens.sft", "--config", str(path), *_without_secret(overrides)]
        if evaluate:
            words += ["--overwrite", "false", "--evaluate", "true"]
    return shlex.join(words)


def _write(value: Any) -> str:
    """A value as it is written on the command line."""
    return json.dumps(value) if isinstance(value, Mapping) else str(value)


def _without_secret(words: Sequence[str]) -> list[str]:
    names = {f"--{HUB_TOKEN}", f"--{HUB_TOKEN.replace('_', '-')}"}
    before = ["", *words]
    return [
        word for last, word in zip(before, words, strict=False) if not {last, word.partition("=")[0]} & names
    ]


__all__ = ["Overrides", "Recipe", "describe_command", "read_config", "read_recipe"]
