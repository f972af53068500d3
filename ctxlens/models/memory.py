"""How much memory a run will need, before it starts.

A forward pass has a floor (weights, hidden states, what one layer works on) and what reading and steering
add to it: columns on queries, keys and values of one layer at a time, a mask where the model needs one, the
cache of a generation, and the shares that are kept. All of it follows from the model's shape, the paths
that its layers take and the size of the batch, so it can be said without running anything.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import psutil
import torch

from ctxlens.chat.roles import N_ROLES
from ctxlens.errors import InputError
from ctxlens.models.backends.protocol import ModelShape

Task = Literal["read", "steer", "generate"]
_TASKS = ("read", "steer", "generate")

_TILE = 256
_TILE_COPIES = 3
"""Scores, masked scores and pattern of a tile of queries are alive at once."""

_HOOK_COPIES = {"read": 3, "steer": 4, "generate": 4}
"""So are scores and pattern of a layer, and what a hook makes of them, in TransformerLens."""

ROW_NAMES = (
    "weights", "hidden states", "attention", "feed-forward", "logits", "mask", "cache", "kept", "run",
    "total", "plain forward", "eager patterns", "lens cache",
)  # fmt: skip
"""The rows of a forecast's table, in their order."""

_MOST_AT_ONCE = 4096
_UNFUSED_ACTIVATIONS = ("gelu_new", "gelu_fast", "quick_gelu")
_WIDTH_MULTIPLE = 8


@runtime_checkable
class Forecastable(Protocol):
    """What is needed of a `ctxlens.Model`."""

    @property
    def backend(self) -> Any:
        """How it is run."""
        ...


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes that a run needs; everything but `weights` comes on top of a loaded model.

    Attention, feed-forward and logits are worked on one after the other, so the largest of them counts.

    Attributes:
        what: `read` (role shares), `steer` (a steered forward pass with logits at all positions) or
            `generate` (a prompt and `new_tokens` tokens after it, with cache).
        batch: conversations in one forward pass.
        length: tokens of the longest, padding included.
        new_tokens: tokens to generate.
        dtype: of weights and activations.
        paths: by layer, how attention is computed: `fused`, `tiled`, `hooks` (TransformerLens), or `plain`
            (nothing is asked of this layer).
        weights: parameters and buffers, as they are now.
        resident: hidden states that live through a whole layer.
        attention: the largest layer's queries, keys, values and what reading or steering adds to them.
        feed_forward: what one feed-forward layer works on.
        logits: of the positions that are wanted.
        mask: attention masks, where causality alone is not enough (sliding windows, left padding).
        cache: keys and values of a generation, at its end.
        kept: the role shares that are the result.
        plain: for comparison, the model's own forward pass over the same batch, without cache.
        eager: for comparison, reading by eager `output_attentions`, all layers.
        lens_cache: for comparison, reading by TransformerLens' `run_with_cache`, patterns alone.
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
        """Rows of name, bytes and one sentence; what does not occur is left out."""
        paths = ", ".join(f"{self.paths.count(path)} {path}" for path in dict.fromkeys(self.paths))
        rows = (
            (self.weights, f"{self.dtype}, as loaded"),
            (self.resident, "alive through a whole layer"),
            (self.attention, f"largest of the layers ({paths})"),
            (self.feed_forward, "one layer's"),
            (self.logits, "of the positions that are wanted"),
            (self.mask, "sliding windows or left padding need one"),
            (self.cache, f"keys and values of {self.length + self.new_tokens} tokens"),
            (self.kept, "the shares that are the result"),
            (self.run, "peak beyond the weights; of attention, feed-forward, logits the largest counts"),
            (self.total, "peak with the weights"),
            (self.plain, "for comparison: the model's own forward pass, beyond the weights"),
            (self.eager, "for comparison: output_attentions of all layers"),
            (self.lens_cache, "for comparison: run_with_cache, patterns alone"),
        )
        return tuple((name, *row) for name, row in zip(ROW_NAMES, rows, strict=True) if row[0])


@dataclass(frozen=True)
class _Costs:
    """The sizes of a decoder that a forecast needs; `bytes` is of one number in its dtype."""

    shape: ModelShape
    bytes: int
    weights: int
    feed_forward: int
    windows: tuple[int | None, ...]
    paths: tuple[str, ...]
    eager: bool


