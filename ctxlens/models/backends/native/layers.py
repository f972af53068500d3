"""The decoder layers of a transformers model, found by their place, and the hidden states that enter them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ctxlens.errors import UnsupportedModelError

NoteHidden = Callable[[Float[Tensor, "batch pos d_model"]], None]
"""Takes the hidden states at the entry of a layer."""


def find_decoder_layers(hf_model: nn.Module, n_layers: int) -> list[nn.Module]:
    """The decoder layers, lowest first, identified by their place and not by their name.

    They are the members of the module list whose member `n`, for every `n`, is or contains a module with
    `layer_idx` equal to `n`.

    Args:
        hf_model: a transformers decoder.
        n_layers: its number of layers.

    Raises:
        UnsupportedModelError: there is no such list.
    """
    for module in hf_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) >= n_layers:
            members = list(module)[:n_layers]
            if all(_holds_layer(member, number) for number, member in enumerate(members)):
                return members
    raise UnsupportedModelError(
        f"the decoder layers of {type(hf_model).__name__} cannot be identified, so its attention sinks "
        'cannot be found; read with sinks=False, or try backend="lens".'
    )


def _holds_layer(member: nn.Module, number: int) -> bool:
    return any(getattr(module, "layer_idx", None) == number for module in member.modules())


@contextmanager
def note_hidden_states(layers: list[nn.Module], note: NoteHidden) -> Iterator[None]:
    """Inside the block, `note` is called with the hidden states at the entry of every layer."""
    handles = [layer.register_forward_pre_hook(_hook(note), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(note: NoteHidden) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            raise UnsupportedModelError(
                f"{type(module).__name__} does not take hidden states [batch, pos, d_model] as its first "
                'argument, so attention sinks cannot be found; read with sinks=False, or try backend="lens".'
            )
        note(hidden)

    return hook


__all__ = ["find_decoder_layers", "note_hidden_states"]
