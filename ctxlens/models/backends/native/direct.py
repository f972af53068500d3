"""Decoders that call torch's fused attention directly instead of through `AttentionInterface` (Falcon)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

Attention = Callable[..., tuple[Tensor, None]]


def calls_directly(model: PreTrainedModel) -> bool:
    """Whether a model declares that it uses torch's fused call but not transformers' `AttentionInterface`."""
    return bool(model._supports_sdpa) and not getattr(model, "_supports_attention_backend", True)


class _Catch(TorchFunctionMode):
    """Redirects the fused calls of attention modules to another function, together with the calling module.

    In nested blocks only the innermost one redirects. Fused calls that its function makes are not redirected.
    """

    answering = False

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.inside: list[nn.Module] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention or not self.inside or _Catch.answering:
            return func(*args, **(kwargs or {}))
        _Catch.answering = True
        try:
            return self._attend(*args, **(kwargs or {}))
        finally:
            _Catch.answering = False

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        output, _ = self.attention(self.inside[-1], query, key, value, attn_mask, dropout_p, scale, is_causal)
        return output.transpose(1, 2)


@contextmanager
def catch_direct_calls(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Inside the block, let an attention function answer the fused calls that a model's modules make.

    Args:
        model: a decoder whose attention modules have a `layer_idx`.
        attention: a function with the arguments of an `AttentionInterface` function.
    """
    catch = _Catch(attention)

    def enter(module: nn.Module, args: Any) -> None:
        catch.inside.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        catch.inside.pop()

    hooks = []
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with catch:
            yield
    finally:
        for hook in hooks:
            hook.remove()


__all__ = ["calls_directly", "catch_direct_calls"]
