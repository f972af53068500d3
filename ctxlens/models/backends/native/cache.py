"""The cached keys and values of a transformers decoder, taken out of its cache and put into a new one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ctxlens.models.backends.protocol import KeyValues

_ROOM = 64
"""How many columns a cache grows by at once."""


class RoomyLayer(DynamicLayer):
    """A cache layer with spare room, so that adding a token does not copy all earlier ones."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._room = (keys, values)
        self._show(keys.shape[-2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens."""
        before, new = self.get_seq_length(), key_states.shape[-2]
        if self._room[0].shape[-2] < before + new:
            keys, values = (
                torch.nn.functional.pad(room[..., :before, :], (0, 0, 0, new + _ROOM)) for room in self._room
            )
            self._room = (keys, values)
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[..., before : before + new, :] = states
        return self._show(before + new)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows only."""
        used = self.get_seq_length()
        self._room = (self._room[0][indices], self._room[1][indices])
        self._show(used)

    def _show(self, used: int) -> tuple[Tensor, Tensor]:
        keys, values = (room[..., :used, :] for room in self._room)
        self.keys, self.values = keys, values
        return keys, values


def make_cache(past: KeyValues) -> Cache:
    """A cache that starts with these keys and values; they are not changed."""
    return Cache(layers=[RoomyLayer(keys, values) for keys, values in past])


def read_cache(cache: Any) -> KeyValues | None:
    """The keys and values of a cache; None if the cache holds anything else."""
    layers = getattr(cache, "layers", ())
    if not layers or not all(type(layer) in (DynamicLayer, RoomyLayer) for layer in layers):
        return None
    return [(layer.keys, layer.values) for layer in layers]


class ResumedDecoder:
    """Continues cached prompts; see `ctxlens.models.backends.protocol.PrefixDecoder`."""

    def __init__(
        self,
        run: Callable[[Tensor, Tensor, Any], Tensor],
        mask: Int[Tensor, "batch pos"],
        cache: Cache,
        on_keep: Callable[[Tensor], None],
    ) -> None:
        """Take a function that computes the next logits from tokens, mask of all columns, and cache."""
        self._run, self._mask, self._cache, self._on_keep = run, mask, cache, on_keep

    def __call__(self, tokens: Int[Tensor, "batch new"]) -> Tensor:
        """The next logits after the next tokens of every row."""
        self._mask = torch.cat([self._mask, torch.ones_like(tokens)], dim=1)
        return self._run(tokens, self._mask, self._cache)

    def keep(self, rows: Int[Tensor, " row"]) -> None:
        """Continue with these rows only."""
        self._mask = self._mask[rows]
        self._cache.batch_select_indices(rows)
        self._on_keep(rows)


__all__ = ["ResumedDecoder", "make_cache", "read_cache"]
