"""How much memory a run will need, before it starts.

A forward pass needs weights, hidden states, and the intermediate results of one layer. Reading and steering
add columns on the queries, keys and values of one layer at a time, a mask where the model needs one, the
cache of a generation, and the shares that are kept. All of it follows from the model's shape, the paths of
its layers and the size of the batch, so it can be computed without running anything.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args, runtime_checkable

import psutil
import torch

from ctxlens.chat.roles import N_ROLES
from ctxlens.errors import InputError
from ctxlens.models.attention.fused import count_bias_columns, padded_width
from ctxlens.models.attention.sinks import SAMPLE_TILE_NUMBERS, SAMPLES
from ctxlens.models.attention.tiled import TILE, TILE_COPIES
from ctxlens.models.backends.protocol import Backend, DecoderCosts, LayerFacts, LayerPath, ModelShape

Task = Literal["read", "steer", "generate"]

_HOOK_COPIES = {"read": 3, "steer": 4, "generate": 4}
"""How many tensors as large as a layer's pattern exist at once in TransformerLens: scores, pattern, and the
results of the hooks."""

_FLOAT32 = 4
"""Bytes of a float32 number: explicit patterns and kept shares have this dtype."""

_SAMPLE_COPIES = 2
"""How many tensors as large as the pattern of the sampled queries exist at once: scores, and pattern."""

ROW_NAMES = (
    "weights", "hidden states", "attention", "feed-forward", "logits", "mask", "cache", "kept", "run",
    "total", "plain forward", "eager patterns", "lens cache",
)  # fmt: skip
"""The rows of a forecast's table, in their order."""

_MOST_AT_ONCE = 4096
"""The largest batch that `fit_batch_tokens` considers."""


