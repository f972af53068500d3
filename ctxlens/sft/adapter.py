"""LoRA and QLoRA through PEFT; the indicator's embedding is trained and saved with the adapter."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctxlens.errors import InputError, first_line, require_package

ADAPTER = "adapter"
"""Folder of the adapter, inside the folder of the run, which contains the merged checkpoint."""


def check_model_arguments(model_args: Any) -> None:
    """Refuse model arguments whose packages or hardware are missing.

    Args:
        model_args: TRL's `ModelConfig`.

    Raises:
        InputError: PEFT is missing for an adapter; or quantization is asked for without an adapter,
            bitsandbytes or CUDA.
    """
    import torch

    if model_args.use_peft:
        require_package("use_peft", "peft")
    quantized = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(model_args, name)]
    if not quantized:
        return
    if not model_args.use_peft:
        raise InputError(
            f"{quantized[0]} works only with an adapter; set use_peft: true, or remove {quantized[0]}."
        )
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
    """TRL's quantization configuration of the base model, or None."""
    from trl.trainer.utils import get_quantization_config

    return get_quantization_config(model_args)


def make_peft_config(model_args: Any, hf_model: Any, indicator_ids: Sequence[int]) -> Any:
    """The LoRA configuration of a recipe, which also trains the indicator's embedding.

    PEFT trains single rows of an embedding (`trainable_token_indices`) and saves them with the adapter. It
    cannot do this if the output head shares the embedding's weights, so a tied head is untied first
    (`untie_head`). If `lora_modules_to_save` names the embedding, all of its rows are trained instead.

    Args:
        model_args: TRL's `ModelConfig`.
        hf_model: the model, which already has the indicator.
        indicator_ids: the ids of the indicators; empty if there are none to train.

    Returns:
        PEFT's configuration; None if no adapter is wanted.

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
    """Give a tied output head its own copy of the embedding's weights; returns whether it was tied.

    The logits stay the same. `tie_word_embeddings` becomes false in the model's configuration, so that both
    are saved.
    """
    from torch import nn
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    head, embedding = hf_model.get_output_embeddings(), hf_model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    if is_deepspeed_zero3_enabled():
        raise InputError(
            "an adapter that trains the indicator needs an untied output head, which is not possible under "
            "DeepSpeed ZeRO-3; use DDP or FSDP for this model."
        )
    head.weight = nn.Parameter(embedding.weight.detach().clone(), embedding.weight.requires_grad)
    for config in (hf_model.config, hf_model.config.get_text_config()):
        config.tie_word_embeddings = False
    name = next(name for name, module in hf_model.named_modules() if module is head)
    tied = getattr(hf_model, "all_tied_weights_keys", {})
    hf_model.all_tied_weights_keys = {key: to for key, to in tied.items() if key != f"{name}.weight"}
    return True


def merge_adapter(hf_model: Any, folder: Path, *, is_untied: bool) -> Any:
    """Merge an adapter into the weights of a model, in place.

    Args:
        hf_model: the model that the adapter was trained on, with the indicator's embedding.
        folder: the adapter, as PEFT saves it.
        is_untied: whether its output head was untied for the training.
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
