"""What every backend can do: read and steer a decoder's attention, and go on from what it has read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.batch import TokenBatch

Readout = Literal["model", "float32"]
"""The dtype in which role shares are computed: the model's own, or float32."""

Reduce = Callable[[Float[Tensor, "batch head query role"]], Float[Tensor, "batch ..."]]
"""What is made of one layer's role shares where the model runs, so that only its result leaves the device."""


@runtime_checkable
class TurnReduce(Protocol):
    """What is made of one layer's role shares of whole turns."""

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
            n_turns: how many turns there are at most.
        """
        ...


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder that readers and steerers need."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    n_ctx: int
    d_vocab: int


Decoder = Callable[[Int[Tensor, "batch new"]], Float[Tensor, "batch vocab"]]
"""Takes the next tokens of every row (the whole left-padded prompt first), gives the next logits."""


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

    def read_shares(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        queries: Int[Tensor, "batch query"],
        steerings: Sequence[Steering],
        reduce: Reduce | None = None,
    ) -> Float[Tensor, "batch layer ..."]:
        """Role shares of chosen query positions of a right-padded batch, float32, on the CPU.

        They are `[batch, layer, head, query, role]`, or what `reduce` makes of those of each layer.
        """
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

    def decoder(self, batch: TokenBatch, steerings: Sequence[Steering]) -> AbstractContextManager[Decoder]:
        """A decoder with cache for a left-padded batch, which stays steered until the context ends."""
        ...


KeyValues = list[tuple[Float[Tensor, "_ kv_head _ d_head"], Float[Tensor, "_ kv_head _ d_head"]]]
"""What a decoder remembers of the tokens it has read: keys and values `[batch, kv_head, pos, d_head]`,
a pair a layer."""


class PrefixDecoder(Protocol):
    """A decoder that goes on from what is remembered, and can let go of rows that are finished."""

    def __call__(self, tokens: Int[Tensor, "batch new"]) -> Float[Tensor, "batch vocab"]:
        """The next logits after the next tokens of every row."""
        ...

    def keep(self, rows: Int[Tensor, " row"]) -> None:
        """Go on with these rows only."""
        ...


@runtime_checkable
class PrefixBackend(Protocol):
    """A backend that goes on from remembered keys and values, so that prompts share what is common to them.

    In the batches here every row's prompt stands in any columns, in order; the mask tells which.
    """

    def prefill(
        self, batch: TokenBatch, past: KeyValues | None, steerings: Sequence[Steering], n_logits: int = 1
    ) -> tuple[Float[Tensor, "batch last vocab"], KeyValues | None]:
        """Read prompts whose first columns are remembered.

        Returns:
            The next-token logits of the last `n_logits` columns (or of more), and keys and values of all
            columns; None where the model keeps other things than these (a sliding window, a recurrent
            state), so that nothing can be shared.
        """
        ...

    def resume(
        self, batch: TokenBatch, past: KeyValues, steerings: Sequence[Steering]
    ) -> AbstractContextManager[PrefixDecoder]:
        """A decoder that goes on after prompts that are remembered whole."""
        ...


__all__ = [
    "Backend",
    "Decoder",
    "KeyValues",
    "ModelShape",
    "PrefixBackend",
    "PrefixDecoder",
    "Readout",
    "Reduce",
    "TurnReduce",
]
