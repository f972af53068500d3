"""Choose heads: the retrieval head of each layer (paper B.3), and random controls."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.errors import InputError
from ctxlens.evals.needle.prompts import NeedleModel
from ctxlens.results import RoleAllocation

Head = tuple[int, int]
"""A pair of layer and head."""
_T = TypeVar("_T")


@runtime_checkable
class HeadModel(NeedleModel, Protocol):
    """What head experiments require of a model; `ctxlens.models.Model` has it."""

    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    def read_roles(
        self, chats: Sequence[RenderedChat], *, queries: Any = ..., batch_tokens: int = ...
    ) -> list[RoleAllocation]: ...
    def read_attention_to(
        self, chats: Sequence[RenderedChat], chosen: Any, *, batch_tokens: int = ...
    ) -> list[Any]: ...


def find_retrieval_heads(allocation: RoleAllocation) -> tuple[Head, ...]:
    """The head of each layer with the most attention from the answer's position to the user's tokens (B.3).

    Args:
        allocation: shares of `first_answer` queries, read without the template, as in the paper; the same
            heads are then studied with it.

    Returns:
        One pair of layer and head for each layer.
    """
    heads = allocation.retrieval_heads(Role.USER)
    return tuple((int(layer), int(head)) for layer, head in zip(allocation.layers, heads, strict=True))


def draw_random_heads(
    others_than: Sequence[Head], n_heads: int, *, n_draws: int, seed: int = 0, n_layers: int | None = None
) -> list[tuple[Head, ...]]:
    """Draw control sets: in each layer, as many of the other heads as were given.

    Args:
        others_than: the heads for which controls are drawn.
        n_heads: number of heads per layer.
        n_draws: number of sets; they differ from one another if there are enough heads.
        seed: seed of the draws.
        n_layers: number of layers. What a layer has too few other heads for is then drawn from the layers
            nearest to it; a set is smaller only if the model has no further heads.

    Raises:
        InputError: a layer has too few remaining heads, and `n_layers` is not given.
    """
    taken: dict[int, set[int]] = {}
    for layer, head in others_than:
        taken.setdefault(layer, set()).add(head)
    crowded = [layer for layer, heads in taken.items() if 2 * len(heads) > n_heads]
    if crowded and n_layers is None:
        raise InputError(
            f"layer {crowded[0]} has {n_heads} heads, too few for as many random ones beside "
            f"{len(taken[crowded[0]])}; leave out the random heads."
        )
    rng = random.Random(f"heads-{seed}")
    sets: list[tuple[Head, ...]] = []
    for _ in range(n_draws):
        for _attempt in range(20):
            drawn = _draw_set(taken, n_heads, n_layers or 0, rng)
            if drawn not in sets:
                break
        sets.append(drawn)
    return sets


def _draw_set(
    taken: Mapping[int, set[int]], n_heads: int, n_layers: int, rng: random.Random
) -> tuple[Head, ...]:
    """As many other heads of each layer; what a layer lacks comes from the layers nearest to it."""
    drawn: list[Head] = []
    lacking: list[int] = []
    for layer, heads in taken.items():
        others = sorted(set(range(n_heads)) - heads)
        n = min(len(heads), len(others))
        drawn += [(layer, head) for head in sorted(rng.sample(others, n))]
        lacking += [layer] * (len(heads) - n)
    for layer in lacking:
        others = [
            (place, head)
            for place in range(n_layers)
            for head in range(n_heads)
            if head not in taken.get(place, ()) and (place, head) not in drawn
        ]
        nearest = min((abs(place - layer) for place, _ in others), default=None)
        if nearest is not None:
            drawn.append(rng.choice([one for one in others if abs(one[0] - layer) == nearest]))
    return tuple(drawn)


def spread(items: Sequence[_T], at_most: int) -> list[_T]:
    """At most `at_most` of the items, evenly spaced, in their original order."""
    chosen = np.linspace(0, len(items) - 1, min(at_most, len(items))).round().astype(int)
    return [items[i] for i in dict.fromkeys(chosen.tolist())]


__all__ = ["Head", "HeadModel", "draw_random_heads", "find_retrieval_heads", "spread"]
