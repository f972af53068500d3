"""The organism's pretraining on any device within a given time: first copying, then documents."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ctxlens.organism.world import World
from experiments.organism.pretrain import Pretraining, PretrainRecipe, copy_loss_nats
from experiments.organism.texts import TextSampler, collate, repeated_tokens

Batch = tuple[torch.Tensor, torch.Tensor]


class Batches(IterableDataset[Batch]):
    """An endless stream of batches; every worker process draws different ones."""

    def __init__(self, sampler: TextSampler, recipe: PretrainRecipe, *, copying: bool) -> None:
        self.sampler, self.recipe, self.copying = sampler, recipe, copying

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = random.Random(f"{self.recipe.seed}-{self.copying}-{worker.id if worker else 0}")
        lengths, shares = zip(*self.recipe.row_lengths.items(), strict=True)
        while True:
            length = self.recipe.copy_length if self.copying else rng.choices(lengths, shares)[0]
            n_rows = max(1, self.recipe.tokens_per_step // length)
            yield collate(
                [self._row(rng, length) for _ in range(n_rows)], self.sampler.tokenizer.pad_token_id
            )

    def _row(self, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
        if not self.copying:
            return self.sampler.row(rng, length)
        tokens = repeated_tokens(rng, self.sampler.vocabulary(rng), length)
        return tokens, tokens


class TimedPretraining(Pretraining):
    """`Pretraining` on a device, with batches from other processes, that ends when its time is up.

    Args:
        recipe: shape, texts and the maximum number of steps of each phase.
        world: the world.
        device: where the model runs.
        bf16: whether to autocast to bfloat16.
        minutes: time of both phases together.
        copy_share: maximum share of this time for the first phase.
        workers: number of processes that make texts.
        log: called with one line at a time.
    """

    def __init__(
        self, recipe: PretrainRecipe, world: World, *, device: torch.device, bf16: bool, minutes: float,
        copy_share: float, workers: int, log: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        super().__init__(recipe, world, log)
        self.device, self.bf16, self.workers = device, bf16, workers
        self.model.to(device)
        self.seconds, self.copy_seconds = 60 * minutes, 60 * minutes * copy_share
        self.tokens = self.steps = 0
        self.started = time.time()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.time() - self.started

    def batches(self, *, copying: bool) -> Iterator[Batch]:
        """The batches of a phase."""
        data = Batches(self.sampler, self.recipe, copying=copying)
        options: dict[str, Any] = {"prefetch_factor": 8} if self.workers else {}
        pinned = self.device.type == "cuda"
        loader = DataLoader(
            data, batch_size=None, num_workers=self.workers, pin_memory=pinned, **options
        )  # fmt: skip
        return iter(loader)

    def update(self, batch: Batch, lr: float) -> torch.Tensor:
        """One update; the loss stays on the device, so that nothing waits for it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        tokens, labels = (part.to(self.device, non_blocking=True) for part in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(input_ids=tokens, labels=labels, use_cache=False).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.tokens += tokens.numel()
        self.steps += 1
        return loss.detach()

    def learn_copying(self) -> int:
        """Phase 1, until its criterion is met, or its steps or its share of the time are used up."""
        recipe = self.recipe
        self.second_half = float("nan")
        stream = self.batches(copying=True)
        for step in range(1, recipe.copy_max_steps + 1):
            self.update(next(stream), recipe.lr * min(1.0, step / 100))
            is_last = step == recipe.copy_max_steps or self.spent > self.copy_seconds
            if step % 25 == 0 or is_last:
                self.second_half = copy_loss_nats(self.model, self.sampler, recipe.copy_length)
                self.report(f"copying step {step} second half {self.second_half:.3f}")
                if is_last or self.second_half < recipe.copy_criterion_nats:
                    return step
        return recipe.copy_max_steps

    def learn_documents(self, folder: Path, probe_every: int = 200) -> None:
        """Phase 2, until its steps or the time are used up; the learning rate falls accordingly."""
        recipe, begun = self.recipe, self.spent
        stream = self.batches(copying=False)
        for step in range(1, recipe.document_steps + 1):
            time_left = (self.seconds - self.spent) / max(1e-9, self.seconds - begun)
            left = min(1 - step / recipe.document_steps, time_left) / recipe.decay_share
            loss = self.update(next(stream), recipe.lr * min(1.0, max(0.03, left)))
            if step % probe_every == 0:
                self.probe(f"documents step {step} loss {loss.item():.3f}")
            if self.spent > self.seconds:
                break
        self.last_loss = loss.item()
        self.save(folder)

    def save(self, folder: Path) -> None:
        """Save as `Pretraining.save` does, from any device."""
        self.model.to("cpu")
        super().save(folder)
        self.model.to(self.device)


__all__ = ["TimedPretraining"]
