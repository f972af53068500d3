"""Switching heads off, for the time of a `with` block, in either backend.

`zero` and `mean` replace what a head writes (its `z`, before the output projection) by nothing, or by its
mean over a reference; `blind` leaves the head at work but takes the user's tokens out of its sight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.errors import InputError, UnsupportedModelError
from ctxlens.models import Model
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.batch import TokenBatch, plan_batches
from ctxlens.models.backends.protocol import Backend

AblationKind = Literal["zero", "mean", "blind"]
BLINDING_ALPHA = 1e-300
"""Factor on the attention to the user's tokens in a blinded head: a bias of about -691 on their scores."""

Head = tuple[int, int]
HeadEdit = Callable[[Float[Tensor, "batch pos head d_head"]], Float[Tensor, "batch pos head d_head"]]
"""Takes what the heads of a layer write, gives what they shall have written."""


class HeadOutputs:
    """What the heads of a model write, to be read or replaced before the output projection."""

    def __init__(self, backend: Backend) -> None:
        """Find the place in every layer.

        Raises:
            UnsupportedModelError: there is none that is told apart surely.
        """
        self.backend = backend
        self._projections: dict[int, torch.nn.Module] = {}
        model: Any = backend
        if backend.name == "lens":
            hooks = model.lens_model.hook_dict
            if missing := [n for n in map(_z_hook, range(backend.shape.n_layers)) if n not in hooks]:
                raise UnsupportedModelError(f"TransformerLens offers no hook {missing[0]} for this model.")
        else:
            self._projections = find_output_projections(model.hf_model, backend.shape.n_layers, self._width)

    @property
    def _width(self) -> int:
        return self.backend.shape.n_heads * self.backend.shape.d_head

    @contextmanager
    def edited(self, edits: Mapping[int, HeadEdit]) -> Iterator[None]:
        """Put the heads' outputs of some layers through functions, in every forward pass of the block."""
        if self.backend.name == "lens":
            model: Any = self.backend
            hooks = [(_z_hook(layer), self._lens_hook(layer, edit)) for layer, edit in edits.items()]
            with model.lens_model.hooks(fwd_hooks=hooks):
                yield
            return
        with contextlib.ExitStack() as stack:
            for layer, edit in edits.items():
                handle = self._projections[layer].register_forward_pre_hook(self._native_hook(edit))
                stack.callback(handle.remove)
            yield

    def _lens_hook(self, layer: int, edit: HeadEdit) -> Callable[..., Tensor]:
        shape = self.backend.shape

        def hook(z: Tensor, hook: Any) -> Tensor:
            if z.shape[-2:] != (shape.n_heads, shape.d_head):
                raise UnsupportedModelError(
                    f"{_z_hook(layer)} has shape {tuple(z.shape)}; expected [batch, pos, {shape.n_heads}, "
                    f'{shape.d_head}]; try backend="native".'
                )
            return edit(z)

        return hook

    def _native_hook(self, edit: HeadEdit) -> Callable[..., tuple[Tensor, ...]]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0]
            return edit(z.unflatten(-1, (self.backend.shape.n_heads, -1))).reshape(z.shape), *args[1:]

        return hook


