"""TRL's `SFTTrainer` on finished rows, with batches that need little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl.trainer import utils as trl_utils
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ctxlens.errors import InputError
from ctxlens.runs import Progress
from ctxlens.sft.packing import check_separation
from ctxlens.sft.rows import IGNORED


class StepSortedSampler(Sampler[int]):
    """Random order in which the rows of one optimizer step are sorted by length.

    The choice of rows for a step is as random as without sorting, and the gradient of the step is the same
    sum. Its micro-batches (gradient accumulation) contain rows of similar length, which saves padding.

    Args:
        lengths: number of tokens of each row.
        step_rows: rows per optimizer step, over all micro-batches and processes.
        seed: seed of the order; every epoch has a different order.
    """

    def __init__(self, lengths: Sequence[int], step_rows: int, seed: int) -> None:
        self.lengths = lengths
        self.step_rows = step_rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order; the trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(order), self.step_rows):
            yield from sorted(order[start : start + self.step_rows], key=lambda row: -self.lengths[row])


class RowTrainer(SFTTrainer):
    """`SFTTrainer` with the random order of `StepSortedSampler`, and on a CPU with fewer logits.

    The losses and gradients are equal.
    """

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss; on a CPU without the logits of positions that do not count."""
        with _head_where_trained(self.accelerator.device):
            return super().compute_loss(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        args = cast(SFTConfig, self.args)
        if args.train_sampling_strategy != "random" or args.packing or not isinstance(data, Dataset):
            return super()._get_train_sampler(train_dataset)
        step_rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return StepSortedSampler([len(ids) for ids in data["input_ids"]], step_rows, seed)


@contextmanager
def _head_where_trained(device: torch.device) -> Iterator[None]:
    """Let TRL's fused head skip the positions without a label on a CPU, as it does on a GPU.

    TRL skips them only on devices with Triton, because some other accelerators compile for every number of
    positions. A CPU does not. In a version of TRL that decides otherwise, nothing changes.
    """
    utils: Any = trl_utils
    chosen = getattr(utils, "_use_triton", None)
    if device.type != "cpu" or chosen is None:
        yield
        return
    utils._use_triton = lambda device: True  # of all its uses, this name only decides about positions
    try:
        yield
    finally:
        utils._use_triton = chosen


class _Progress(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)


def make_trainer(
    hf_model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, list[int]]],
    args: SFTConfig,
    *,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    peft_config: Any = None,
    allow_cross_sample: bool = False,
) -> RowTrainer:
    """Build a trainer for rows that are already truncated and labelled.

    With `peft_config` it trains an adapter. With `allow_cross_sample`, packed rows may see each other.

    Raises:
        InputError: packing splits rows so that one has no token to train on, or the model sees from one
            packed row into another.
    """
    columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
    trainer = RowTrainer(
        model=hf_model,
        args=args,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        peft_config=peft_config,
    )
    if args.packing:
        _check_packed(trainer.train_dataset)
    if trainer.padding_free and not allow_cross_sample:
        check_separation(trainer)
    if progress is not None:
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Progress(progress))
    return trainer


def _check_packed(packed: Any) -> None:
    empty = [row for row, labels in enumerate(packed["labels"]) if all(label == IGNORED for label in labels)]
    if empty:
        raise InputError(
            f"packing splits conversations so that {len(empty)} packed rows (the first is row {empty[0]}) "
            "have no token to train on; use packing_strategy: bfd, which keeps conversations whole."
        )
