"""What every backend can do: read and steer a decoder's attention, describe itself, and continue prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxlens.models.attention.resting import RestingShares
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.batch import TokenBatch

Readout = Literal["model", "float32"]
"""The dtype in which role shares are computed: the model's own, or float32."""

LayerPath = Literal["fused", "tiled", "hooks", "plain"]
"""How a layer's attention is computed: in one fused call, in exact tiles of queries, by TransformerLens with
hooks, or as the model's own library does it."""

Reduce = Callable[[Float[Tensor, "batch head query role"]], Float[Tensor, "batch ..."]]
"""A function of one layer's role shares. It runs where the model runs, so that only its result leaves the
device."""


ReduceResting = Callable[[RestingShares], Float[Tensor, "batch ..."]]
"""A function of one layer's role shares and of what rests on sinks."""


@runtime_checkable
class TurnReduce(Protocol):
    """A function of one layer's role shares of whole turns."""

    def __call__(
        self,
        shares: Float[Tensor, "batch head query role"],
        turn_of: Int[Tensor, "batch query"],
        n_turns: int,
    ) -> Float[Tensor, "batch turn value"]:
        """Reduce the shares of response tokens.

        Args:
            shares: role shares of the tokens.
            turn_of: the number of each token's turn, 0 for the first of its conversation; -1: padding.
            n_turns: the largest number of turns of any conversation.
        """
        ...


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder that reading and steering need."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    n_ctx: int
    d_vocab: int


@dataclass(frozen=True)
class LayerFacts:
    """How one layer's attention is computed.

    Attributes:
        layer: its index.
        path: `fused` (one call gives output and shares), `tiled` (exact, in tiles of queries) or `hooks`
            (TransformerLens).
        window: tokens of its sliding window; None means that it sees all tokens, or that the backend does not
            know of a window.
    """

    layer: int
    path: LayerPath
    window: int | None


@dataclass(frozen=True)
class DecoderCosts:
    """The sizes of a decoder, beyond its shape, that a memory forecast needs.

    Attributes:
        weights: bytes of parameters and buffers, as they are now; shared storage counts once.
        feed_forward: numbers per token that a feed-forward layer has in memory at once.
        is_eager: whether the model's own attention computes whole patterns.
    """

    weights: int
    feed_forward: int
    is_eager: bool


HeadEdit = Callable[[Float[Tensor, "batch pos head d_head"]], Float[Tensor, "batch pos head d_head"]]
"""A function from the outputs of a layer's heads to those that replace them."""

Decoder = Callable[[Int[Tensor, "batch new"]], Float[Tensor, "batch vocab"]]
"""Takes the next tokens of every row (first the whole left-padded prompt) and returns the next logits."""


@runtime_checkable
class Backend(Protocol):
    """One way to run a decoder so that its attention can be read and steered."""

    name: str
    shape: ModelShape

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        ...

    @property
    def layers(self) -> tuple[LayerFacts, ...]:
        """How each layer's attention is computed where it is read or steered."""
        ...

    def costs(self) -> DecoderCosts:
        """The sizes that a memory forecast needs."""
        ...

    def read_shares(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        queries: Int[Tensor, "batch query"],
        steerings: Sequence[Steering],
        reduce: Reduce | None = None,
    ) -> Float[Tensor, "batch layer ..."]:
        """Role shares of chosen query positions of a right-padded batch, float32, on the CPU.

        The result has shape `[batch, layer, head, query, role]`; with `reduce`, it is the stacked results of
        `reduce` for every layer.
        """
        ...

    def read_resting(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        queries: Int[Tensor, "batch query"],
        steerings: Sequence[Steering],
    ) -> RestingShares:
        """Role shares of chosen query positions, and the part of them that rests on attention sinks.

        Both have shape `[batch, layer, head, query, role]`, float32, on the CPU. The sinks of every layer are
        found in the same forward pass; see `ctxlens.models.attention.sinks`.

        Raises:
            UnsupportedModelError: the hidden states at the entry of the layers cannot be seen.
        """
        ...

    def reduce_resting(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        queries: Int[Tensor, "batch query"],
        steerings: Sequence[Steering],
        reduce: ReduceResting,
    ) -> Float[Tensor, "batch layer ..."]:
        """The stacked results of a function of what `read_resting` reads, for every layer."""
        ...

    def read_pattern(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        queries: Int[Tensor, "batch query"],
        steerings: Sequence[Steering],
    ) -> Float[Tensor, "batch layer head query key"]:
        """The attention pattern of chosen query positions, float32, on the CPU."""
        ...

    def logits(
        self, batch: TokenBatch, steerings: Sequence[Steering], *, grad: bool = False
    ) -> Float[Tensor, "batch pos vocab"]:
        """Next-token logits of a right-padded batch; with `grad` they can be differentiated."""
        ...

    def logits_while_reading(self, batch: TokenBatch) -> Float[Tensor, "batch pos vocab"]:
        """Next-token logits of a right-padded batch from a forward pass in which every layer is read."""
        ...

    def edit_heads(self, edits: Mapping[int, HeadEdit]) -> AbstractContextManager[None]:
        """Replace the outputs of heads, before the output projection, in every forward pass of the block.

        Args:
            edits: the function to apply, by layer.

        Raises:
            UnsupportedModelError: the model has no place where these outputs can be identified.
        """
        ...

    def decoder(self, batch: TokenBatch, steerings: Sequence[Steering]) -> AbstractContextManager[Decoder]:
        """A decoder with cache for a left-padded batch; it stays steered until the context ends."""
        ...