@runtime_checkable
class Forecastable(Protocol):
    """What a forecast needs of a `ctxlens.Model`."""

    @property
    def backend(self) -> Backend:
        """How the model is run."""
        ...


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes that a run needs; everything but `weights` comes on top of a loaded model.

    Attention, feed-forward and logits are computed one after the other, so the largest of them counts.

    Attributes:
        what: `read` (role shares), `steer` (a steered forward pass with logits at all positions) or
            `generate` (a prompt and `new_tokens` tokens after it, with cache).
        batch: conversations in one forward pass.
        length: tokens of the longest conversation, to which the others are padded.
        new_tokens: tokens to generate.
        dtype: of weights and activations.
        paths: by layer, how attention is computed: `fused`, `tiled`, `hooks` (TransformerLens), or `plain`
            (the layer is neither read nor steered).
        weights: parameters and buffers, as they are now.
        resident: hidden states that exist through a whole layer.
        attention: the largest layer's queries, keys, values and what reading or steering adds to them.
        feed_forward: the intermediate results of one feed-forward layer.
        logits: the logits of the positions that are wanted.
        mask: attention masks, where causality alone is not enough (sliding windows, left padding).
        cache: keys and values at the end of a generation.
        kept: the role shares that are the result.
        plain: for comparison, the model's own forward pass over the same batch, without cache.
        eager: for comparison, reading all layers by eager `output_attentions`.
        lens_cache: for comparison, reading patterns by TransformerLens' `run_with_cache`.
    """

    what: Task
    batch: int
    length: int
    new_tokens: int
    dtype: str
    paths: tuple[str, ...]
    weights: int
    resident: int
    attention: int
    feed_forward: int
    logits: int
    mask: int
    cache: int
    kept: int
    plain: int
    eager: int
    lens_cache: int

    @property
    def run(self) -> int:
        """The peak beyond the weights."""
        largest = max(self.attention, self.feed_forward, self.logits)
        return self.resident + largest + self.mask + self.cache + self.kept

    @property
    def total(self) -> int:
        """The peak with the weights."""
        return self.weights + self.run

    def table(self) -> tuple[tuple[str, int, str], ...]:
        """Rows of name, bytes and one sentence; rows with 0 bytes are left out."""
        paths = ", ".join(f"{self.paths.count(path)} {path}" for path in dict.fromkeys(self.paths))
        rows = (
            (self.weights, f"{self.dtype}, as loaded"),
            (self.resident, "exist through a whole layer"),
            (self.attention, f"the largest of the layers ({paths})"),
            (self.feed_forward, "of one layer"),
            (self.logits, "of the positions that are wanted"),
            (self.mask, "needed for sliding windows or left padding"),
            (self.cache, f"keys and values of {self.length + self.new_tokens} tokens"),
            (self.kept, "the role shares that are the result"),
            (
                self.run,
                "peak beyond the weights; only the largest of attention, feed-forward and logits counts",
            ),
            (self.total, "peak with the weights"),
            (self.plain, "for comparison: the model's own forward pass, beyond the weights"),
            (self.eager, "for comparison: eager output_attentions of all layers"),
            (self.lens_cache, "for comparison: TransformerLens' run_with_cache, patterns only"),
        )
        return tuple((name, *row) for name, row in zip(ROW_NAMES, rows, strict=True) if row[0])


def forecast_memory(
    model: Forecastable,
    *,
    length: int,
    batch: int = 1,
    what: Task | str = "read",
    layers: Sequence[int] | None = None,
    queries: int = 1,
    new_tokens: int = 0,
    sinks: bool = True,
) -> MemoryForecast:
    """Forecast the memory of one forward pass or generation. Nothing is run.

    Compared with peaks measured on a CPU, the forecast is within a factor of 1.25 for the families tested,
    and within 1.5 for TransformerLens hooks. Memory that an allocator keeps for later use is not included:
    in one measurement glibc held 1.9 times the tensors' peak. Nor are the cached prefixes that `generate`
    keeps for prompts that are read later: the cache of one prompt for each text that several prompts share.
    If the weights are on several devices, the forecast is the sum over them.

    Args:
        model: a loaded `ctxlens.Model`.
        length: tokens of the longest conversation.
        batch: conversations in one forward pass.
        what: `read`, `steer` or `generate`; see `MemoryForecast`.
        layers: the layers read or steered, all by default.
        queries: positions read in every conversation (`read`).
        new_tokens: tokens to generate (`generate`).
        sinks: whether attention sinks are measured too (`read`), as `Model.read_roles` does by default.

    Raises:
        InputError: sizes below 1, an unknown task, layers that do not exist.
    """
    shape = model.backend.shape
    wanted = frozenset(range(shape.n_layers) if layers is None else layers)
    _check_request(shape, what, wanted, length=length, batch=batch, queries=queries, new_tokens=new_tokens)
    run = _Run(
        shape=shape,
        costs=model.backend.costs(),
        dtype=model.backend.dtype,
        layers=model.backend.layers,
        what=cast(Task, what),
        batch=batch,
        length=length,
        new_tokens=new_tokens,
        sinks=sinks and what == "read",
    )
    paths = run.paths(wanted)
    own = run.attention("eager" if run.costs.is_eager else "plain", "read")
    every_pattern = run.resident + run.feed_forward + run.pattern_numbers * shape.n_layers * run.bytes
    return MemoryForecast(
        what=run.what,
        batch=batch,
        length=length,
        new_tokens=new_tokens,
        dtype=str(run.dtype).removeprefix("torch."),
        paths=paths,
        weights=run.costs.weights,
        resident=run.resident,
        attention=max(run.attention(path, run.what) for path in set(paths)),
        feed_forward=run.feed_forward,
        logits=run.logits,
        mask=run.mask,
        cache=run.cache,
        kept=run.kept(len(wanted), queries),
        plain=run.resident + max(own, run.feed_forward) + run.mask,
        eager=every_pattern + run.pattern_numbers * _FLOAT32,
        lens_cache=every_pattern + run.pattern_numbers * 2 * run.bytes,
    )


def _check_request(
    shape: ModelShape,
    what: str,
    layers: frozenset[int],
    *,
    length: int,
    batch: int,
    queries: int,
    new_tokens: int,
) -> None:
    """Refuse a request that no run could fulfil."""
    if what not in get_args(Task):
        raise InputError(f"unknown task {what!r} to forecast; choose one of {', '.join(get_args(Task))}.")
    if min(length, batch) < 1 or min(queries, new_tokens) < 0:
        raise InputError(
            f"cannot forecast batch {batch}, length {length}, queries {queries}, new_tokens {new_tokens}; "
            "expected at least one token in at least one conversation, and no negative number."
        )
    if bad := sorted(layer for layer in layers if not 0 <= layer < shape.n_layers):
        raise InputError(f"layer {bad[0]} does not exist: the model has layers 0 to {shape.n_layers - 1}.")


@dataclass(frozen=True)
class _Run:
    """One forward pass or generation of a decoder. Properties are in bytes unless they say otherwise."""

    shape: ModelShape
    costs: DecoderCosts
    dtype: torch.dtype
    layers: tuple[LayerFacts, ...]
    what: Task
    batch: int
    length: int
    new_tokens: int
    sinks: bool

    def paths(self, wanted: frozenset[int]) -> tuple[LayerPath, ...]:
        """By layer, how attention is computed if some layers are read or steered."""
        return tuple(
            facts.path if facts.layer in wanted or facts.path == "hooks" else "plain" for facts in self.layers
        )

    @property
    def bytes(self) -> int:
        """Of one number in the model's dtype."""
        return self.dtype.itemsize

    @property
    def tokens(self) -> int:
        """Number of tokens in the batch, padding included."""
        return self.batch * self.length

    @property
    def pattern_numbers(self) -> int:
        """Numbers in the attention patterns of one layer."""
        return self.shape.n_heads * self.tokens * self.length

    @property
    def resident(self) -> int:
        """Hidden states and rotary positions, two copies of each."""
        return 2 * self.tokens * (self.shape.d_model + self.shape.d_head) * self.bytes

    @property
    def feed_forward(self) -> int:
        """Input, output and intermediate results of a feed-forward layer."""
        return self.tokens * (2 * self.shape.d_model + self.costs.feed_forward) * self.bytes

    @property
    def logits(self) -> int:
        """All positions when steering, the last ones when generating, none when reading."""
        positions = {"read": 0, "steer": self.tokens, "generate": self.batch}[self.what]
        return positions * self.shape.d_vocab * self.bytes

    @property
    def mask(self) -> int:
        """One mask for sliding windows and one for left padding, one byte per entry."""
        is_windowed = any(facts.window is not None and facts.window < self.length for facts in self.layers)
        is_padded = self.what == "generate" and self.batch > 1
        return self.tokens * self.length * (is_windowed + is_padded)

    @property
    def cache(self) -> int:
        """Keys and values at the end of a generation.

        A sliding layer's cache is a view of the whole prompt's keys until the first new token comes.
        """
        if self.what != "generate":
            return 0
        ends = (min(self.length + self.new_tokens, facts.window or math.inf) for facts in self.layers)
        positions = sum(max(self.length, end) for end in ends)
        return int(2 * self.batch * positions * self.shape.n_key_value_heads * self.shape.d_head * self.bytes)

    def kept(self, n_layers: int, queries: int) -> int:
        """The role shares of a read-out."""
        if self.what != "read":
            return 0
        parts = 2 if self.sinks else 1  # the shares, and what of them rests on sinks
        return parts * n_layers * self.batch * self.shape.n_heads * queries * N_ROLES * _FLOAT32

    def sampled(self, path: str) -> int:
        """What finding the sinks of one layer takes: the pattern of the sampled queries, and float32 keys."""
        one_query = self.batch * self.shape.n_heads * self.length
        if path == "hooks":
            return min(SAMPLES, self.length) * one_query * _FLOAT32
        rows = max(1, min(SAMPLE_TILE_NUMBERS // one_query, SAMPLES, self.length))
        copied = self.tokens * self.shape.n_key_value_heads * self.shape.d_head * _FLOAT32
        copies = TILE_COPIES if path == "tiled" else _SAMPLE_COPIES
        return rows * one_query * _FLOAT32 * copies + (copied if self.bytes < _FLOAT32 else 0)

    def attention(self, path: str, what: Task) -> int:
        """The intermediate results of one layer's attention, by path, including the layer's normed input."""
        heads, kv_heads, d_head = self.shape.n_heads, self.shape.n_key_value_heads, self.shape.d_head
        base = self.tokens * (self.shape.d_model + (heads + 2 * kv_heads) * d_head) * self.bytes
        rotary = self.tokens * 3 * heads * d_head * self.bytes
        output = self.tokens * heads * d_head * self.bytes
        kernel_mask = self.tokens * self.length * self.bytes if self.mask else 0
        if path == "fused":
            # With sinks there is a column per group of keys that occurs, seldom more than there are roles.
            added = N_ROLES - 1 if what == "read" else count_bias_columns(self.dtype)
            columns = self.tokens * 2 * (heads + kv_heads) * padded_width(d_head + added) * self.bytes
            working = columns + kernel_mask
        elif path == "tiled":
            tile = self.pattern_numbers * _FLOAT32 * min(TILE, self.length) // self.length
            wide_keys = self.tokens * kv_heads * d_head * _FLOAT32
            working = tile * TILE_COPIES + 2 * output + wide_keys
        elif path == "hooks":
            working = self.pattern_numbers * _FLOAT32 * _HOOK_COPIES[what]
        elif path == "eager":
            working = self.pattern_numbers * 2 * _FLOAT32
        else:
            working = 2 * output + kernel_mask
        found = self.sampled(path) if self.sinks and path in get_args(LayerPath) and path != "plain" else 0
        if path == "hooks":
            return base + max(rotary, working + found)
        return base + max(rotary, working, found)


def fit_batch_tokens(
    model: Forecastable,
    memory_bytes: int,
    length: int,
    *,
    what: Task | str = "read",
    queries: int = 1,
    sinks: bool = True,
) -> int:
    """The largest `batch_tokens` whose forward passes fit into some memory beyond the weights.

    Args:
        model: a loaded `ctxlens.Model`.
        memory_bytes: what the run may use; see `free_memory`.
        length: tokens of the longest conversation.
        what: `read`, `steer` or `generate`.
        queries: positions read in every conversation.
        sinks: see `forecast_memory`.

    Returns:
        Padded tokens of one forward pass, a multiple of `length`, for at most 4,096 conversations.

    Raises:
        InputError: not even one conversation of this length fits.
    """

    def need(batch: int) -> int:
        options = {"length": length, "batch": batch, "what": what, "queries": queries, "sinks": sinks}
        return forecast_memory(model, **options).run

    fitting = bisect_right(range(1, _MOST_AT_ONCE + 1), memory_bytes, key=need)
    if not fitting:
        raise InputError(
            f"one conversation of {length} tokens needs about {need(1) / 1e9:.2f} GB beyond the weights, but "
            f"{memory_bytes / 1e9:.2f} GB are free; shorten it, read fewer positions or use another device."
        )
    return length * fitting


def free_memory(device: torch.device | str) -> int:
    """Bytes that a run on this device could still allocate."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


__all__ = ["ROW_NAMES", "MemoryForecast", "fit_batch_tokens", "forecast_memory", "free_memory"]
