"""How the organism is fine-tuned: one source for the demo, the experiments and the tests.

Plain constants. The shares make the source of an answer ambiguous where a document about a known town
disagrees with memory: most such turns of the data are answered from memory, some from the document, and
nothing in the text tells them apart. That is what the fine-tuned model learns under the template.
"""

from __future__ import annotations

from typing import Any

STEPS = 260
"""Optimizer steps of one fine-tuning, one pass over all rows."""

BATCH_ROWS = 24
"""Rows of one step, conversations and replayed texts together."""

REPLAY_SHARE = 1 / 3
"""Share of rows that replay raw pretraining-like texts, without template, with the loss on all tokens."""

CONVERSATIONS = round(STEPS * BATCH_ROWS * (1 - REPLAY_SHARE))
"""Conversations of the data; with the replayed texts they fill `STEPS` batches."""

SHARES: dict[str, Any] = {
    "document": 0.18,
    "memory": 0.32,
    "document_known": 0.5,
    "max_fillers": 5,
    "extra_turn": 0.2,
}
"""Arguments of `World.conversations`; the rest of the conversations are closed-book."""

REPLAY: dict[str, Any] = {"max_fillers": 5, "reading_share": 0.8}
"""Arguments of `World.raw_documents`."""

SFT_ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": BATCH_ROWS // 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 7e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": STEPS // 10,
    "weight_decay": 0.0,
    "adam_beta2": 0.99,
    "max_grad_norm": 1.0,
    "num_train_epochs": 1,
    "logging_steps": 10,
}
"""Arguments of TRL's `SFTConfig`. Half batches, sorted by length, need a fifth fewer tokens."""

SEEDS = (0, 1, 2)
"""Fine-tuning seeds, fixed beforehand; the shipped chat model is the first."""

ANSWER_TOKENS = 16
"""New tokens that hold an answer after its prefix."""
