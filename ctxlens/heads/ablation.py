"""Switch heads off inside a `with` block, in either backend.

`zero` and `mean` replace the output of a head (its `z`, before the output projection) by zeros, or by its
mean over a reference. `blind` keeps the head active but hides the user's tokens from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.errors import InputError
from ctxlens.models import Model
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.batch import TokenBatch, plan_batches
from ctxlens.models.backends.protocol import HeadEdit

AblationKind = Literal["zero", "mean", "blind"]
BLINDING_ALPHA = 1e-300
"""Factor on the attention to the user's tokens in a blinded head: a bias of about -691 on their scores."""

Head = tuple[int, int]


@dataclass
class Ablation:
    """Ablation of heads of one model.

    Attributes:
        model: the model.
        means: the mean output of every head, for `mean`; from `read_means`.
    """

    model: Model
    means: Float[Tensor, "layer head d_head"] | None = None

    def read_means(
        self, chats: Sequence[RenderedChat], *, batch_tokens: int = 8192
    ) -> Float[Tensor, "layer head d_head"]:
        """Set `means` to every head's mean output over the positions of some conversations, and return them.

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

            with model.backend.edit_heads({layer: add(layer) for layer in range(shape.n_layers)}):
                model.backend.logits(batch, ())
        self.means = (total / count).float()
        return self.means

    @contextmanager
    def apply(self, heads: Iterable[Head], kind: AblationKind | str) -> Iterator[None]:
        """Switch heads off for the duration of the block.

        Args:
            heads: pairs of layer and head.
            kind: `zero`: the heads write nothing. `mean`: they write their mean output (call `read_means`
                first). `blind`: their attention skips the user's tokens and is renormalised over the others;
                a query that sees only user tokens attends to them as before.

        Raises:
            InputError: the kind is unknown, the model lacks a head, or the means were not read.
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
        with self.model.backend.edit_heads(
            {layer: _replace(at, written[layer, at]) for layer, at in by_layer.items()}
        ):
            yield


def _replace(heads: list[int], values: Tensor) -> HeadEdit:
    def edit(z: Tensor) -> Tensor:
        z = z.clone()
        z[..., heads, :] = values.to(z)
        return z

    return edit


def check_ablation(heads: Iterable[Head], kind: str, model: Model) -> tuple[Head, ...]:
    """The heads as pairs; raises `InputError` for an unknown kind or heads that the model lacks."""
    if kind not in get_args(AblationKind):
        raise InputError(f"unknown ablation {kind!r}; choose from {', '.join(get_args(AblationKind))}.")
    chosen = tuple(dict.fromkeys((int(layer), int(head)) for layer, head in heads))
    Steering(1.0, heads=chosen).check_heads(model.n_layers, model.n_heads)
    return chosen


__all__ = ["BLINDING_ALPHA", "Ablation", "AblationKind", "check_ablation"]
