"""The model inside a trainer: found, and left as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ctxlens.errors import InputError


def find_decoder(trainer: Any) -> Any:
    """The transformers model that a trainer trains, without the wrappers of accelerate, torch and PEFT.

    The adapters of PEFT stay in effect: they are layers of the model itself.

    Raises:
        InputError: the trainer has no model; the model is split over processes (FSDP, ZeRO-3), or its
            adapter is not part of its layers (prompt tuning).
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if model is None:
        raise InputError("the trainer has no model; give it one.")
    if getattr(trainer, "is_fsdp_enabled", False) or _is_zero3(trainer):
        raise InputError(
            "ContextCallback cannot ask a model that FSDP or DeepSpeed ZeRO-3 splits over processes; use DDP "
            "or ZeRO-2, or audit the checkpoints (ctxlens audit)."
        )
    if not hasattr(model, "get_base_model"):
        return model
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise InputError(
                f"ContextCallback cannot ask a model with the adapter {name!r}, because prompt tuning puts "
                "tokens before every text; use LoRA, or leave the callback out."
            )
    return model.get_base_model()


def _is_zero3(trainer: Any) -> bool:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and getattr(plugin, "zero_stage", 0) == 3


def find_tokenizer(trainer: Any) -> Any:
    """The tokenizer of a trainer; of a processor, its tokenizer.

    Raises:
        InputError: there is none, or it has no chat template.
    """
    found = getattr(trainer, "processing_class", None)
    tokenizer = getattr(found, "tokenizer", found)
    if tokenizer is None or not hasattr(tokenizer, "chat_template"):
        raise InputError(
            "the trainer has no tokenizer, so nothing can be asked; give it one: "
            "Trainer(…, processing_class=tokenizer)."
        )
    if not tokenizer.chat_template:
        raise InputError(
            "the trainer's tokenizer has no chat template, so there is nothing to compare; set "
            "tokenizer.chat_template before the trainer is built (for a base model, that of its "
            "instruction-tuned version)."
        )
    return tokenizer


@contextmanager
def left_as_it_was(model: Any) -> Iterator[None]:
    """Ask a model that is being trained: afterwards it, the gradients and all random states are as before.

    Inside, the model is in evaluation mode, which switches gradient checkpointing and dropout off, and
    nothing is recorded for gradients. What a trainer has put in place of the model's own `forward` (mixed
    precision of accelerate, the fused head of TRL) is taken off for the time; `accelerator.autocast()`
    around the questions gives the mixed precision back.
    """
    modes = [(module, module.training) for module in model.modules()]
    states = _random_states()
    forward = None if hasattr(model, "_hf_hook") else model.__dict__.pop("forward", None)
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        if forward is not None:
            model.__dict__["forward"] = forward
        for module, was_training in modes:
            module.training = was_training
        _set_random_states(*states)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _random_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_states(python: Any, numpy: Any, cpu: Any, cuda: Any) -> None:
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


__all__ = ["find_decoder", "find_tokenizer", "left_as_it_was"]
