"""Every way to the same numbers: a plain forward pass, ours, and the peers that store patterns.

Only TransformerLens computes logits, with a head that is small here (a vocabulary of 1,024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ctxlens.chat.roles import N_ROLES
from ctxlens.models.attention.resting import SinkReader
from ctxlens.models.attention.shares import compute_role_shares
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.native import attend
from ctxlens.models.backends.native.layers import find_decoder_layers, note_hidden_states
from experiments.bench_readout.presets import Preset
from experiments.bench_readout.subject import Subject, make_batch, response_rows

ALPHA = 0.5
Run = Callable[[], Tensor | None]


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        label: for tables and figures.
        kind: `floor`, `ours` or `peer`.
        make: takes subject and length, and returns a function that runs the way once. It returns the shares
            `[layer, head, query, role]` if the way reads any.
        tensors: the least number of tensors of size head x length x length in memory at once (in every layer,
            and in one layer more). None if no such tensor exists.
        package: the package that the way needs beyond those of ctxlens.
    """

    label: str
    kind: str
    make: Callable[[Subject, int], Run]
    tensors: tuple[int, int] | None = None
    package: str = ""

    def missing(self) -> str:
        """Why the way cannot run here; empty if it can."""
        if not self.package or find_spec(self.package) is not None:
            return ""
        return f"the package {self.package} is not installed"

    def forecast_bytes(self, preset: Preset, length: int) -> int:
        """The least memory for the patterns at a length; 0 for ways without patterns."""
        if self.tensors is None:
            return 0
        every_layer, one_layer = self.tensors
        itemsize = getattr(torch, preset.dtype).itemsize
        copies = every_layer * preset.n_layers + one_layer
        return copies * preset.n_heads * length**2 * itemsize


def plain(subject: Subject, length: int) -> Run:
    tokens = make_batch(subject.preset, length).tokens

    def run() -> None:
        subject.model.base_model(input_ids=tokens, use_cache=False)

    return run


def read_native(rows: Callable[[int], int]) -> Callable[[Subject, int], Run]:
    """Ours over the whole forward pass, keeping the last `rows(length)` queries of every layer and head."""

    def make(subject: Subject, length: int) -> Run:
        batch = make_batch(subject.preset, length)
        queries = torch.arange(length - rows(length), length, device=batch.tokens.device)[None]
        layers = range(subject.preset.n_layers)
        model = subject.backend.hf_model

        def run() -> Tensor:
            with attend(model, batch, layers=layers, queries=queries) as attending:
                model.base_model(input_ids=batch.tokens, use_cache=False)
            return torch.stack([attending.collected[layer][0] for layer in layers])

        return run

    return make


def read_sinks(rows: Callable[[int], int]) -> Callable[[Subject, int], Run]:
    """As `read_native`, with the sinks of every layer found in the same pass."""

    def make(subject: Subject, length: int) -> Run:
        batch = make_batch(subject.preset, length)
        queries = torch.arange(length - rows(length), length, device=batch.tokens.device)[None]
        layers = range(subject.preset.n_layers)
        model = subject.backend.hf_model
        entries = find_decoder_layers(model, subject.preset.n_layers)

        def run() -> Tensor:
            sinks = SinkReader.of_texts(batch.role_ids)
            asked = {"layers": layers, "queries": queries, "keep": "resting", "sinks": sinks}
            with attend(model, batch, **asked) as attending, note_hidden_states(entries, sinks.enter):
                model.base_model(input_ids=batch.tokens, use_cache=False)
            return torch.stack([attending.collected[layer][0, 0] for layer in layers])

        return run

    return make


def read_half(subject: Subject, length: int) -> Run:
    """Ours up to half depth, where the forward pass ends."""
    batch = make_batch(subject.preset, length)
    queries = torch.arange(length - response_rows(length), length, device=batch.tokens.device)[None]
    layers = range(subject.preset.n_layers // 2)

    def run() -> Tensor:
        return subject.backend.read_shares(batch, layers, queries, ())[0]

    return run


def read_eager(subject: Subject, length: int) -> Run:
    """transformers' eager attention with `output_attentions`, then reduce."""
    batch = make_batch(subject.preset, length)

    def run() -> Tensor:
        out = subject.eager.base_model(input_ids=batch.tokens, use_cache=False, output_attentions=True)
        reduced = [compute_role_shares(p, batch.role_ids, N_ROLES)[0] for p in out.attentions]
        return torch.stack(reduced).float().cpu()

    return run


def read_lens(subject: Subject, length: int) -> Run:
    """TransformerLens' `run_with_cache` on patterns, then reduce."""
    batch = make_batch(subject.preset, length)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(subject.preset.n_layers)]

    def run() -> Tensor:
        _, cache = subject.bridge.run_with_cache(batch.tokens, names_filter=names)
        reduced = [compute_role_shares(cache[name], batch.role_ids, N_ROLES)[0] for name in names]
        return torch.stack(reduced).float().cpu()

    return run


