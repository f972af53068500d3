"""Training recipes: ctxlens' own keys beside TRL's, from a YAML file and the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ctxlens.errors import InputError

if TYPE_CHECKING:
    from trl import SFTConfig


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
    replay: str | None = _key(None, "Raw texts to replay: JSONL with `text`, or text with blank lines between.")
    replay_share: float | None = _key(None, "Share of replayed rows, 0 to 1; all texts once if not given.")
    chat_template: str | None = _key(None, "File with a Jinja chat template in place of the tokenizer's own.")
    dtype: str = _key("float32", "Type of the weights: float32, bfloat16 or float16.")


def default_arguments() -> dict[str, Any]:
    """What ctxlens sets differently from TRL: no trackers, no intermediate checkpoints, and what a CPU needs."""
    import torch

    arguments: dict[str, Any] = {"report_to": "none", "save_strategy": "no"}
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        arguments |= {
            "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False,
        }  # fmt: skip
    return arguments


def make_sft_config(out: str | Path, arguments: Mapping[str, Any] | None = None) -> SFTConfig:
    """TRL's `SFTConfig` with ctxlens' defaults below the given arguments.

    Raises:
        InputError: an argument that `SFTConfig` does not have, or a value that it refuses.
    """
    from trl import SFTConfig

    given = dict(arguments or {})
    if given.get("use_cpu"):
        given = {"bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False, **given}
    known = {f.name for f in fields(SFTConfig)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise InputError(_unknown_keys(unknown, known, "the training arguments"))
    try:
        return SFTConfig(**{**default_arguments(), **given, "output_dir": str(out)})
    except (ValueError, TypeError) as error:
        raise InputError(f"the training arguments do not fit together: {_first_line(error)}.") from error


def read_config(
    path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> tuple[TrainConfig, SFTConfig]:
    """Read a recipe: a YAML mapping with keys of `TrainConfig` and `SFTConfig`, and an `env:` block.

    Args:
        path: the YAML file.
        overrides: what goes before the file: command-line words (`["--learning_rate", "1e-4"]`) or a mapping,
            in which None means not given.

    Raises:
        InputError: no such file, no YAML mapping, unknown keys (named, with the file), or values of the
            wrong kind.
    """
    from trl import SFTConfig, TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{path}: {message}.")

    words = list(overrides) if not isinstance(overrides, Mapping) else _as_words(overrides)
    if not Path(path).is_file():
        raise InputError(f"the recipe {path} does not exist; give a YAML file.")
    parser = Parser((TrainConfig, SFTConfig))
    parser.set_defaults_with_config(**default_arguments())
    import yaml

    try:
        *parsed, from_file, from_words = parser.parse_args_and_config(
            ["--config", str(path), *words], return_remaining_strings=True, separate_remaining_strings=True
        )
    except InputError:
        raise
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise InputError(f"{path} is no usable recipe: {_first_line(error)}.") from error
    config, args = parsed[0], parsed[1]
    known = {f.name for kind in (TrainConfig, SFTConfig) for f in fields(kind)}
    for unknown, where in ((from_file[::2], str(path)), (from_words, "the command line")):
        names = [word.removeprefix("--") for word in unknown if word.startswith("--")] or list(unknown)
        if names:
            raise InputError(_unknown_keys(names, known, where))
    return config, args


def _as_words(overrides: Mapping[str, Any]) -> list[str]:
    given = {key: value for key, value in overrides.items() if value is not None}
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def _unknown_keys(names: Iterable[str], known: Iterable[str], where: str) -> str:
    names, known = list(names), list(known)
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
    import json

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