def forecast_memory(
    model: Forecastable,
    *,
    length: int,
    batch: int = 1,
    what: Task | str = "read",
    layers: Sequence[int] | None = None,
    queries: int = 1,
    new_tokens: int = 0,
) -> MemoryForecast:
    """Forecast the memory of one forward pass or generation; runs nothing.

    Held against measured peaks on a CPU it is within a factor of 1.25 for the families tested, and within
    1.5 for TransformerLens hooks. What an allocator keeps for later use is not in it: glibc's held 1.9
    times the tensors' peak in one measurement. With weights on several devices it is the sum over them.

    Args:
        model: a loaded `ctxlens.Model`.
        length: tokens of the longest conversation.
        batch: conversations in one forward pass.
        what: `read`, `steer` or `generate`; see `MemoryForecast`.
        layers: the layers read or steered, all by default.
        queries: positions kept of every conversation (`read`).
        new_tokens: tokens to generate (`generate`).

    Raises:
        InputError: sizes below 1, an unknown task, layers that do not exist.
    """
    costs = _read_costs(model.backend)
    shape, size = costs.shape, costs.bytes
    if what not in _TASKS:
        raise InputError(f"unknown task {what!r} to forecast; choose one of {', '.join(_TASKS)}.")
    if min(length, batch) < 1 or min(queries, new_tokens) < 0:
        raise InputError(
            f"cannot forecast batch {batch}, length {length}, queries {queries}, new_tokens {new_tokens}; "
            "expected at least one token in at least one conversation, and no negative number."
        )
    wanted = range(shape.n_layers) if layers is None else layers
    if bad := [layer for layer in wanted if not 0 <= layer < shape.n_layers]:
        raise InputError(f"layer {bad[0]} does not exist: the model has layers 0 to {shape.n_layers - 1}.")
    paths = tuple(
        path if layer in wanted or path == "hooks" else "plain" for layer, path in enumerate(costs.paths)
    )
    tokens = batch * length
    windowed = any(window is not None and window < length for window in costs.windows)
    padded = what == "generate" and batch > 1
    mask = tokens * length * (windowed + padded)
    given = {"tokens": tokens, "length": length, "masked": bool(mask)}
    resident = 2 * tokens * shape.d_model * size + 2 * tokens * shape.d_head * size
    attention = max(_attention(costs, path, what, **given) for path in set(paths))
    plain_attention = _attention(costs, "eager" if costs.eager else "plain", "read", **given)
    feed_forward = int(tokens * (2 * shape.d_model + costs.feed_forward) * size)
    cached = sum(  # a sliding layer's cache is a view of the whole prompt's keys until the first new token
        max(length, min(length + new_tokens, w or math.inf)) for w in costs.windows if what == "generate"
    )
    positions = {"read": 0, "steer": tokens, "generate": batch}[what]
    patterns = shape.n_heads * tokens * length
    plain = resident + max(plain_attention, feed_forward) + mask
    return MemoryForecast(
        what=what,  # pyright: ignore[reportArgumentType]
        batch=batch,
        length=length,
        new_tokens=new_tokens,
        dtype=str(model.backend.dtype).removeprefix("torch."),
        paths=paths,
        weights=costs.weights,
        resident=resident,
        attention=attention,
        feed_forward=feed_forward,
        logits=positions * shape.d_vocab * size,
        mask=mask,
        cache=int(2 * batch * cached * shape.n_key_value_heads * shape.d_head * size),
        kept=len(wanted) * batch * shape.n_heads * queries * N_ROLES * 4 if what == "read" else 0,
        plain=plain,
        eager=resident + feed_forward + patterns * (shape.n_layers * size + 4),
        lens_cache=resident + feed_forward + patterns * (shape.n_layers * size + 2 * size),
    )


def fit_batch_tokens(
    model: Forecastable, memory_bytes: int, length: int, *, what: Task | str = "read", queries: int = 1
) -> int:
    """The largest `batch_tokens` whose forward passes stay within some memory beyond the weights.

    Args:
        model: a loaded `ctxlens.Model`.
        memory_bytes: what the run may use; see `free_memory`.
        length: tokens of the longest conversation.
        what: `read`, `steer` or `generate`.
        queries: positions kept of every conversation.

    Returns:
        Padded tokens of one forward pass, a multiple of `length`; at most 4,096 conversations.

    Raises:
        InputError: not even one conversation of this length fits.
    """

    def need(batch: int) -> int:
        return forecast_memory(model, length=length, batch=batch, what=what, queries=queries).run

    fitting = bisect_right(range(1, _MOST_AT_ONCE + 1), memory_bytes, key=need)
    if not fitting:
        raise InputError(
            f"one conversation of {length} tokens needs about {need(1) / 1e9:.2f} GB beyond the weights, but "
            f"{memory_bytes / 1e9:.2f} GB are free; shorten it, read fewer positions or take another device."
        )
    return length * fitting