def read_nnsight(subject: Subject, length: int) -> Run:
    """nnsight's way: a trace of eager attention in which every layer's weights are reduced and saved."""
    import nnsight

    batch = make_batch(subject.preset, length)
    model = nnsight.NNsight(subject.eager.base_model)
    n_layers = subject.preset.n_layers

    def run() -> Tensor:
        with model.trace(batch.tokens, use_cache=False):
            reduced = nnsight.save([])
            for layer in range(n_layers):
                pattern = model.layers[layer].self_attn.output[1]
                reduced.append(compute_role_shares(pattern, batch.role_ids, N_ROLES)[0])
        return torch.stack(list(reduced)).float().cpu()

    return run


def read_inseq(subject: Subject, length: int) -> Run:
    """inseq's way: its attribution method `attention`, which keeps the weights of every layer and head."""
    import inseq

    batch = make_batch(subject.preset, length)
    tokenizer = subject.tokenizer
    model = inseq.load_model(subject.eager, "attention", tokenizer=tokenizer)
    text = tokenizer.decode(batch.tokens[0, :-1])
    whole = tokenizer.decode(batch.tokens[0])

    def run() -> None:
        model.attribute(text, whole, show_progress=False, pretty_progress=False)

    return run


def steered_heads(preset: Preset) -> tuple[tuple[int, int], ...]:
    """Every second head of every layer."""
    return tuple((layer, head) for layer in range(preset.n_layers) for head in range(0, preset.n_heads, 2))


def steer_native(subject: Subject, length: int) -> Run:
    batch = make_batch(subject.preset, length)
    steering = Steering(ALPHA, heads=steered_heads(subject.preset))
    model = subject.backend.hf_model

    def run() -> None:
        with attend(model, batch, steerings=[steering]):
            model.base_model(input_ids=batch.tokens, use_cache=False)

    return run


def steer_mask(subject: Subject, length: int) -> Run:
    """PASTA's way, written from its description: in the chosen heads of every layer, log(alpha) is added
    to the attention mask at all keys that are not emphasised; eager attention adds the mask to its scores."""
    batch = make_batch(subject.preset, length)
    heads = list(range(0, subject.preset.n_heads, 2))
    steering = Steering(ALPHA, mode="prompt-only")
    weakened = steering.key_bias(batch.role_ids, batch.prompt_tokens)[0] != 0
    model = subject.eager

    def edit(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs["attention_mask"].repeat(1, subject.preset.n_heads, 1, 1)
        bias = weakened.to(mask.dtype) * math.log(ALPHA)
        for head in heads:
            mask[:, head] += bias
        return args, kwargs | {"attention_mask": mask}

    @contextmanager
    def edited() -> Iterator[None]:
        hooks = [
            layer.self_attn.register_forward_pre_hook(edit, with_kwargs=True)
            for layer in model.base_model.layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def run() -> None:
        with edited():
            model.base_model(input_ids=batch.tokens, use_cache=False)

    return run


WAYS = {
    "plain": Way("SDPA, plain forward", "floor", plain),
    "read_all": Way("ctxlens, all rows", "ours", read_native(lambda length: length)),
    "read_response": Way("ctxlens, response rows", "ours", read_native(response_rows)),
    "read_answer": Way("ctxlens, one row", "ours", read_native(lambda length: 1)),
    "read_response_sinks": Way("ctxlens, response rows, with sinks", "ours", read_sinks(response_rows)),
    "read_answer_sinks": Way("ctxlens, one row, with sinks", "ours", read_sinks(lambda length: 1)),
    "read_half": Way("ctxlens, up to half depth", "ours", read_half),
    "read_eager": Way("eager output_attentions", "peer", read_eager, (1, 1)),
    "read_lens": Way("TransformerLens run_with_cache", "peer", read_lens, (1, 1)),
    "read_nnsight": Way("nnsight, trace of eager attention", "peer", read_nnsight, (0, 2), "nnsight"),
    "read_inseq": Way("inseq, attribution method attention", "peer", read_inseq, (1, 1), "inseq"),
    "steer": Way("ctxlens, steered", "ours", steer_native),
    "steer_mask": Way("PASTA's way: edited mask", "peer", steer_mask, (0, 3)),
}


def goal(name: str, device: str, length: int) -> float | None:
    """The largest ratio to the plain forward's time that meets the goal; None for ways without a goal."""
    if WAYS[name].kind != "ours":
        return None
    if name == "read_half":
        return 0.62
    if device == "cuda" or name == "read_answer_sinks":
        return 1.10
    return 1.15 if length <= 2048 else 1.25


__all__ = ["ALPHA", "WAYS", "Run", "Way", "goal", "steered_heads"]
