"""Load checkpoints from folders or the Hub, with one clear sentence if something is missing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ctxlens.chat.roles import DEFAULT_INDICATOR
from ctxlens.errors import InputError, first_line

PACKAGED = {"organism": "base", "organism-chat": "chat"}
"""The names of the models that come with ctxlens, and their folders in `organism/`."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

INDICATOR_RECORD = "ctxlens_indicator"
"""The key of a checkpoint's config.json that records its indicator (`text`, and `as` what)."""

_HASHED_BYTES = 2**20
"""Of large weight files, this many bytes at each end are hashed."""


def locate_checkpoint(name_or_path: str | Path) -> Path | str:
    """The folder of a checkpoint, or a Hub id.

    Raises:
        InputError: the name is neither of them, or the folder lacks config or safetensors weights.
    """
    name = str(name_or_path)
    if name in PACKAGED:
        folder = Path(__file__).parents[1] / "organism" / PACKAGED[name]
        if not (folder / "config.json").is_file():
            raise InputError(f"the packaged model {name!r} is not in this installation; reinstall ctxlens.")
        return folder
    folder = Path(name).expanduser()
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
        raise InputError(f"{folder} contains no config.json, so it is not a transformers checkpoint.")
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} contains no safetensors weights; load it in transformers and convert it with "
            "save_pretrained()."
        )
    return folder


def load_tokenizer(source: Path | str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The tokenizer of a checkpoint; `InputError` if there is none. `options` go to `from_pretrained`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source, **_where(source), trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"no tokenizer can be loaded from {source} ({first_line(error)}).") from error


def load_causal_lm(
    source: Path | str,
    *,
    device: torch.device | None,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    attention: str | None = None,
    **options: Any,
) -> Any:
    """The language model of a checkpoint, from safetensors only; `InputError` if it cannot be loaded.

    `attention` is transformers' `attn_implementation`; None leaves the choice to transformers. Without
    `device` the model stays where it was loaded. `options` go to `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source,
            **_where(source),
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **options,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"no language model can be loaded from {source} ({first_line(error)}).") from error
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    return (model if device is None else model.to(device)).eval()


def resolve_device(device: str) -> torch.device:
    """Read a device: `auto` (CUDA if available) or a torch device; `InputError` if it does not exist."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}; choose auto, cpu or cuda.") from None
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was requested, but torch sees no CUDA device; use cpu or auto.")
    return resolved


def resolve_dtype(dtype: str) -> torch.dtype:
    """A torch dtype by name; `InputError` for others than float32, bfloat16 and float16."""
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def read_chat_template(chat_template: str | Path | None) -> str | None:
    """A chat template given as a file's path or as Jinja text.

    Raises:
        InputError: the file cannot be read.
    """
    if chat_template is None:
        return None
    text = str(chat_template)
    if isinstance(chat_template, str) and ("{{" in text or "{%" in text):
        return text
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the chat template {text!r} cannot be read ({first_line(error)}).") from error


def hash_checkpoint(source: Path | str) -> str | None:
    """A short fingerprint of a local checkpoint: sha256 over config and weights. None for a Hub id.

    For weight files larger than 2 MiB, it covers the size and the first and last MiB.
    """
    folder = Path(source)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HASHED_BYTES))
            if size > 2 * _HASHED_BYTES:
                file.seek(-_HASHED_BYTES, 2)
            digest.update(file.read())
    return digest.hexdigest()[:16]


def find_stop_ids(hf_model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a generated text: the checkpoint's generation settings and the tokenizer's EOS."""
    found: set[int] = set()
    for holder in (
        getattr(hf_model, "generation_config", None),
        getattr(hf_model, "config", None),
        tokenizer,
    ):
        ids = getattr(holder, "eos_token_id", None)
        found.update(ids if isinstance(ids, Sequence) else () if ids is None else (ids,))
    return frozenset(int(i) for i in found)


def find_indicator(hf_model: Any, tokenizer: Any, wanted: str | None = None) -> str | None:
    """The indicator of a checkpoint: `wanted`, else the one it was trained with, else `[IND]` if a token.

    Raises:
        InputError: `wanted` is neither a token of the tokenizer nor the indicator of the model's training.
    """
    recorded = (getattr(hf_model.config, INDICATOR_RECORD, None) or {}).get("text")
    if wanted is None:
        return recorded or (DEFAULT_INDICATOR if DEFAULT_INDICATOR in tokenizer.get_added_vocab() else None)
    if wanted != recorded and wanted not in tokenizer.get_vocab():
        known = f"; this checkpoint was trained with {recorded!r}" if recorded else ""
        raise InputError(
            f"the tokenizer has no token {wanted!r} to be the indicator{known}; name one that it has, or "
            "train with it (ctxlens train)."
        )
    return wanted


def _where(source: Path | str) -> dict[str, Any]:
    return {"local_files_only": isinstance(source, Path)}


__all__ = [
    "DTYPES", "INDICATOR_RECORD", "PACKAGED", "find_indicator", "find_stop_ids", "hash_checkpoint",
    "load_causal_lm", "load_tokenizer", "locate_checkpoint", "read_chat_template", "resolve_device",
    "resolve_dtype",
]  # fmt: skip
