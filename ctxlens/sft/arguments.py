"""TRL's `SFTConfig` and `ModelConfig`: our defaults, and checks before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from ctxlens.errors import InputError, first_line
from ctxlens.sft.keys import check_known


def default_arguments(*, use_cpu: bool | None = None, model: Any = None) -> dict[str, Any]:
    """The arguments for which our default differs from TRL's.

    No experiment trackers, no intermediate checkpoints, and on a CPU the settings that it needs: bfloat16
    (autocast) only where `trains_in_bfloat16` says that it is faster.

    Args:
        use_cpu: whether to train on the CPU. Default: if there is no accelerator.
        model: the model, loaded or by name; None trains in float32 on a CPU.
    """
    import torch

    from ctxlens.models.dtype_choice import trains_in_bfloat16

    arguments: dict[str, Any] = {"report_to": "none", "save_strategy": "no"}
    if use_cpu is None:
        use_cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    if use_cpu:
        arguments |= {
            "use_cpu": True, "gradient_checkpointing": False, "dataloader_pin_memory": False,
            "bf16": model is not None and trains_in_bfloat16(model),
        }  # fmt: skip
    return arguments


@contextmanager
def without_renaming_notes() -> Iterator[None]:
    """Silence the warning that transformers renames `gradient_checkpointing`, because TRL itself sets it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        yield


def make_sft_config(out: str | Path, arguments: Mapping[str, Any] | None = None, *, model: Any = None) -> Any:
    """Build TRL's `SFTConfig` from arguments and our defaults (`default_arguments`).

    Args:
        out: folder of the run.
        arguments: values that override the defaults.
        model: the model, loaded or by name, on which the number format depends.

    Raises:
        InputError: `SFTConfig` does not have an argument, or refuses its value.
    """
    from trl.trainer.sft_config import SFTConfig

    given = dict(arguments or {})
    check_known(given, {f.name for f in fields(SFTConfig)}, "the training arguments")
    chosen = "bf16" in given or "fp16" in given
    defaults = default_arguments(use_cpu=given.get("use_cpu") or None, model=None if chosen else model)
    with without_renaming_notes():
        return _build(SFTConfig, {**defaults, **given, "output_dir": str(out)}, "training")


def make_model_config(arguments: Mapping[str, Any] | None = None) -> Any:
    """Build TRL's `ModelConfig`: `dtype`, `use_peft`, `lora_r`, `load_in_4bit` and so on.

    Raises:
        InputError: `ModelConfig` does not have an argument, or refuses its value.
    """
    from trl.trainer.model_config import ModelConfig

    given = dict(arguments or {})
    check_known(given, {f.name for f in fields(ModelConfig)}, "the model arguments")
    return _build(ModelConfig, given, "model")


def _build(cls: Callable[..., Any], arguments: Mapping[str, Any], which: str) -> Any:
    try:
        return cls(**arguments)
    except (ValueError, TypeError) as error:
        raise InputError(f"the {which} arguments do not fit together: {first_line(error)}.") from error


REPLACED = {
    "assistant_only_loss": "loss_on",
    "completion_only_loss": "loss_on",
    "truncation_mode": "truncation",
    "chat_template_path": "chat_template",
}
"""Arguments of `SFTConfig` that act on text, and the keys that replace them: TRL only gets finished rows."""

_LOWEST = {
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "weight_decay": 0,
    "max_grad_norm": 0, "warmup_steps": 0,
}  # fmt: skip


def check_arguments(args: Any) -> None:
    """Refuse training arguments that would fail later, or would silently have no effect.

    Args:
        args: TRL's `SFTConfig`.

    Raises:
        InputError: a rate, size or number of steps is out of range, or one of our keys replaces the argument.
    """
    plain = {f.name: f.default for f in fields(type(args))}
    for name, key in REPLACED.items():
        if getattr(args, name) != plain[name]:
            raise InputError(f"{name} has no effect here, because ctxlens tokenizes the data; use {key}.")
    for name, least in _LOWEST.items():
        if not getattr(args, name) >= least:
            raise InputError(f"{name} must be at least {least}, got {getattr(args, name)}.")
    if not 0 < args.learning_rate < float("inf"):
        raise InputError(f"learning_rate must be above 0, got {args.learning_rate}.")
    if args.max_steps <= 0 and not args.num_train_epochs > 0:
        raise InputError(
            f"num_train_epochs must be above 0 if max_steps is not given, got {args.num_train_epochs}."
        )
    if args.max_length is not None and args.max_length < 2:
        raise InputError(f"max_length must be at least 2 tokens, got {args.max_length}.")


HUB_TOKEN = "hub_token"
"""The argument that must never be written to a file."""

_PLACES = frozenset({
    "output_dir", "logging_dir", "run_name", "disable_tqdm", "resume_from_checkpoint", HUB_TOKEN,
    "model_name_or_path",
})  # fmt: skip
"""Arguments that do not change what a run computes, only where it is written, shown or resumed."""


def changed_arguments(args: Any) -> dict[str, Any]:
    """The arguments that differ from TRL's defaults, as JSON values for the manifest.

    Args:
        args: TRL's `SFTConfig` or `ModelConfig`.
    """
    with without_renaming_notes():
        training = {"output_dir": "", "use_cpu": args.use_cpu, "bf16": False} if hasattr(args, "bf16") else {}
        plain = type(args)(**training)
    if plugin := getattr(args, "deepspeed_plugin", None):
        plugin.set_deepspeed_weakref()  # transformers follows the newest arguments: back to these
    return {
        f.name: getattr(args, f.name)
        for f in fields(args)
        if f.init and f.name not in _PLACES and getattr(args, f.name) != getattr(plain, f.name)
    }


__all__ = [
    "HUB_TOKEN", "changed_arguments", "check_arguments", "default_arguments", "make_model_config",
    "make_sft_config", "without_renaming_notes",
]  # fmt: skip
