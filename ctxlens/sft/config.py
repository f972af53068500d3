"""Training recipes: ctxlens' own keys beside TRL's, from a YAML file and the command line."""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, cast, get_args, get_type_hints

from ctxlens.chat.roles.truncation import SIDES
from ctxlens.errors import InputError
from ctxlens.sft.before_after import EvaluationKeys
from ctxlens.sft.rows import LOSS_ON

NULL_WORDS = frozenset({"null", "none", "~", ""})
"""What stands for None where a command line overrides a key that may be None."""


def _key(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


CHOICES: Mapping[str, tuple[str, ...]] = {
    "indicator_as": ("token", "text"),
    "indicator_in_data": ("error", "keep"),
    "selection_control": ("none", "random"),
    "loss_on": LOSS_ON,
    "truncation": SIDES,
    "unusable": ("error", "skip"),
}
"""The values of the keys that have few."""

DATA_KEYS = frozenset({"model", "dataset", "split", "layout", "limit", "selection", "replay"})
"""The keys that name what is trained on; the others of `TrainConfig` say how, or what is measured then."""

EVALUATION_KEYS = frozenset(f.name for f in fields(EvaluationKeys))
"""The keys that say what is measured after the training."""

DEFAULT_OUT = "runs/train"


@dataclass
class TrainConfig(EvaluationKeys):
    """The keys of a recipe that are ctxlens' own; TRL's `SFTConfig` and `ModelConfig` stand beside them.

    Raises:
        InputError: a value that is none of the key's.
    """

    model: str = _key("organism", "Folder or Hub id of the model to start from, or a packaged model.")
    dataset: str = _key("", "Conversations: a file, a folder or a Hub id, as `ctxlens score` takes.")
    split: str = _key("train", "Split of a Hub data set.")
    layout: str | None = _key(None, "Layout of the data set; detected if not given.")
    limit: int | None = _key(None, "Use the first so many conversations only.")
    selection: str | None = _key(None, "selection.parquet (or its run folder): turns that get the indicator.")
    require_selected: bool = _key(False, "Refuse data in which no turn has the indicator, do not only warn.")
    indicator: str | None = _key(None, "The indicator, such as [IND]; none: train without.")
    indicator_as: str = _key("token", "token: one token, added if it is missing; text: tokenized as it is.")
    indicator_init: str = _key("mean", "Start of its embedding: the mean of all, or of a phrase's tokens.")
    indicator_in_data: str = _key("error", "If somebody wrote the indicator in the data: error, or keep.")
    indicator_dropout: float = _key(0.0, "Share of the selected messages shown without it, 0 to below 1.")
    negative_indicator: str | None = _key(None, "A second token, for the answered messages not selected.")
    selection_control: str = _key("none", "random: as many turns drawn at random in place of the selected.")
    upsample_selected: int = _key(1, "How often conversations with a selected turn are there; 1: once.")
    loss_on: str = _key("assistant", "Tokens that the loss is on: assistant, or all (as the paper's code).")
    truncation: str = _key("left", "Context cut where a conversation is too long: left, right, middle.")
    unusable: str = _key("error", "Conversations that cannot be trained on: error, or skip (and count).")
    replay: str | None = _key(None, "Raw texts to replay: JSONL with `text`, or plain, blank lines between.")
    replay_share: float | None = _key(None, "Share of replayed rows, 0 to 1; all texts once if not given.")
    chat_template: str | None = _key(None, "File with a Jinja chat template in place of the tokenizer's own.")
    overwrite: bool = _key(False, "Start anew; a run in the folder is kept beside it as DIR.old.")

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                one_of = " or ".join(f'"{choice}"' for choice in choices)
                raise InputError(f"{name} must be {one_of}, got {value!r}.")
        if not 0 <= self.indicator_dropout < 1:
            raise InputError(f"indicator_dropout must be 0 to below 1, got {self.indicator_dropout}.")
        if self.upsample_selected < 1:
            raise InputError(f"upsample_selected must be at least 1, got {self.upsample_selected}.")
        if self.negative_indicator is not None and self.negative_indicator == self.indicator:
            raise InputError(f"negative_indicator must differ from the indicator, got {self.indicator!r}.")
        for name in ("indicator_dropout", "negative_indicator"):
            if getattr(self, name) and self.indicator is None:
                raise InputError(f'{name} needs an indicator beside it; give indicator="[IND]".')


def default_arguments(*, use_cpu: bool | None = None) -> dict[str, Any]:
    """What ctxlens sets differently from TRL: no trackers, no intermediate checkpoints, what a CPU needs.

    Args:
        use_cpu: train on the CPU; by default where there is no accelerator.
    """
    import torch

    arguments: dict[str, Any] = {"report_to": "none", "save_strategy": "no"}
    if use_cpu is None:
        use_cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    if use_cpu:
        arguments |= {
            "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False,
        }  # fmt: skip
    return arguments


@contextmanager
def without_renaming_notes() -> Iterator[None]:
    """Keep quiet that transformers renames `gradient_checkpointing`, which TRL itself always sets."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        yield


def make_sft_config(out: str | Path, arguments: Mapping[str, Any] | None = None) -> Any:
    """TRL's `SFTConfig` with ctxlens' defaults (`default_arguments`) below the given arguments.

    Raises:
        InputError: an argument that `SFTConfig` does not have, or a value that it refuses.
    """
    from trl.trainer.sft_config import SFTConfig

    given = dict(arguments or {})
    _check_known(given, {f.name for f in fields(SFTConfig)}, "the training arguments")
    defaults = default_arguments(use_cpu=given.get("use_cpu") or None)
    try:
        with without_renaming_notes():
            return SFTConfig(**{**defaults, **given, "output_dir": str(out)})
    except (ValueError, TypeError) as error:
        raise InputError(f"the training arguments do not fit together: {first_line(error)}.") from error


def make_train_config(options: Mapping[str, Any] | None = None) -> TrainConfig:
    """ctxlens' own keys that say how to train, with their defaults.

    Raises:
        InputError: an unknown key, or a value that is none of the key's.
    """
    given = dict(options or {})
    _check_known(given, {f.name for f in fields(TrainConfig)} - DATA_KEYS - EVALUATION_KEYS, "train")
    return TrainConfig(**given)


def make_model_config(arguments: Mapping[str, Any] | None = None) -> Any:
    """TRL's `ModelConfig`: `dtype`, `use_peft`, `lora_r`, `load_in_4bit` and so on.

    Raises:
        InputError: an argument that `ModelConfig` does not have, or a value that it refuses.
    """
    from trl.trainer.model_config import ModelConfig

    given = dict(arguments or {})
    _check_known(given, {f.name for f in fields(ModelConfig)}, "the model arguments")
    try:
        return ModelConfig(**given)
    except (ValueError, TypeError) as error:
        raise InputError(f"the model arguments do not fit together: {first_line(error)}.") from error


REPLACED = {
    "assistant_only_loss": "loss_on",
    "completion_only_loss": "loss_on",
    "truncation_mode": "truncation",
    "chat_template_path": "chat_template",
}
"""Arguments of `SFTConfig` that act on text, which TRL does not get, and the keys that do their work."""


def check_arguments(args: Any) -> None:
    """Refuse training arguments that could only fail later, or would silently do nothing.

    Raises:
        InputError: a rate, size or number of steps out of its range, or an argument that a key of ctxlens'
            own replaces.
    """
    plain = {f.name: f.default for f in fields(type(args))}
    for name, key in REPLACED.items():
        if getattr(args, name) != plain[name]:
            raise InputError(f"{name} does nothing here, because ctxlens tokenizes by itself; use {key}.")
    lowest = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "weight_decay": 0,
        "max_grad_norm": 0, "warmup_steps": 0,
    }  # fmt: skip
    for name, least in lowest.items():
        if not getattr(args, name) >= least:
            raise InputError(f"{name} must be at least {least}, got {getattr(args, name)}.")
    if not 0 < args.learning_rate < float("inf"):
        raise InputError(f"learning_rate must be above 0, got {args.learning_rate}.")
    if args.max_steps <= 0 and not args.num_train_epochs > 0:
        raise InputError(
            f"num_train_epochs must be above 0 where max_steps is not given, got {args.num_train_epochs}."
        )
    if args.max_length is not None and args.max_length < 2:
        raise InputError(f"max_length must be at least 2 tokens, got {args.max_length}.")


def read_config(
    path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> tuple[TrainConfig, Any, Any]:
    """Read a recipe: a YAML mapping with the keys of `TrainConfig` and of TRL, and an `env:` block.

    Args:
        path: the YAML file.
        overrides: what goes before the file: command-line words (`["--learning_rate", "1e-4"]`), or a
            mapping, in which None means not given and `"null"` takes a key of ctxlens' own away.

    Returns:
        The three parts of the recipe: ctxlens' keys, an `SFTConfig`, and a `ModelConfig` (type of the
        weights, LoRA, quantization).

    Raises:
        InputError: no such file, no YAML mapping, unknown keys (named, with the file), or values of the
            wrong kind.
    """
    import yaml
    from trl.scripts.utils import TrlParser
    from trl.trainer.model_config import ModelConfig
    from trl.trainer.sft_config import SFTConfig

    class Parser(TrlParser):
        def set_defaults_with_config(self, **values: Any) -> list[str]:
            return super().set_defaults_with_config(**{key: _as_word(key, values[key]) for key in values})

        def error(self, message: str) -> NoReturn:
            raise InputError(f"{path}: {message}.")

    if not Path(path).is_file():
        raise InputError(f"the recipe {path} does not exist; give a YAML file.")
    words = _as_words(overrides) if isinstance(overrides, Mapping) else list(overrides)
    kinds = (TrainConfig, SFTConfig, ModelConfig)
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(given, dict):
            raise InputError(
                f"{path} is no usable recipe: expected keys with values, such as `learning_rate: 2e-5`, but "
                f"the file holds {'nothing' if given is None else f'a {type(given).__name__}'}."
            )
        # The parser sets these too, but only after CUDA has been looked for.
        if isinstance(env := given.get("env"), dict):
            os.environ.update({str(key): str(value) for key, value in env.items()})
        wants_cpu = _word_after(words, "--use_cpu") if "--use_cpu" in words else given.get("use_cpu")
        parser = Parser(cast(Any, kinds))
        parser.set_defaults_with_config(
            **default_arguments(use_cpu=bool(wants_cpu) or None), output_dir=DEFAULT_OUT
        )
        with without_renaming_notes():
            config, args, model_args, from_file, from_words = parser.parse_args_and_config(
                ["--config", str(path), *words],
                return_remaining_strings=True,
                separate_remaining_strings=True,
            )
    except InputError as error:
        named = str(error).startswith(str(path))
        raise error if named else InputError(f"{path}: {error}") from error
    except (ValueError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
        raise InputError(f"{path} is no usable recipe: {first_line(error)}.") from error
    known = {f.name for kind in kinds for f in fields(kind)}
    for unknown, where in ((from_file[::2], str(path)), (from_words, "the command line")):
        names = [word.removeprefix("--") for word in unknown if word.startswith("--")] or list(unknown)
        if names:
            raise InputError(_unknown_keys(names, known, where))
    if model_args.model_name_or_path:  # TRL's name for the same key
        config.model = model_args.model_name_or_path
    return _without_nulls(config), args, model_args


def _word_after(words: Sequence[str], name: str) -> bool:
    """Whether a switch is given, alone or as true."""
    if name not in words:
        return False
    after = words[words.index(name) + 1 :][:1]
    return not after or after[0].startswith("--") or after[0].lower() in {"true", "1", "yes"}


def _without_nulls(config: TrainConfig) -> TrainConfig:
    hints = get_type_hints(TrainConfig)
    for name, value in vars(config).items():
        if isinstance(value, str) and value.lower() in NULL_WORDS and NoneType in get_args(hints[name]):
            setattr(config, name, None)
    return config


def _as_word(key: str, value: Any) -> Any:
    """A value of YAML as a command line has it, which the parser converts and checks: `[0, 50]` as `0,50`.

    The parser takes what is no text as it is. Keys of others are left alone.
    """
    hint = get_type_hints(TrainConfig).get(key)
    if hint is None or isinstance(value, str) or (value is None and NoneType in get_args(hint)):
        return value
    parts = value if isinstance(value, list) else [value]
    if isinstance(value, bool) != (hint is bool) or not all(
        isinstance(part, str | int | float) for part in parts
    ):
        kinds = [kind.__name__ for kind in get_args(hint) or (hint,) if kind is not NoneType]
        raise InputError(f"{key} must be {_KINDS[kinds[0]]}, got {value!r}.")
    return value if hint is bool else ",".join(map(str, parts))


_KINDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}


def _as_words(overrides: Mapping[str, Any]) -> list[str]:
    given = {key: value for key, value in overrides.items() if value is not None}
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def _check_known(given: Collection[str], known: Collection[str], where: str) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(_unknown_keys(unknown, known, where))


def _unknown_keys(names: Sequence[str], known: Collection[str], where: str) -> str:
    close = [match for name in names for match in difflib.get_close_matches(name, known, n=1)]
    hint = f"; did you mean {', '.join(close)}?" if close else "; see `ctxlens train --help`."
    return f"{where} has unknown keys: {', '.join(names)}{hint}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def read_replay(path: str | Path) -> list[str]:
    """Raw texts from a file: JSON Lines with `text` (or bare strings), or text with blank lines between.

    Raises:
        InputError: the file cannot be read, or a line is no text.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the replay texts {path} cannot be read ({first_line(error)}).") from error
    if Path(path).suffix not in {".jsonl", ".json"}:
        return [text for part in content.split("\n\n") if (text := part.strip("\n"))]
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: no JSON ({error}).") from error
        text = record.get("text") if isinstance(record, dict) else record
        if not isinstance(text, str):
            raise InputError(f'{path}, line {number}: expected a string or an object with the key "text".')
        texts.append(text)
    return texts