KeyValues = list[tuple[Float[Tensor, "_ kv_head _ d_head"], Float[Tensor, "_ kv_head _ d_head"]]]
"""What a decoder caches of the tokens it has read: keys and values `[batch, kv_head, pos, d_head]`, one pair
per layer."""

ROOM = 64
"""How many columns of a cache are kept free for new tokens, and by how many it grows at once."""


class PrefixDecoder(Protocol):
    """A decoder that continues from cached keys and values and can drop rows that are finished."""

    def __call__(self, tokens: Int[Tensor, "batch new"]) -> Float[Tensor, "batch vocab"]:
        """The next logits after the next tokens of every row."""
        ...

    def keep(self, rows: Int[Tensor, " row"]) -> None:
        """Continue with these rows only."""
        ...


@runtime_checkable
class PrefixBackend(Protocol):
    """A backend that can continue from cached keys and values, so that prompts can share a prefix.

    In these batches prompts are padded on the left. Keys and values may have more columns than the batch: the
    columns after it are free, and the backend writes there.
    """

    @property
    def shares_prefixes(self) -> bool:
        """Whether the model allows it: it caches keys and values, and no recurrent states."""
        ...

    def prefill(
        self,
        batch: TokenBatch,
        past: KeyValues | None,
        known: int,
        steerings: Sequence[Steering],
        n_logits: int = 1,
    ) -> tuple[Float[Tensor, "batch last vocab"], KeyValues]:
        """Read prompts of which the first `known` columns are cached already, in `past`.

        Returns:
            The next-token logits of at least the last `n_logits` columns, and keys and values of all columns.
        """
        ...

    def resume(
        self, batch: TokenBatch, past: KeyValues, steerings: Sequence[Steering]
    ) -> AbstractContextManager[PrefixDecoder]:
        """A decoder that continues after prompts that are cached as a whole."""
        ...


@runtime_checkable
class EagerBackend(Protocol):
    """A backend whose model can also be run by its own library alone, for comparison."""

    def read_alone(self, batch: TokenBatch) -> Float[Tensor, "batch pos vocab"]:
        """Next-token logits of a right-padded batch from the model's own library, without any of our code."""
        ...

    def read_eagerly(
        self, batch: TokenBatch
    ) -> tuple[Float[Tensor, "batch pos vocab"], list[Float[Tensor, "batch head query key"]]]:
        """Logits and the patterns of all layers from the library's own explicit attention.

        Raises:
            ValueError: the model has no explicit attention, or it returns no patterns.
        """
        ...


__all__ = [
    "ROOM", "Backend", "Decoder", "DecoderCosts", "EagerBackend", "HeadEdit", "KeyValues", "LayerFacts",
    "LayerPath", "ModelShape", "PrefixBackend", "PrefixDecoder", "Readout", "Reduce", "ReduceResting",
    "TurnReduce",
]  # fmt: skip
