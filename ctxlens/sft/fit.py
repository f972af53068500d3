"""Runs TRL's trainer in a run folder: from a checkpoint if there is one, to a saved model."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ctxlens.errors import InputError, first_line
from ctxlens.runs import MANIFEST, Progress, Run
from ctxlens.sft.delivery import SAVING
from ctxlens.sft.job import Prepared
from ctxlens.sft.keys import ContextKeys
from ctxlens.sft.watching import watch


def fit(
    prepared: Prepared,
    args: Any,
    run: Run,
    progress: Progress | None = None,
    *,
    allow_cross_sample: bool = False,
    context: ContextKeys | None = None,
) -> tuple[dict[str, Any], Any]:
    """Train, and save the model to the folder `.saving` of the run.

    Args:
        prepared: model, tokenizer, rows and adapter.
        args: TRL's `SFTConfig`.
        run: the run.
        progress: called with the number of optimizer steps that are done, and of all.
        allow_cross_sample: whether packed rows may see each other.
        context: whether and how context use is measured meanwhile.

    Returns:
        The log (steps, seconds, losses), and the trained model.

    Raises:
        InputError: TRL refuses the arguments, the tokenizer has no token for padding, the checkpoint to
            resume from cannot be used, or context use cannot be measured.
    """
    hf_model = prepared.hf_model
    if not args.packing:
        args.max_length = None  # we have already truncated the rows, by turns instead of by tokens
    _give_pad_token(prepared.tokenizer)
    hf_model.train()
    trainer = _build_trainer(prepared, args, progress, allow_cross_sample)
    watch(trainer, context or ContextKeys())
    checkpoint = choose_checkpoint(args.resume_from_checkpoint, run.folder)
    start, cpu = time.perf_counter(), time.process_time()
    with _without_bars(progress is not None):
        trainer.train(resume_from_checkpoint=checkpoint)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    hf_model.eval()
    trainer.save_model(
        str(run.path(SAVING)), _internal_call=True
    )  # without an upload, which follows delivery
    steps = [
        {key: float(entry[key]) for key in ("step", "loss", "learning_rate", "grad_norm") if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    log = {"steps": trainer.state.global_step, "wall_seconds": wall, "cpu_seconds": cpu, "log": steps}
    return log, trainer.accelerator.unwrap_model(trainer.model)


def _give_pad_token(tokenizer: Any) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError(
            "the tokenizer has neither a pad nor an end token; add pad_token to its tokenizer_config.json."
        )


def _build_trainer(prepared: Prepared, args: Any, progress: Progress | None, allow_cross_sample: bool) -> Any:
    from ctxlens.sft.trainer import make_trainer

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pad_token.*")
            return make_trainer(
                prepared.hf_model, prepared.tokenizer, prepared.rows.rows, args,
                progress=progress, peft_config=prepared.peft_config, allow_cross_sample=allow_cross_sample,
            )  # fmt: skip
    except InputError:
        raise
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise InputError(f"TRL refuses these arguments: {first_line(error)}.") from error


@contextmanager
def _without_bars(wanted: bool) -> Iterator[None]:
    """Hide transformers' own progress bars while the caller shows the progress."""
    from transformers.utils import logging

    if not wanted or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextmanager
def removed_if_empty(run: Run, *, is_main: bool) -> Iterator[None]:
    """Remove the run folder again if the training fails before anything but the manifest is written."""
    try:
        yield
    except Exception:
        left = [path.name for path in run.folder.iterdir()] if run.folder.is_dir() else []
        if is_main and left == [MANIFEST]:
            run.path(MANIFEST).unlink()
            run.folder.rmdir()
        raise


def find_checkpoint(folder: Path) -> str | None:
    """Find the last complete checkpoint in a run's folder.

    The trainer writes `trainer_state.json` last, so a checkpoint without it, or with only a part of it, was
    interrupted and is ignored.

    Returns:
        The folder of the checkpoint; None if there is no complete one.
    """
    whole = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
        except (OSError, ValueError, KeyError):
            continue
        whole.append((step, str(state.parent)))
    return max(whole)[1] if whole else None


def choose_checkpoint(given: Any, folder: Path) -> str | None:
    """The checkpoint to resume from: the one that is given, otherwise the folder's last.

    Args:
        given: `resume_from_checkpoint`: a folder, true, false, or None.
        folder: the folder of the run.

    Raises:
        InputError: `given` is not a checkpoint; or it is false, and the folder contains one.
    """
    found, said = find_checkpoint(folder), str(given).lower()
    if said == "false" and found:
        raise InputError(
            f"resume_from_checkpoint is false, but the folder contains {found} to resume from; set "
            "overwrite: true to start again."
        )
    if given is None or said in {"true", "false"}:
        return found
    if not (Path(given) / "trainer_state.json").is_file():
        raise InputError(f"resume_from_checkpoint: {given} is not a checkpoint folder of the trainer.")
    return str(given)


__all__ = ["choose_checkpoint", "find_checkpoint", "fit", "removed_if_empty"]
