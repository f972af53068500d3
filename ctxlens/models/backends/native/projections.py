"""The output projection of every attention layer of a transformers decoder, found by its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ctxlens.errors import UnsupportedModelError


def find_output_projections(hf_model: nn.Module, n_layers: int, width: int) -> dict[int, nn.Module]:
    """The output projection of every layer's attention, identified by its place and not by its name.

    In the attention module of a layer (the one with `layer_idx` and `is_causal`), it is the last projection
    that a forward pass calls, and its input is the output of all heads side by side.

    Args:
        hf_model: a transformers decoder.
        n_layers: its number of layers.
        width: number of heads times `d_head`.

    Raises:
        UnsupportedModelError: a layer has no such projection.
    """
    last: dict[int, nn.Module] = {}
    sizes: dict[int, int] = {}
    with _called_before(_projections(hf_model), lambda layer, module, _: last.__setitem__(layer, module)):
        _run_two_tokens(hf_model)
    with _called_before(
        list(last.items()), lambda layer, _, features: sizes.__setitem__(layer, features.shape[-1])
    ):
        _run_two_tokens(hf_model)
    for layer in range(n_layers):
        if sizes.get(layer) != width:
            found_size = f"it takes {sizes[layer]} features" if layer in sizes else "there is none"
            raise UnsupportedModelError(
                f"the output projection of layer {layer} of {type(hf_model).__name__} cannot be identified "
                f'({found_size}; expected {width}, all heads side by side); try backend="lens".'
            )
    return last


def _projections(hf_model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """The modules with a weight matrix (a Linear or a Conv1D) inside each layer's attention."""
    for module in hf_model.modules():
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or not hasattr(module, "is_causal"):
            continue
        for child in module.modules():
            weight = getattr(child, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2:
                yield layer, child


@contextmanager
def _called_before(modules: Any, note: Callable[[int, nn.Module, Tensor], None]) -> Iterator[None]:
    """Inside the block, `note(layer, module, input)` is called before each call of a module."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: note(layer, module, args[0])

    handles = [module.register_forward_pre_hook(hook(layer)) for layer, module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _run_two_tokens(hf_model: nn.Module) -> None:
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(hf_model.parameters()).device)
    hf_model(input_ids=tokens, use_cache=False)


__all__ = ["find_output_projections"]
