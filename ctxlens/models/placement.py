"""Where the weights of a model go, and whether they are quantised: what `from_pretrained` is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ctxlens.errors import InputError, require_package
from ctxlens.models.checkpoint import is_gguf


def place(
    source: Path | str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    backend: str,
    device_map: str | None,
    bits: int,
) -> tuple[torch.device | None, dict[str, Any]]:
    """The device to which the loaded model is moved, and options of `from_pretrained`.

    Args:
        source: the located checkpoint.
        device: the device that was asked for.
        dtype: the number format of activations.
        backend: the backend that was asked for.
        device_map: how to spread the model over devices, or None.
        bits: 4 or 8 to quantise the weights, 0 to keep them.

    Returns:
        The device, None if `from_pretrained` itself places the weights; and the options.

    Raises:
        InputError: both 4 and 8 bits; a GGUF file, which is quantised already; no bitsandbytes; the backend
            `lens` for a model that is spread or quantised.
    """
    if backend == "lens" and (device_map is not None or bits):
        given = f"device_map {device_map!r}" if device_map is not None else f"{bits}-bit quantisation"
        raise InputError(f'{given} needs backend="native" or "auto"; the lens holds whole models.')
    options: dict[str, Any] = {}
    if bits:
        options["quantization_config"] = _quantise(source, dtype, bits)
        options["device_map"] = {"": device}
    if device_map is not None:
        options["device_map"] = device_map
    return (None if options else device), options


def _quantise(source: Path | str, dtype: torch.dtype, bits: int) -> Any:
    if bits not in (4, 8):
        raise InputError("load_in_4bit and load_in_8bit exclude each other; give only one of them.")
    if is_gguf(source):
        raise InputError(f"load_in_{bits}bit is not for GGUF files; {source} is quantised already.")
    require_package(f"load_in_{bits}bit", "bitsandbytes", ", or leave out the quantisation")
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


__all__ = ["place"]
