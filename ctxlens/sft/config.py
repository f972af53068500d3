"""Training recipes: ctxlens' own keys beside TRL's, from a YAML file and the command line."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, cast, get_args, get_type_hints

from ctxlens.errors import InputError

NULL_WORDS = frozenset({"null", "none", "~", ""})
"""What stands for None where a command line overrides a key that may be None."""


def _key(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass
class TrainConfig:
    """The keys of a recipe that are ctxlens' own; all of TRL's `SFTConfig` may stand beside them."""

    model: str = _key("organism", "Folder or Hub id of the model to start from, or a packaged model.")
    dataset: str = _key("", "Conversations: a file, a folder or a Hub id, as `ctxlens score` takes.")
    split: str = _key("train", "Split of a Hub data set.")
    layout: str | None = _key(None, "Layout of the data set; detected if not given.")
    limit: int | None = _key(None, "Use the first so many conversations only.")
    selection: str | None = _key(None, "selection.parquet (or its run folder): turns that get the indicator.")
    indicator: str | None = _key(None, "The indicator, such as [IND]; none: train without.")
    indicator_init: str = _key("mean", "Start of its embedding: the mean of all, or of a phrase's tokens.")
    loss_on: str = _key("assistant", "Tokens that the loss is on: assistant, or all (as the paper's code).")
    replay: str | None = _key(None, "Raw texts to replay: JSONL with `text`, or plain, blank lines between.")
    replay_share: float | None = _key(None, "Share of replayed rows, 0 to 1; all texts once if not given.")
    chat_template: str | None = _key(None, "File with a Jinja chat template in place of the tokenizer's own.")
    dtype: str = _key("float32", "Type of the weights: float32, bfloat16 or float16.")


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
    known = {f.name for f in fields(SFTConfig)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise InputError(_unknown_keys(unknown, known, "the training arguments"))
    defaults = default_arguments(use_cpu=given.get("use_cpu") or None)
    try:
        with without_renaming_notes():
            return SFTConfig(**{**defaults, **given, "output_dir": str(out)})
    except (ValueError, TypeError) as error:
        raise InputError(f"the training arguments do not fit together: {_first_line(error)}.") from error


def read_config(
    path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> tuple[TrainConfig, Any]:
    """Read a recipe: a YAML mapping with keys of `TrainConfig` and TRL's `SFTConfig`, and an `env:` block.

    Args:
        path: the YAML file.
        overrides: what goes before the file: command-line words (`["--learning_rate", "1e-4"]`), or a
            mapping, in which None means not given and `"null"` takes a key of ctxlens' own away.

    Returns:
        The two parts of the recipe: ctxlens' keys, and an `SFTConfig`.

    Raises:
        InputError: no such file, no YAML mapping, unknown keys (named, with the file), or values of the
            wrong kind.
    """
    import yaml
    from trl.scripts.utils import TrlParser
    from trl.trainer.sft_config import SFTConfig

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{path}: {message}.")

    if not Path(path).is_file():
        raise InputError(f"the recipe {path} does not exist; give a YAML file.")
    words = _as_words(overrides) if isinstance(overrides, Mapping) else list(overrides)
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        wants_cpu = given.get("use_cpu") or _word_after(words, "--use_cpu")
        parser = Parser(cast(Any, (TrainConfig, SFTConfig)))
        parser.set_defaults_with_config(**default_arguments(use_cpu=bool(wants_cpu) or None))
        with without_renaming_notes():
            *parsed, from_file, from_words = parser.parse_args_and_config(
                ["--config", str(path), *words],
                return_remaining_strings=True,
                separate_remaining_strings=True,
            )
    except InputError:
        raise
    except (ValueError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
        raise InputError(f"{path} is no usable recipe: {_first_line(error)}.") from error
    known = {f.name for kind in (TrainConfig, SFTConfig) for f in fields(kind)}
    for unknown, where in ((from_file[::2], str(path)), (from_words, "the command line")):
        names = [word.removeprefix("--") for word in unknown if word.startswith("--")] or list(unknown)
        if names:
            raise InputError(_unknown_keys(names, known, where))
    return _without_nulls(parsed[0]), parsed[1]


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


def _as_words(overrides: Mapping[str, Any]) -> list[str]:
    given = {key: value for key, value in overrides.items() if value is not None}
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def _unknown_keys(names: Sequence[str], known: Collection[str], where: str) -> str:
    close = [match for name in names for match in difflib.get_close_matches(name, known, n=1)]
    hint = f"; did you mean {', '.join(close)}?" if close else "; see `ctxlens train --help`."
    return f"{where} has unknown keys: {', '.join(names)}{hint}"


def _first_line(error: BaseException) -> str:
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
        raise InputError(f"the replay texts {path} cannot be read ({_first_line(error)}).") from error
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
