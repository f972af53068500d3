"""How large the parts of a model are, counted on its modules."""

from __future__ import annotations

import torch

_UNFUSED_ACTIVATIONS = ("gelu_new", "gelu_fast", "quick_gelu")


def weigh(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers. Shared storage counts once; what is not loaded does not count."""
    storages = {}
    for x in (*module.parameters(), *module.buffers()):
        if x.device.type != "meta":
            storage = x.untyped_storage()
            storages[x.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def count_feed_forward(
    module: torch.nn.Module, *, d_model: int, d_mlp: int, experts: int, activation: str
) -> int:
    """Numbers per token that a feed-forward layer has in memory at once.

    Args:
        module: the model.
        d_model: width of the hidden states.
        d_mlp: width of a feed-forward layer, or of one expert.
        experts: experts per token; 1 in dense models.
        activation: name of the activation function.
    """
    routed = 3 * experts * d_model if experts > 1 else 0
    return int(_activation_copies(module, activation) * experts * d_mlp + routed)


def _activation_copies(module: torch.nn.Module, activation: str) -> int:
    """How many tensors as wide as the feed-forward layer exist at once, as measured."""
    if getattr(getattr(module, "config", None), "swiglu_limit", None) is not None:
        return 8  # gpt-oss clamps, shifts and gates in single steps
    if activation in _UNFUSED_ACTIVATIONS:
        return 6
    return 4 if any(name.endswith("gate_up_proj.weight") for name, _ in module.named_parameters()) else 3


__all__ = ["count_feed_forward", "weigh"]
