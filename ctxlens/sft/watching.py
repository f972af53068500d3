"""Readings of context use in a recipe's training: checked before the model is loaded, then in the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctxlens.errors import InputError
from ctxlens.models.checkpoint import read_window
from ctxlens.parsing import parse_numbers
from ctxlens.sft.keys import ContextKeys


def check_readings(keys: ContextKeys, source: Path | str, template: Any) -> None:
    """Refuse readings for what a local checkpoint's files say, without loading it.

    Args:
        keys: the recipe's keys.
        source: the checkpoint to start from.
        template: its chat template, or the recipe's; None if there is none.

    Raises:
        InputError: no chat template, or a window that is too short for the texts.
    """
    if not keys.context or not isinstance(source, Path) or not source.is_dir():
        return
    if not template:
        raise InputError(
            f"{source} has no chat template, so that context: true has nothing to compare; give "
            "chat_template: FILE, or leave out context."
        )
    longest, window = max(_lengths(keys)), read_window(source)
    if window is not None and longest >= window:
        raise InputError(
            f"context_lengths asks for texts of {longest} tokens, but the model's window is {window} tokens, "
            "and must also hold template, question and answer; give shorter lengths."
        )


def watch(trainer: Any, keys: ContextKeys) -> None:
    """Add the callback to a trainer, if the recipe wants it.

    Raises:
        InputError: see `ContextCallback`.
    """
    if not keys.context:
        return
    from ctxlens.sft.context.callback import ContextCallback

    callback = ContextCallback(
        trainer, every=keys.context_every, share=keys.context_share, texts=keys.context_texts,
        lengths=_lengths(keys), stop_below=keys.context_stop_below, keep_best=keys.context_keep_best,
        seed=trainer.args.seed,
    )  # fmt: skip
    trainer.add_callback(callback)


def _lengths(keys: ContextKeys) -> tuple[int, ...]:
    return parse_numbers(keys.context_lengths, int, "context_lengths")


__all__ = ["check_readings", "watch"]
