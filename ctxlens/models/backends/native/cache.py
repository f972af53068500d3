"""The cached keys and values of a transformers decoder, taken out of its cache and put into a new one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ctxlens.models.backends.protocol import ROOM, KeyValues


class RoomyLayer(DynamicLayer):
    """A cache layer with spare room, so that adding a token does not copy all earlier ones.

    It keeps the keys and values of every position, also where a layer looks back only some way: what such a
    layer may see is decided by its mask.

    Attributes:
        room: keys and values with the columns that are free; None before the first token.
    """

    def __init__(self, columns: int, past: tuple[Tensor, Tensor] | None = None, known: int = 0) -> None:
        """Take the columns that are needed in all, and what is cached already: `known` columns of `past`."""
        super().__init__()
        self._columns = columns
        self.room = past
        if past is not None:
            self.lazy_initialization(*past)
            self._show(known)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, new = self.get_seq_length(), key_states.shape[-2]
        if self.room is None or self.room[0].shape[-2] < before + new:
            self.room = (
                self._grow(key_states, self.keys, before),
                self._grow(value_states, self.values, before),
            )
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[..., before : before + new, :] = states
        return self._show(before + new)

    def _grow(self, states: Tensor, known: Tensor | None, before: int) -> Tensor:
        """Columns for the states that are known, for new ones, and for tokens to come."""
        needed = before + states.shape[-2]
        columns = self._columns if needed <= self._columns else needed + ROOM
        room = states.new_empty(*states.shape[:-2], columns, states.shape[-1])
        if before and known is not None:
            room[..., :before, :] = known
        return room

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows only."""
        used = self.get_seq_length()
        assert self.room is not None, "nothing is cached yet"
        self.room = (self.room[0][indices], self.room[1][indices])
        self._show(used)

    def _show(self, used: int) -> tuple[Tensor, Tensor]:
        assert self.room is not None, "nothing is cached yet"
        keys, values = (room[..., :used, :] for room in self.room)
        self.keys, self.values = keys, values
        return keys, values


def make_cache(past: KeyValues | int, known: int, columns: int) -> Cache:
    """A cache that starts with the first `known` columns of these keys and values, and writes after them.

    Args:
        past: keys and values by layer, or the number of layers where nothing is cached yet.
        known: how many of their columns are cached.
        columns: how many columns are needed in all.
    """
    if isinstance(past, int):
        return Cache(layers=[RoomyLayer(columns + ROOM) for _ in range(past)])
    return Cache(layers=[RoomyLayer(columns + ROOM, pair, known) for pair in past])


def read_cache(cache: Cache) -> KeyValues:
    """The keys and values of a cache from `make_cache`, with the columns that are free."""
    pairs = [layer.room for layer in cache.layers if isinstance(layer, RoomyLayer)]
    return [pair for pair in pairs if pair is not None]


def holds_keys_and_values(cache: Any, n_layers: int) -> bool:
    """Whether a model's own cache holds keys and values of every layer, and nothing else."""
    layers = getattr(cache, "layers", ())
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return len(layers) == n_layers and all(type(one) in plain and one.is_initialized for one in layers)


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


__all__ = ["ResumedDecoder", "holds_keys_and_values", "make_cache", "read_cache"]
