"""Which backends there are, and how one is made: the only place where a backend is told by its name."""

from __future__ import annotations

from typing import Any, Literal, get_args

from ctxlens.errors import InputError, require_package
from ctxlens.models.backends.protocol import Backend, Readout

BackendName = Literal["auto", "lens", "native"]


def check_backend(backend: str, readout: str) -> None:
    """Refuse a backend or a readout that is unknown, and a backend that cannot be had.

    Raises:
        InputError: an unknown backend or readout, or a readout that the backend does not have.
        MissingPackageError: `lens` without TransformerLens.
    """
    if backend not in get_args(BackendName):
        raise InputError(f"unknown backend {backend!r}; choose auto, lens or native.")
    if readout not in get_args(Readout):
        raise InputError(f"unknown readout {readout!r}; choose one of {', '.join(get_args(Readout))}.")
    if readout != "model" and backend == "lens":
        raise InputError(
            f'readout {readout!r} needs backend="native"; the lens reads the pattern that the model computed.'
        )
    if backend == "lens":
        require_package("the backend lens", "transformer_lens", ", or use the backend native")


def choose_attention(backend: str) -> str | None:
    """The `attn_implementation` to load a model with; None leaves the choice to transformers."""
    return "eager" if backend == "lens" else None


def make_backend(hf_model: Any, tokenizer: Any, backend: str, readout: str, *, copied: bool) -> Backend:
    """A backend around a transformers model.

    Args:
        hf_model: a transformers decoder.
        tokenizer: its tokenizer.
        backend: `lens` or `native`; `auto` is `native`.
        readout: `model` or `float32`; see `ctxlens.load_model`.
        copied: whether `lens`, which changes the modules of its model, works on a copy.

    Raises:
        UnsupportedModelError: attention that the backend cannot read exactly.
    """
    if backend != "lens":
        from ctxlens.models.backends.native import NativeBackend

        return NativeBackend(hf_model, readout=readout)
    from ctxlens.models.backends.lens import LensBackend, bridge_from_hf

    return LensBackend(bridge_from_hf(hf_model, tokenizer, copied=copied))


__all__ = ["BackendName", "check_backend", "choose_attention", "make_backend"]
