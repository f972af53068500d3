"""What one call of one layer's attention has to do, decided before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ctxlens.models.attention.fused import FEW_QUERIES
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.native.attending import Attending
from ctxlens.models.backends.protocol import LayerPath

HowSteered = Literal["not", "ready mask", "mask", "columns"]
"""How a steering enters a call.

`ready mask`: an additive mask that many layers and steps share, where every head weight is known beforehand.
`mask`: an additive mask of this call, where target shares decide the weights query by query.
`columns`: extra columns of Q and K, which cost less than a mask where there are many queries.
"""

Kept = Literal["nothing", "shares", "resting", "pattern", "calls"]
"""What is kept of a call besides its output; `resting`: shares, and the part of them that rests on sinks."""


@dataclass(frozen=True)
class Plan:
    """What one call of one layer's attention has to do.

    Attributes:
        path: `plain` (transformers' own function), one `fused` call, or exact `tiled` attention.
        steered: how a steering enters.
        kept: what is kept besides the output.
        stops: whether the forward pass ends here, because no higher layer is read.
    """

    path: LayerPath
    steered: HowSteered = "not"
    kept: Kept = "nothing"
    stops: bool = False


PLAIN = Plan("plain")


def plan_call(
    attending: Attending | None,
    layer: int,
    n_queries: int,
    *,
    is_causal: bool,
    has_terms: bool,
    copies_keys: bool = False,
) -> Plan:
    """Decide what a call has to do.

    Args:
        attending: what is asked of the model; None outside of `attend`.
        layer: the layer's index.
        n_queries: number of query positions.
        is_causal: whether causality is what masks this call, in place of a mask.
        has_terms: whether the model adds terms that one fused call cannot express.
        copies_keys: whether transformers' own function would copy keys and values for every head of a group.
    """
    path = "tiled" if has_terms else "fused"
    if attending is None:
        return Plan(path) if has_terms else PLAIN
    reads = layer in attending.layers
    is_step = n_queries <= FEW_QUERIES and not (is_causal or reads or has_terms)
    steered = _choose_steering(attending.keys.steerings, layer, is_step)
    if reads:
        return Plan(path, steered, attending.keep, attending.stop and layer == max(attending.layers))
    is_plain = steered == "not" and not has_terms and not copies_keys
    return PLAIN if is_plain else Plan(path, steered)


def _choose_steering(steerings: Sequence[Steering], layer: int, is_step: bool) -> HowSteered:
    """How steerings enter a call of a layer; `is_step`: it has few queries and is only steered."""
    if not any(steering.touches(layer) for steering in steerings):
        return "not"
    if not is_step:
        return "columns"
    return "mask" if any(steering.target_share is not None for steering in steerings) else "ready mask"


__all__ = ["PLAIN", "HowSteered", "Kept", "Plan", "plan_call"]
