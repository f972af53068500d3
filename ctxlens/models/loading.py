"""Load checkpoints from folders or the Hub, with one clear sentence if something is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ctxlens.chat.roles import DEFAULT_INDICATOR
from ctxlens.errors import InputError, first_line
from ctxlens.models.checkpoint import is_gguf, pretrained_arguments

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

INDICATOR_RECORD = "ctxlens_indicator"
"""The key of a checkpoint's config.json that records its indicator (`text`, and `as` what)."""


def load_causal_lm(
    source: Path | str,
    *,
    device: torch.device | None,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    attention: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """The language model of a checkpoint, from safetensors or GGUF; `InputError` if it cannot be loaded.

    The weights of a GGUF file are dequantised. `attention` is transformers' `attn_implementation`; None
    leaves the choice to transformers. Without `device` the model stays where it was loaded. `options` go to
    `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if is_gguf(source):
        options |= _dequantising()
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **pretrained_arguments(source, revision),
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"no language model can be loaded from {source} ({first_line(error)}).") from error
    except Exception as error:  # transformers' GGUF reader raises all kinds of errors for damaged files
        if not is_gguf(source):
            raise
        raise InputError(f"no language model can be loaded from {source} ({first_line(error)}).") from error
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    model, report = loaded
    if is_gguf(source):
        _forget_gguf(model, source, report)
    return (model if device is None else model.to(device)).eval()


def _dequantising() -> dict[str, Any]:
    """The option that unpacks all weights of a GGUF file; older versions of transformers always do."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _forget_gguf(model: Any, source: Path | str, report: Mapping[str, Any]) -> None:
    """Make a dequantised model one like any other; `InputError` if the file lacks some of its weights."""
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{source} lacks weights of its architecture ({len(missing)}, such as {missing[0]})."
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None


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


__all__ = [
    "DTYPES", "INDICATOR_RECORD", "find_indicator", "find_stop_ids", "load_causal_lm", "resolve_device",
    "resolve_dtype",
]  # fmt: skip