def _z_hook(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


def find_output_projections(
    hf_model: torch.nn.Module, n_layers: int, width: int
) -> dict[int, torch.nn.Module]:
    """The output projection of every layer's attention, by layer, told by its place and not by its name.

    In the attention module of a layer (the one with `layer_idx` and `is_causal`), it is the last projection
    that a forward pass calls, and it takes all heads' outputs side by side.

    Args:
        hf_model: a transformers decoder.
        n_layers: how many layers it has.
        width: number of heads times their width.

    Raises:
        UnsupportedModelError: a layer has no such projection.
    """
    last: dict[int, torch.nn.Module] = {}
    handles: list[Any] = []

    def note(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            last[layer] = module

        return hook

    for module in hf_model.modules():
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or not hasattr(module, "is_causal"):
            continue
        for child in module.modules():
            weight = getattr(child, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2:  # a Linear or a Conv1D
                handles.append(child.register_forward_pre_hook(note(layer)))
    sizes: dict[int, int] = {}

    def measure(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            sizes[layer] = args[0].shape[-1]

        return hook

    try:
        tokens = torch.zeros(1, 2, dtype=torch.long, device=next(hf_model.parameters()).device)
        with torch.no_grad():
            hf_model(input_ids=tokens, use_cache=False)
            handles += [m.register_forward_pre_hook(measure(layer)) for layer, m in last.items()]
            hf_model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for layer in range(n_layers):
        if sizes.get(layer) != width:
            found = f"it takes {sizes[layer]} features" if layer in sizes else "there is none"
            raise UnsupportedModelError(
                f"the output projection of layer {layer} of {type(hf_model).__name__} cannot be told "
                f'({found}; expected {width}, all heads side by side); try backend="lens".'
            )
    return last


@dataclass
class Ablation:
    """Heads of one model, to be switched off.

    Attributes:
        model: the model.
        means: the mean output of every head, for `mean`; from `read_means`.
    """

    model: Model
    means: Float[Tensor, "layer head d_head"] | None = None
    _outputs: HeadOutputs | None = field(default=None, repr=False)

    @property
    def outputs(self) -> HeadOutputs:
        """The places of the heads' outputs, found when they are first needed."""
        if self._outputs is None:
            self._outputs = HeadOutputs(self.model.backend)
        return self._outputs

    def read_means(
        self, chats: Sequence[RenderedChat], *, batch_tokens: int = 8192
    ) -> Float[Tensor, "layer head d_head"]:
        """Set `means` to every head's mean output over all positions of a reference, and return them.

        Raises:
            InputError: no conversations were given.
        """
        if not chats:
            raise InputError("mean ablation needs conversations to take the heads' mean output from.")
        model, shape = self.model, self.model.backend.shape
        total = torch.zeros(shape.n_layers, shape.n_heads, shape.d_head, dtype=torch.float64)
        count = 0
        for indices in plan_batches([len(chat.tokens) for chat in chats], batch_tokens):
            batch = TokenBatch.from_chats(
                [chats[i] for i in indices], pad_id=0, side="right", device=model.device
            )
            real = batch.attention_mask.bool()
            count += int(real.sum())

            def add(layer: int, real: Tensor = real) -> HeadEdit:
                def edit(z: Tensor) -> Tensor:
                    total[layer] += z[real.to(z.device)].double().sum(0).cpu()
                    return z

                return edit

            with self.outputs.edited({layer: add(layer) for layer in range(shape.n_layers)}):
                model.backend.logits(batch, ())
        self.means = (total / count).float()
        return self.means

    @contextmanager
    def apply(self, heads: Iterable[Head], kind: AblationKind | str) -> Iterator[None]:
        """Switch heads off for the time of the block.

        Args:
            heads: pairs of layer and head.
            kind: `zero`: they write nothing; `mean`: they write their mean output (`read_means` first);
                `blind`: their attention leaves out the user's tokens and is renormalised over the others;
                where a query sees nothing but user tokens, it attends to them as before.

        Raises:
            InputError: an unknown kind, heads that the model does not have, or no means.
        """
        chosen = check_ablation(heads, kind, self.model)
        if kind == "blind":
            others = tuple(role for role in Role if role != Role.USER)
            with self.model.steer(BLINDING_ALPHA, roles=others, heads=chosen):
                yield
            return
        if kind == "mean" and self.means is None:
            raise InputError("mean ablation needs the heads' mean outputs; call read_means first.")
        written = torch.zeros(self.model.n_layers, self.model.n_heads, 1) if kind == "zero" else self.means
        assert written is not None
        by_layer: dict[int, list[int]] = {}
        for layer, head in chosen:
            by_layer.setdefault(layer, []).append(head)
        with self.outputs.edited({layer: _replace(at, written[layer, at]) for layer, at in by_layer.items()}):
            yield


def _replace(heads: list[int], values: Tensor) -> HeadEdit:
    def edit(z: Tensor) -> Tensor:
        z = z.clone()
        z[..., heads, :] = values.to(z)
        return z

    return edit


def check_ablation(heads: Iterable[Head], kind: str, model: Model) -> tuple[Head, ...]:
    """The heads as pairs; `InputError` for an unknown kind or heads that the model does not have."""
    if kind not in get_args(AblationKind):
        raise InputError(f"unknown ablation {kind!r}; choose of {', '.join(get_args(AblationKind))}.")
    chosen = tuple(dict.fromkeys((int(layer), int(head)) for layer, head in heads))
    Steering(1.0, heads=chosen).check_heads(model.n_layers, model.n_heads)
    return chosen


__all__ = [
    "BLINDING_ALPHA", "Ablation", "AblationKind", "HeadEdit", "HeadOutputs", "check_ablation",
    "find_output_projections",
]  # fmt: skip
