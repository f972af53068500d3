"""Find a checkpoint's files, and read what needs no weights: tokenizer, chat template, fingerprint.

This module imports neither torch nor, before a tokenizer is loaded, transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from ctxlens.errors import InputError, first_line, require_package

PACKAGED = {"organism": "base", "organism-chat": "chat"}
"""The names of the models that come with ctxlens, and their folders in `organism/`."""

GGUF = ".gguf"

TEMPLATES = ("chatml",)
"""The names of the chat templates that come with ctxlens, for base models without one."""

_PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Tokenizer classes that hold nothing but the file tokenizer.json."""

_HASHED_BYTES = 2**20
"""Of large weight files, this many bytes at each end are hashed."""


def locate_checkpoint(name_or_path: str | Path) -> Path | str:
    """The folder of a checkpoint, a GGUF file, or a Hub id.

    Raises:
        InputError: the name is none of them, the folder lacks config or safetensors weights, or the file is
            not a GGUF file.
    """
    name = str(name_or_path)
    if name in PACKAGED:
        folder = Path(__file__).parents[1] / "organism" / PACKAGED[name]
        if not (folder / "config.json").is_file():
            raise InputError(f"the packaged model {name!r} is not in this installation; reinstall ctxlens.")
        return folder
    folder = Path(name).expanduser()
    if folder.suffix == GGUF and not folder.is_dir():
        _check_gguf(folder)
        return folder
    if not folder.is_dir():
        if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name) and not folder.parent.is_dir():
            return name
        raise InputError(
            f"model {name!r} is neither a folder here nor a Hub id of the form owner/name; "
            f"packaged models are {' and '.join(PACKAGED)}."
        )
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} holds an adapter only; load the folder above it if ctxlens trained it, otherwise "
            "merge it into its base model with PEFT (merge_and_unload) and save the result."
        )
    if not (folder / "config.json").is_file():
        inside = next(iter(sorted(folder.glob("*/config.json"))), None)
        near = f"; did you mean {inside.parent}?" if inside is not None else "."
        raise InputError(f"{folder} contains no config.json, so it is not a transformers checkpoint{near}")
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} contains no safetensors weights; load it in transformers and convert it with "
            "save_pretrained()."
        )
    return folder


def _check_gguf(path: Path) -> None:
    if not path.exists():
        raise InputError(f"there is no file {path}; give the path of a GGUF file.")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"the GGUF file {str(path)!r} cannot be read ({first_line(error)}).") from None
    if magic != b"GGUF":
        raise InputError(f"{path} does not begin as a GGUF file does; download or convert it again.")
    require_package(path.name, "gguf")


def is_gguf(source: Path | str) -> bool:
    """Whether a located checkpoint is a GGUF file."""
    return isinstance(source, Path) and source.suffix == GGUF


def _say_why(source: Path | str, error: BaseException) -> str:
    """Why something cannot be loaded; for a Hub id without the Hub, that this was asked for."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if offline and not isinstance(source, Path) and "couldn't connect" in first_line(error):
        return "it is not in the cache, and HF_HUB_OFFLINE forbids a download: unset it, or give a folder"
    return first_line(error)


def pretrained_arguments(source: Path | str, revision: str | None = None) -> dict[str, Any]:
    """The arguments with which `from_pretrained` finds a located checkpoint.

    Raises:
        InputError: a revision of something that is not on the Hub.
    """
    if not isinstance(source, Path):
        where = {} if revision is None else {"revision": revision}
        return {"pretrained_model_name_or_path": source, **where}
    if revision is not None:
        raise InputError(
            f"revision {revision!r} was given, but {source} is local; only models on the Hub have revisions."
        )
    if is_gguf(source):
        return {
            "pretrained_model_name_or_path": source.parent,
            "gguf_file": source.name,
            "local_files_only": True,
        }
    return {"pretrained_model_name_or_path": source, "local_files_only": True}


def read_window(source: Path | str) -> int | None:
    """How many tokens a local checkpoint's model can read, by its configuration; None if it does not say."""
    try:
        config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
        window = {**config, **config.get("text_config", {})}.get("max_position_embeddings")
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return window if isinstance(window, int) else None


