"""Which number format `dtype="auto"` means, for a checkpoint and a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ctxlens.errors import InputError, first_line
from ctxlens.models.checkpoint import is_gguf, locate_checkpoint, pretrained_arguments
from ctxlens.models.loading import DTYPES, resolve_dtype

MOST_IN_FLOAT32 = 50_000_000
"""Up to this many parameters, a model runs in float32 on every CPU."""

_FAST = ("amx_bf16", "avx512_bf16")
_FAST_IN_OLDER_TORCH = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")


def has_fast_bfloat16() -> bool:
    """Whether this processor has instructions that multiply bfloat16 (AMX, AVX512_BF16), as torch reports.

    Without them, products in bfloat16 can be many times slower than in float32.
    """
    report = getattr(torch.cpu, "get_capabilities", None)
    if report is not None:
        found = report()
        return any(found.get(name, False) for name in _FAST)
    return any(getattr(torch.cpu, name, bool)() for name in _FAST_IN_OLDER_TORCH)


def trains_in_bfloat16(model: Any, *, trust_remote_code: bool = False, revision: str | None = None) -> bool:
    """Whether training on this CPU multiplies in bfloat16 by default (autocast; the weights stay in float32).

    It does on a processor that multiplies bfloat16 fast, for a model with more than 50 million parameters.
    With less work per call, the conversions cost more than they save. A checkpoint whose configuration
    cannot be read gives False.

    Args:
        model: a loaded model, or the name or folder of a checkpoint.
        trust_remote_code: run code that comes with the checkpoint.
        revision: branch, tag or commit of a model on the Hub.
    """
    if not has_fast_bfloat16():
        return False
    if isinstance(model, str | Path):
        try:
            config = _read_config(locate_checkpoint(str(model)), trust_remote_code, revision)
        except InputError:
            return False  # loading the model says what is wrong with it
        return _count_parameters(config, trust_remote_code) > MOST_IN_FLOAT32
    return sum(weight.numel() for weight in model.parameters()) > MOST_IN_FLOAT32


def choose_dtype(
    dtype: str,
    source: Path | str,
    device: torch.device,
    *,
    backend: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> torch.dtype:
    """The number format that is asked for, or the best one if that is `auto`.

    On a GPU this is the checkpoint's own format (bfloat16 for a GGUF file). On a CPU it is float32, or
    bfloat16 if the processor multiplies it fast, the model has more than 50 million parameters, and the
    backend can compute role shares in float32 nevertheless.

    Raises:
        InputError: an unknown format, or a checkpoint whose configuration cannot be read.
    """
    if dtype != "auto":
        return resolve_dtype(dtype)
    if device.type == "cpu" and (backend == "lens" or not has_fast_bfloat16()):
        return torch.float32
    if device.type != "cpu" and is_gguf(source):
        return torch.bfloat16
    config = _read_config(source, trust_remote_code, revision)
    if device.type == "cpu":
        is_large = _count_parameters(config, trust_remote_code) > MOST_IN_FLOAT32
        return torch.bfloat16 if is_large else torch.float32
    return next((dtype for dtype in DTYPES.values() if dtype == config.dtype), torch.float32)


def _read_config(source: Path | str, trust_remote_code: bool, revision: str | None) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            **pretrained_arguments(source, revision), trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers' GGUF reader raises all kinds of errors for damaged files
        if not is_gguf(source) and not isinstance(error, OSError | ValueError | KeyError):
            raise
        raise InputError(f"no configuration can be loaded from {source} ({first_line(error)}).") from error


def _count_parameters(config: Any, trust_remote_code: bool) -> int:
    """The number of parameters of a configuration's model, without making its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(weight.numel() for weight in model.parameters())


__all__ = ["MOST_IN_FLOAT32", "choose_dtype", "has_fast_bfloat16", "trains_in_bfloat16"]
