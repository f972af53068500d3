"""Refuses rows of several conversations in which one conversation would see another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ctxlens.errors import InputError

ALLOW = "allow_cross_sample_attention"
"""The recipe key that confirms it."""

_WARN = (
    "so that a conversation is trained with others as its context; {advice}, or confirm it with "
    f"{ALLOW}: true."
)
_LENGTH = 4
_CLOSE = 1e-4
"""A hidden state that changes by a smaller part of the largest one counts as unchanged."""


def check_strategy(args: Any, *, allowed: bool) -> None:
    """Refuse a `packing_strategy` with which every model sees across conversations.

    TRL's `wrapped` joins all rows and cuts them at `max_length`, and its batches say nothing about where a
    row begins. `bfd` and `bfd_split` restart the positions with every row, from which transformers builds a
    mask that separates them; `check_separation` checks that for the model.

    Args:
        args: TRL's `SFTConfig`.
        allowed: whether the recipe confirms it.

    Raises:
        InputError: it is not confirmed.
    """
    if args.packing and args.packing_strategy == "wrapped" and not allowed:
        advice = _WARN.format(advice="use packing_strategy: bfd, which separates them")
        raise InputError(f"packing_strategy: wrapped joins conversations without a border, {advice}")


def check_separation(trainer: Any) -> None:
    """Refuse a model that sees from one packed conversation into the one before it.

    Two short rows are packed as TRL packs them. If other tokens in the first row change the hidden states of
    the second, the model does not separate them. A model that DeepSpeed or FSDP will split is not asked,
    because it cannot be run before the training.

    Args:
        trainer: TRL's trainer, with padding-free batches.

    Raises:
        InputError: the model does not separate packed rows.
    """
    import torch

    weights = list(trainer.model.parameters())
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or any(one.is_meta for one in weights):
        return
    first, other = (_read_second(trainer, start) for start in (1, 1 + _LENGTH))
    if (first - other).abs().max() > _CLOSE * torch.maximum(first, other).abs().max():
        advice = _WARN.format(
            advice="use packing: false and padding_free: false, or another attn_implementation"
        )
        name = type(_causal_model(trainer)).__name__
        raise InputError(f"the model ({name}) does not separate the conversations of a packed row, {advice}")


def _read_second(trainer: Any, start: int) -> Any:
    """The hidden states of the second of two packed rows, of which the first begins with token `start`."""
    import torch

    model = _causal_model(trainer)
    rows = model.get_input_embeddings().weight.shape[0]
    first, second = range(start, start + _LENGTH), range(1 + 2 * _LENGTH, 1 + 3 * _LENGTH)
    ids = [number % rows for number in (*first, *second)]
    batch = trainer.data_collator([{"input_ids": ids, "labels": ids, "seq_lengths": [_LENGTH, _LENGTH]}])
    inputs = trainer._prepare_inputs({name: value for name, value in batch.items() if name != "labels"})
    with torch.no_grad(), _without_dropout(trainer.model), trainer.accelerator.autocast():
        return model.base_model(**inputs, use_cache=False)[0][0, _LENGTH : 2 * _LENGTH].float()


def _causal_model(trainer: Any) -> Any:
    """The transformers model, without an adapter around it."""
    model = trainer.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


__all__ = ["ALLOW", "check_separation", "check_strategy"]