def load_tokenizer(
    source: Path | str, *, trust_remote_code: bool = False, revision: str | None = None, **options: Any
) -> Any:
    """The tokenizer of a checkpoint; `InputError` if there is none. `options` go to `from_pretrained`."""
    where = pretrained_arguments(source, revision)
    try:
        if has_plain_tokenizer(source):
            from transformers import PreTrainedTokenizerFast  # AutoTokenizer would import torch

            return PreTrainedTokenizerFast.from_pretrained(**where, **options)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(**where, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = _say_why(source, error)
        raise InputError(f"no tokenizer can be loaded from {source} ({reason}).") from error
    except Exception as error:  # transformers' GGUF reader raises all kinds of errors for damaged files
        if not is_gguf(source):
            raise
        raise InputError(f"no tokenizer can be loaded from {source} ({first_line(error)}).") from error


def has_plain_tokenizer(source: Path | str) -> bool:
    """Whether AutoTokenizer would take tokenizer.json as it is.

    It replaces the class that a checkpoint names for some model types, so only one is answered for here:
    the Llama type, which the packaged models and many others have.
    """
    if not isinstance(source, Path) or not (source / "tokenizer.json").is_file():
        return False
    try:
        names = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        return (
            names.get("tokenizer_class") in _PLAIN_TOKENIZERS
            and "auto_map" not in names
            and config.get("model_type") == "llama"
            and "model_name" not in config
        )
    except (OSError, ValueError, AttributeError):
        return False


def read_chat_template(chat_template: str | Path | None) -> str | None:
    """A chat template given as a file's path, as Jinja text, or as a name of `TEMPLATES`.

    `chatml` is ChatML whose turns end with the tokenizer's own end token, because a base model knows no
    `<|im_end|>` and would never learn where an answer ends.

    Raises:
        InputError: the file cannot be read.
    """
    if chat_template is None:
        return None
    text = str(chat_template)
    if isinstance(chat_template, str) and ("{{" in text or "{%" in text):
        return text
    if text in TEMPLATES and not Path(text).exists():
        return (Path(__file__).parent / "templates" / f"{text}.jinja").read_text(encoding="utf-8")
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError as error:
        names = ", ".join(sorted(TEMPLATES))
        raise InputError(
            f"there is no chat template {text!r}; give a Jinja file, or a template that comes with ctxlens "
            f"({names})."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the chat template {text!r} cannot be read ({first_line(error)}).") from error


def find_chat_template(source: Path | str) -> str | dict[str, str] | None:
    """The chat template in a checkpoint's folder, read without loading the tokenizer.

    None if there is none, or if only the tokenizer can say (a model on the Hub, a GGUF file).
    """
    if not isinstance(source, Path) or not source.is_dir():
        return None
    try:
        if (source / "chat_template.jinja").is_file() and not (source / "additional_chat_templates").is_dir():
            return (source / "chat_template.jinja").read_text(encoding="utf-8")
        found = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
        return found if isinstance(found, str) else {str(one["name"]): one["template"] for one in found}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def lacks_chat_template(source: Path | str) -> bool:
    """Whether a checkpoint's folder surely holds no chat template; false if only the tokenizer can say."""
    if not isinstance(source, Path) or find_chat_template(source) is not None:
        return False
    if any((source / name).exists() for name in ("chat_template.json", "additional_chat_templates")):
        return False
    try:
        named = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(named, dict) and not named.get("chat_template")


def hash_checkpoint(source: Path | str) -> str | None:
    """A short fingerprint of a local checkpoint: sha256 over config and weights. None for a Hub id.

    For weight files larger than 2 MiB, it covers the size and the first and last MiB.
    """
    place = Path(source)
    if is_gguf(place) and place.is_file():
        files = [place]
    elif place.is_dir():
        files = [place / "config.json", *sorted(place.glob("*.safetensors"))]
    else:
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HASHED_BYTES))
            if size > 2 * _HASHED_BYTES:
                file.seek(-_HASHED_BYTES, 2)
            digest.update(file.read())
    return digest.hexdigest()[:16]


__all__ = [
    "GGUF", "PACKAGED", "TEMPLATES", "find_chat_template", "has_plain_tokenizer", "hash_checkpoint",
    "is_gguf", "lacks_chat_template", "load_tokenizer", "locate_checkpoint", "pretrained_arguments",
    "read_chat_template",
]  # fmt: skip
