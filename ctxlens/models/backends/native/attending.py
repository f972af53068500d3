"""What is asked of a model's attention for the time of a `with` block, and what has been read so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxlens.models.attention.resting import SinkReader
from ctxlens.models.attention.steering import combine_selects
from ctxlens.models.backends.batch import HeadWeights, RunningKeys
from ctxlens.models.backends.protocol import LayerPath

Kept = Literal["shares", "resting", "pattern", "calls"]
"""What is kept of a layer's attention."""


@dataclass
class ForwardPass:
    """What the layers of one forward pass share. A new pass gets a new one.

    Within a pass, layers that see the same keys are given the very same mask, and nobody changes it. So the
    sum of a mask and a steering's bias can be shared by all layers that are steered alike.
    """

    _masks: dict[tuple[int, tuple[float, ...]], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def combine(self, mask: Tensor, weights: HeadWeights, make: Callable[[], Tensor]) -> Tensor:
        """The mask with the bias of these head weights, made by `make` when it is first needed.

        An entry holds its mask, so that no other mask can have the same id as long as the entry exists.
        """
        key = (id(mask), weights.numbers)
        if key not in self._masks:
            self._masks[key] = (mask, make())
        return self._masks[key][1]


@dataclass
class Attending:
    """What happens in the attention of a model inside `attend`, and what has been read so far.

    Attributes:
        keys: roles and biases of the keys.
        layers: the layers to read.
        queries: the query positions to keep, by row.
        keep: whether role shares, role shares with the part that rests on sinks, patterns, or the calls
            themselves are kept.
        stop: whether the forward pass ends after the highest layer to read.
        exact: whether the shares of 16-bit models are computed in float32.
        reduce: a function of each layer's shares whose result is kept in their place.
        sinks: finds the sinks of each layer, where shares are kept with the part that rests on them.
        collected: by layer, shares `[batch, head, query, role]`, shares and resting parts
            `[batch, 2, head, query, role]`, or patterns, float32, on the CPU; or the results of `reduce`, on
            the device of the layer.
        held: by layer, the call without its values, where calls are kept.
        progress: called with the number of calls kept and the number of layers.
        paths: by layer whose attention came through here, how it was computed.
        current: what the layers of the forward pass that is running share.
    """

    keys: RunningKeys
    layers: frozenset[int] = frozenset()
    queries: Int[Tensor, "batch query"] | None = None
    keep: Kept = "shares"
    stop: bool = False
    exact: bool = False
    reduce: Callable[..., Tensor] | None = None
    sinks: SinkReader | None = None
    collected: dict[int, Tensor] = field(default_factory=dict)
    held: dict[int, Any] = field(default_factory=dict)
    progress: Callable[[int, int], None] | None = None
    paths: dict[int, LayerPath] = field(default_factory=dict)
    current: ForwardPass = field(default_factory=ForwardPass)
    _weights: dict[int, HeadWeights] = field(default_factory=dict)

    def start_pass(self, seen: int) -> None:
        """Begin a forward pass, with which `seen` columns in all have gone into the model."""
        self.keys.seen = seen
        self.current = ForwardPass()

    def weights(self, layer: int, query: Float[Tensor, "batch head query_pos d_head"]) -> HeadWeights:
        """The head weights of a layer; the steerings stay the same, so they are made once."""
        if layer not in self._weights:
            select = combine_selects(self.keys.steerings, layer, query.shape[1])
            self._weights[layer] = HeadWeights(select.to(query.device), tuple(select.flatten().tolist()))
        return self._weights[layer]

    def step_mask(
        self,
        layer: int,
        query: Float[Tensor, "batch head query_pos d_head"],
        n_keys: int,
        mask: Tensor | None,
    ) -> Tensor:
        """Bias and mask of a decoding step in one additive mask, shared by layers that are steered alike."""
        weights = self.weights(layer, query)
        bias = self.keys.score_bias(weights, n_keys, query.shape[0], query.dtype, query.device)
        if mask is None:
            return bias
        return self.current.combine(mask, weights, lambda: add_to_mask(bias, mask))


def add_to_mask(bias: Tensor, mask: Tensor) -> Tensor:
    """An additive mask: the bias where the mask lets a query attend, a large negative number elsewhere."""
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return torch.where(mask > torch.finfo(mask.dtype).min / 2, bias + mask, mask)


__all__ = ["Attending", "ForwardPass", "Kept", "add_to_mask"]
