"""What a cure will do and about how long it takes, said before the first batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ctxlens.auditing.speed import Speed
from ctxlens.chat.data import Conversation
from ctxlens.errors import RenderError
from ctxlens.models import Model
from ctxlens.scoring.selection import MIDDLE_LAYER
from ctxlens.sft.room import say_bytes

PASSES = {"full": 3.0, "adapter": 2.3}
"""Time of a training step, in forward passes. Backwards through all weights takes twice the forward pass;
an adapter saves most of the gradients of weights."""
SAMPLE = 200
"""Conversations that are rendered to count tokens."""
_LAYER = 12
"""Weights of a common layer, in squares of its width."""


@dataclass(frozen=True)
class Plan:
    """What a cure does.

    Attributes:
        conversations: conversations of the data set.
        tokens: their tokens, about, each truncated to the longest row.
        recipe: the recipe's name or file.
        steps: optimizer steps of the training.
        rows: rows of one step.
        trained_tokens: tokens that the training reads, about; repeated conversations are not counted.
        audits: the audits by name.
        lengths: their context lengths in tokens.
        seconds: expected seconds by stage.
        disk: bytes that the training writes at most; None if the model's size is not known.
    """

    conversations: int
    tokens: int
    recipe: str
    steps: int
    rows: int
    trained_tokens: int
    audits: tuple[str, ...]
    lengths: tuple[int, ...]
    seconds: Mapping[str, float]
    disk: int | None

    @property
    def total_seconds(self) -> float:
        """Expected seconds of all stages."""
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that `as_dict` has described."""
        return cls(**{**values, "audits": tuple(values["audits"]), "lengths": tuple(values["lengths"])})

    def describe(self) -> list[str]:
        """The plan in lines, for the terminal."""
        minutes = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in self.seconds.items() if seconds)
        lengths = " and ".join(f"{length:,}" for length in self.lengths)
        disk = [] if self.disk is None else [f"writes at most about {say_bytes(self.disk)}"]
        return [
            f"{self.conversations:,} conversations, about {self.tokens:,} tokens",
            f"training: recipe {self.recipe}, {self.steps:,} steps of {self.rows} rows, about "
            f"{self.trained_tokens:,} tokens",
            f"audits: {', '.join(self.audits)}, the same texts of {lengths} tokens",
            f"expected minutes: {minutes}; together {self.total_seconds / 60:.1f}",
            *disk,
        ]


def count_tokens(model: Model, data: Sequence[Conversation], longest: int | None) -> tuple[list[int], float]:
    """Tokens of some conversations, evenly spread over the data, each truncated to the longest row.

    Conversations that the template refuses do not count.

    Returns:
        The tokens of each, and the share of all tokens that the model has to write.
    """
    step = max(1, len(data) // SAMPLE)
    counts, written, whole = [], 0, 0
    for conversation in data[::step]:
        try:
            chat = model.render(conversation.messages, max_tokens=100_000_000)
        except RenderError:
            continue
        written, whole = written + int(chat.mask_written().sum()), whole + chat.n_tokens
        counts.append(min(chat.n_tokens, longest or chat.n_tokens, model.n_ctx))
    return counts or [0], written / whole if whole else 1.0


def make_plan(
    data: Sequence[Conversation],
    sample: Sequence[int],
    speed: Speed,
    *,
    args: Any,
    adapter: bool,
    head: float,
    scores: bool,
    audits: Sequence[str],
    audit_seconds: float,
    lengths: Sequence[int],
    recipe: str,
    disk: int | None,
) -> Plan:
    """Estimate a cure from the speed that was measured for its audits.

    Args:
        data: the conversations.
        sample: tokens of some of them.
        speed: the measured speed of reading.
        args: TRL's `SFTConfig`.
        adapter: whether an adapter is trained.
        head: time of the output head for all positions with a loss, in readings, which need it for the last
            one only.
        scores: whether the data are scored here.
        audits: the audits by name.
        audit_seconds: expected seconds of one audit.
        lengths: their context lengths.
        recipe: the recipe's name or file.
        disk: bytes that the training writes.
    """
    mean = sum(sample) / len(sample)
    reading = sum(map(speed.reading, sample)) / len(sample)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(data) / rows)
    trained = steps * rows if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(data))
    passes = PASSES["adapter" if adapter else "full"]
    return Plan(
        conversations=len(data),
        tokens=round(mean * len(data)),
        recipe=recipe,
        steps=steps,
        rows=rows,
        trained_tokens=round(mean * trained),
        audits=tuple(audits),
        lengths=tuple(lengths),
        seconds={
            "score": MIDDLE_LAYER * reading * len(data) if scores else 0.0,
            "train": passes * (1 + head) * reading * trained,
            **dict.fromkeys(audits, audit_seconds),
        },
        disk=disk,
    )


def head_share(width: int, n_layers: int, vocabulary: int) -> float:
    """Weights of the output head over those of all layers (12 squares of the width each)."""
    return vocabulary / (_LAYER * width * n_layers)


__all__ = ["Plan", "count_tokens", "head_share", "make_plan"]