def free_memory(device: torch.device | str) -> int:
    """Bytes that a run on this device could still take."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """By layer of a transformers decoder, how many tokens its sliding window holds; None: all are seen."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None:
        return (None,) * config.num_hidden_layers
    if kinds is None:
        return (int(window),) * config.num_hidden_layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def _attention(costs: _Costs, path: str, what: str, *, tokens: int, length: int, masked: bool) -> int:
    """What one layer's attention works on, by path; the layer's normed input is part of it."""
    shape, size = costs.shape, costs.bytes
    heads, kv_heads, d_head = shape.n_heads, shape.n_key_value_heads, shape.d_head
    patterns = heads * tokens * length
    base = tokens * (shape.d_model + (heads + 2 * kv_heads) * d_head) * size
    rotary = tokens * 3 * heads * d_head * size
    output = tokens * heads * d_head * size
    kernel_mask = tokens * length * size if masked else 0
    if path == "fused":
        width = d_head + (N_ROLES - 1 if what == "read" else 1 if size == 4 else 3)
        width = _WIDTH_MULTIPLE * math.ceil(width / _WIDTH_MULTIPLE)
        columns = tokens * 2 * (heads + kv_heads) * width * size
        return base + max(rotary, columns + kernel_mask)
    if path == "tiled":
        tile = patterns * 4 * min(_TILE, length) // length
        return base + max(rotary, tile * _TILE_COPIES + 2 * output + tokens * kv_heads * d_head * 4)
    if path == "hooks":
        return base + max(rotary, patterns * 4 * _HOOK_COPIES[what])
    if path == "eager":
        return base + max(rotary, patterns * 8)
    return base + max(rotary, 2 * output + kernel_mask)


def _read_costs(backend: Any) -> _Costs:
    shape: ModelShape = backend.shape
    hf_model = getattr(backend, "hf_model", None)
    if hf_model is None:
        cfg = backend.lens_model.cfg
        d_mlp = getattr(cfg, "d_mlp", None) or 4 * shape.d_model
        experts = (getattr(cfg, "experts_per_token", None) or 1) if getattr(cfg, "num_experts", None) else 1
        activation = str(getattr(cfg, "act_fn", ""))
        windows: tuple[int | None, ...] = (None,) * shape.n_layers
        paths: tuple[str, ...] = ("hooks",) * shape.n_layers
        eager, module = True, backend.lens_model
    else:
        config = hf_model.config.get_text_config()
        names = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
        d_mlp = next((n for name in names if (n := getattr(config, name, None))), 4 * shape.d_model)
        experts = getattr(config, "num_experts_per_tok", None) or 1
        names = ("hidden_activation", "hidden_act", "activation_function")
        activation = str(next((a for name in names if (a := getattr(config, name, None))), ""))
        windows = layer_windows(hf_model.config)
        paths = tuple(backend.paths[layer] for layer in range(shape.n_layers))
        eager, module = config._attn_implementation == "eager", hf_model
    copies = _activation_copies(module, activation)
    feed_forward = copies * experts * d_mlp + (3 * experts * shape.d_model if experts > 1 else 0)
    size = backend.dtype.itemsize
    return _Costs(shape, size, _weigh(module), feed_forward, windows, paths, eager)


def _activation_copies(module: torch.nn.Module, activation: str) -> int:
    """How many tensors as wide as the feed-forward layer are alive at once, as measured."""
    if getattr(getattr(module, "config", None), "swiglu_limit", None) is not None:
        return 8  # gpt-oss clamps, shifts and gates in single steps
    if activation in _UNFUSED_ACTIVATIONS:
        return 6
    return 4 if any(name.endswith("gate_up_proj.weight") for name, _ in module.named_parameters()) else 3


def _weigh(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers; shared storages count once, those not loaded not at all."""
    storages = {}
    for x in (*module.parameters(), *module.buffers()):
        if x.device.type != "meta":
            storage = x.untyped_storage()
            storages[x.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


__all__ = [
    "ROW_NAMES",
    "MemoryForecast",
    "fit_batch_tokens",
    "forecast_memory",
    "free_memory",
    "layer_windows",
]
