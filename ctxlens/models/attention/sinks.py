"""Attention sinks: the few tokens on which heads rest when nothing else in the text concerns them.

A head must put its attention somewhere, because softmax sums to 1. Heads that have nothing to do put it on
a few tokens whose hidden states are huge: the first token of the text, a BOS token, now and then the first
" the" or a full stop (Xiao et al. 2023, arXiv 2309.17453; Sun et al. 2024, arXiv 2402.17762; Gu et al.
2024, arXiv 2410.10781). Attention to such a token is not attention to whoever wrote it.

**Definition.** In a layer, a token is a sink if both hold:

* it is a *candidate*: it is the first token of the text, or a BOS token, or the norm of its hidden state
  has been at least `NORM_RATIO` times the median norm of the text's tokens, at the entry of this layer or
  of a lower one;
* it *receives* at least `RECEIVED` of the attention of the later tokens, averaged over these tokens and
  over all heads of the layer, and at least `LATER` tokens come after it.

The mean over later tokens is estimated from a sample of them (`sample_queries`). In a text of at most
`SAMPLES` tokens it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from einops import einsum, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctxlens.errors import InputError

NORM_RATIO = 5.0
"""Least norm of a candidate's hidden state, in medians of the text's tokens."""

RECEIVED = 0.05
"""Least attention that a sink receives from later tokens, mean over these and over heads."""

LATER = 16
"""Least number of later tokens. With fewer, attention to a neighbour cannot be told from resting."""

SAMPLES = 64
"""Query positions from which the attention received is estimated."""

SAMPLE_TILE_NUMBERS = 2**18
"""How many scores of sampled queries the native backend has in memory at a time. Larger tensors were measured
to cost up to twice the time, which goes into new pages of memory."""


@dataclass(frozen=True)
class QuerySample:
    """Query positions that stand for all positions of a text.

    Attributes:
        positions: the sampled positions, in rising order; padding repeats position 0.
        weights: how many positions each sample stands for; 0 at padding.
    """

    positions: Int[Tensor, "batch sample"]
    weights: Float[Tensor, "batch sample"]


def sample_queries(lengths: Int[Tensor, " batch"], samples: int = SAMPLES) -> QuerySample:
    """Query positions that lie ever closer together towards the end of each text.

    The distances to the last position grow by a constant factor, so that every token but the very last has
    sampled positions after it. Each sample stands for the positions from the previous sample to itself.

    Args:
        lengths: tokens of each text; texts begin at position 0.
        samples: number of positions of one text at most.

    Raises:
        InputError: a text without tokens, or fewer than two samples.
    """
    if samples < 2 or bool((lengths < 1).any()):
        raise InputError(
            f"cannot sample {samples} query positions of texts with {lengths.tolist()} tokens; expected at "
            "least two samples and one token."
        )
    rows = [_sample_one(int(length), samples) for length in lengths]
    longest = max(len(row) for row in rows)
    positions = torch.zeros((len(rows), longest), dtype=torch.long)
    weights = torch.zeros((len(rows), longest))
    for number, row in enumerate(rows):
        positions[number, : len(row)] = row
        weights[number, : len(row)] = torch.diff(row, prepend=torch.tensor([-1])).float()
    return QuerySample(positions.to(lengths.device), weights.to(lengths.device))


def _sample_one(length: int, samples: int) -> Int[Tensor, " sample"]:
    if length <= samples:
        return torch.arange(length)
    distances: list[int] = []
    for number in range(samples):
        step = (length / (distances[-1] + 1)) ** (1 / (samples - number)) if distances else 1.0
        grown = round((distances[-1] + 1) * step) - 1 if distances else 0
        distances.append(max(grown, number))
    return torch.tensor([length - 1 - distance for distance in reversed(distances)])


def attention_received(
    pattern: Float[Tensor, "batch head sample key"],
    sample: QuerySample,
    keys: Int[Tensor, " key"] | None = None,
) -> Float[Tensor, "batch key"]:
    """Attention that every token receives from the later ones, mean over these and over heads, 0 to 1.

    Args:
        pattern: attention of the sampled query positions after softmax, 0 where a key is masked.
        sample: the positions.
        keys: the positions of the keys; by default they are all of the text's.

    Returns:
        The mean; 0 for tokens after which no position was sampled.
    """
    key_pos = torch.arange(pattern.shape[-1], device=pattern.device) if keys is None else keys
    is_later = sample.positions[..., None] > key_pos
    weight = sample.weights[..., None].to(pattern.dtype) * is_later
    by_head = reduce(pattern, "batch head sample key -> batch sample key", "mean")
    total = einsum(by_head, weight, "batch sample key, batch sample key -> batch key")
    return total / weight.sum(1).clamp(min=1)


def norm_ratios(
    hidden: Float[Tensor, "batch pos d_model"], is_token: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """Norm of every token's hidden state in medians of its text; 0 at padding.

    Args:
        hidden: hidden states at the entry of a layer.
        is_token: true at tokens, false at padding.
    """
    norms = torch.linalg.vector_norm(hidden.float(), dim=-1)
    median = norms.masked_fill(~is_token, float("nan")).nanmedian(dim=-1, keepdim=True).values
    return torch.where(is_token, norms / median.clamp(min=torch.finfo(norms.dtype).tiny), 0.0)


@dataclass
class SinkFinder:
    """Finds the sinks of every layer during one forward pass, from the lowest layer up.

    Attributes:
        is_token: true at tokens, false at padding.
        candidates: tokens that may be sinks: the first of each text, BOS, and those with a huge hidden state.
    """

    is_token: Bool[Tensor, "batch pos"]
    is_bos: Bool[Tensor, "batch pos"] | None = None
    candidates: Bool[Tensor, "batch pos"] = field(init=False)

    def __post_init__(self) -> None:
        first = self.is_token & (self.is_token.cumsum(-1) == 1)
        self.candidates = first if self.is_bos is None else first | (self.is_bos & self.is_token)

    def enter(self, hidden: Float[Tensor, "batch pos d_model"]) -> None:
        """Note the hidden states at the entry of the next layer."""
        ratios = norm_ratios(hidden, self.is_token.to(hidden.device))
        self.candidates = self.candidates.to(ratios.device) | (ratios >= NORM_RATIO)

    def candidate_keys(self) -> Int[Tensor, " key"]:
        """The positions that hold a candidate in any of the texts."""
        return self.candidates.any(0).nonzero().flatten()

    def find(self, received: Float[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """The sinks of a layer, from the attention that every token receives there (`attention_received`)."""
        is_token = self.is_token.to(received.device)
        later = is_token.flip(-1).cumsum(-1).flip(-1) - is_token.long()
        return self.candidates.to(received.device) & (received >= RECEIVED) & (later >= LATER)


__all__ = [
    "LATER", "NORM_RATIO", "RECEIVED", "SAMPLES", "SAMPLE_TILE_NUMBERS", "QuerySample", "SinkFinder",
    "attention_received", "norm_ratios", "sample_queries",
]  # fmt: skip
