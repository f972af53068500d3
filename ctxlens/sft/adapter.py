"""LoRA and QLoRA through PEFT, with the indicator's row trained and saved beside the adapter."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctxlens.errors import InputError, first_line

ADAPTER = "adapter"
"""Folder of the adapter inside a run's folder, which itself holds the merged checkpoint."""


def check_model_arguments(model_args: Any) -> None:
    """Refuse model arguments whose packages or hardware are not here.

    Args:
        model_args: TRL's `ModelConfig`.

    Raises:
        InputError: no PEFT for an adapter; quantization without adapter, bitsandbytes or CUDA.
    """
    import torch

    if model_args.use_peft and importlib.util.find_spec("peft") is None:
        raise InputError(
            'use_peft needs the package peft; install it with pip install "ctxlens-interp[lora]".'
        )
    quantized = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(model_args, name)]
    if not quantized:
        return
    if not model_args.use_peft:
        raise InputError(f"{quantized[0]} works only with an adapter; set use_peft: true, or leave it out.")
    missing = [
        name
        for name, is_here in (
            ("the package bitsandbytes", importlib.util.find_spec("bitsandbytes") is not None),
            ("a CUDA device", torch.cuda.is_available()),
        )
        if not is_here
    ]
    if missing:
        raise InputError(
            f"{quantized[0]} needs {' and '.join(missing)}, which this machine lacks; set {quantized[0]}: "
            "false to train the adapter over unquantized weights."
        )


def make_quantization_config(model_args: Any) -> Any:
    """TRL's quantization of the base model, or None."""
    from trl.trainer.utils import get_quantization_config

    return get_quantization_config(model_args)


def make_peft_config(model_args: Any, hf_model: Any, indicator_ids: Sequence[int]) -> Any:
    """The LoRA configuration of a recipe, which also trains the indicator's embedding; None without adapter.

    PEFT trains single rows of an embedding (`trainable_token_indices`) and saves them with the adapter. It
    cannot where the output head is the embedding itself, so a tied head gets weights of its own first
    (`untie_head`). Where `lora_modules_to_save` names the embedding, all of its rows are trained instead.

    Args:
        model_args: TRL's `ModelConfig`.
        hf_model: the model, which already has the indicator.
        indicator_ids: the ids of the indicators; empty if there is none to train.

    Raises:
        InputError: PEFT refuses the configuration.
    """
    from trl.trainer.utils import get_peft_config

    try:
        config: Any = get_peft_config(model_args)
    except (ValueError, TypeError) as error:
        raise InputError(f"PEFT refuses the adapter: {first_line(error)}.") from error
    if config is not None and indicator_ids:
        untie_head(hf_model)
        embedding = hf_model.get_input_embeddings()
        name = next(name for name, module in hf_model.named_modules() if module is embedding)
        name = name.rpartition(".")[2]
        if name not in (config.modules_to_save or ()):
            config.trainable_token_indices = {name: list(indicator_ids)}
    return config


def untie_head(hf_model: Any) -> bool:
    """Give a tied output head a copy of the embedding as weights of its own; whether it was tied.

    The logits stay the same. The model's configuration says so (`tie_word_embeddings` false), so that both
    are saved.
    """
    from torch import nn
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    head, embedding = hf_model.get_output_embeddings(), hf_model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    if is_deepspeed_zero3_enabled():
        raise InputError(
            "an adapter that trains the indicator needs an output head of its own, which cannot be made "
            "under DeepSpeed ZeRO-3; use DDP or FSDP for this model."
        )
    head.weight = nn.Parameter(embedding.weight.detach().clone(), embedding.weight.requires_grad)
    for config in (hf_model.config, hf_model.config.get_text_config()):
        config.tie_word_embeddings = False
    name = next(name for name, module in hf_model.named_modules() if module is head)
    tied = getattr(hf_model, "all_tied_weights_keys", {})
    hf_model.all_tied_weights_keys = {key: to for key, to in tied.items() if key != f"{name}.weight"}
    return True


def merge_adapter(hf_model: Any, folder: Path, *, is_untied: bool) -> Any:
    """The model with an adapter merged into its weights, in place.

    Args:
        hf_model: the model that the adapter was trained on, with the indicator's row.
        folder: the adapter, as PEFT saves it.
        is_untied: whether its head was untied for the training.
    """
    from peft import PeftModel

    if is_untied:
        untie_head(hf_model)
    adapted: Any = PeftModel.from_pretrained(hf_model, str(folder))
    return adapted.merge_and_unload()


__all__ = [
    "ADAPTER", "check_model_arguments", "make_peft_config", "make_quantization_config", "merge_adapter",
    "untie_head",
]  # fmt: skip
