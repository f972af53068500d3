"""Pretrain the organism's base model: first copying, then documents.

Phase 1 repeats random tokens until the loss on the second half of such sequences falls below a stated
criterion. Phase 2 mixes documents with questions and the world's knowledge, in rows up to the full
context length.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from ctxlens.organism.world import World, load_world
from experiments.organism.probe import closed_book_accuracy, needle_accuracy
from experiments.organism.texts import TextMixture, TextSampler, collate, repeated_tokens
from experiments.organism.tokenizer import build_tokenizer, save_tokenizer


@dataclass(frozen=True)
class PretrainRecipe:
    """Everything that determines the base model, except the world.

    Attributes:
        seed: Seed of weights and texts.
        n_ctx: Longest row, and the model's context length.
        copy_length: Tokens in a row of phase 1.
        copy_criterion_nats: Phase 1 ends when the loss on second halves is below this.
        copy_max_steps: Phase 1 is given up after this many steps.
        document_steps: Steps of phase 2.
        row_lengths: Row length to its share of the steps of phase 2.
        tokens_per_step: Rows times row length, in both phases.
        lr: Peak learning rate.
        decay_share: Last part of phase 2 over which the learning rate falls to 3 % of its peak.
    """

    seed: int = 0
    n_ctx: int = 576
    d_model: int = 128
    d_mlp: int = 320
    n_layers: int = 4
    n_heads: int = 4
    n_key_value_heads: int = 2
    copy_length: int = 64
    copy_criterion_nats: float = 0.5
    copy_max_steps: int = 2500
    document_steps: int = 1200
    row_lengths: dict[int, float] = field(default_factory=lambda: {128: 0.35, 256: 0.3, 576: 0.35})
    tokens_per_step: int = 4608
    lr: float = 1e-3
    decay_share: float = 0.4
    mixture: TextMixture = field(default_factory=TextMixture)


def build_model(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama model with random weights (standard deviation 0.02) and tied embeddings."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.d_model,
            intermediate_size=recipe.d_mlp,
            num_hidden_layers=recipe.n_layers,
            num_attention_heads=recipe.n_heads,
            num_key_value_heads=recipe.n_key_value_heads,
            max_position_embeddings=recipe.n_ctx,
            tie_word_embeddings=True,
            initializer_range=0.02,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def copy_loss_nats(model: LlamaForCausalLM, sampler: TextSampler, length: int) -> float:
    """Mean loss on the second halves of fresh repeated sequences of tokens that the world uses."""
    rng = random.Random(12345)
    rows = [repeated_tokens(rng, sampler.used_tokens, length) for _ in range(64)]
    tokens = torch.tensor(rows, device=model.device)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    targets = tokens[:, length // 2 + 1 :]
    return cross_entropy(logits[:, length // 2 : -1].flatten(0, 1), targets.flatten()).item()


class Pretraining:
    """One run: model, optimiser, sampler and clock."""

    def __init__(self, recipe: PretrainRecipe, world: World, log: Callable[[str], None] = print) -> None:
        self.recipe, self.world, self.log = recipe, world, log
        self.tokenizer = build_tokenizer(world, recipe.n_ctx)
        self.model = build_model(recipe, self.tokenizer)
        self.sampler = TextSampler(world, self.tokenizer, recipe.mixture)
        self.rng = random.Random(recipe.seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.lr, weight_decay=0.0, betas=(0.9, 0.99), fused=True
        )
        self.started = time.time()

    def step(self, rows: list[tuple[list[int], list[int]]], lr: float) -> float:
        """One update; returns the loss in nats."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        tokens, labels = collate(rows, self.tokenizer.pad_token_id)
        loss = self.model(input_ids=tokens, labels=labels, use_cache=False).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def learn_copying(self) -> int:
        """Phase 1; returns the number of steps it took.

        Raises:
            RuntimeError: If the criterion is not met in ``copy_max_steps``.
        """
        recipe, length = self.recipe, self.recipe.copy_length
        n_rows = recipe.tokens_per_step // length
        for step in range(1, recipe.copy_max_steps + 1):
            drawn = [
                repeated_tokens(self.rng, self.sampler.vocabulary(self.rng), length) for _ in range(n_rows)
            ]
            rows = [(tokens, tokens) for tokens in drawn]
            loss = self.step(rows, recipe.lr * min(1.0, step / 100))
            if step % 25 == 0:
                second_half = copy_loss_nats(self.model, self.sampler, length)
                self.report(f"copying step {step} loss {loss:.3f} second half {second_half:.3f}")
                if second_half < recipe.copy_criterion_nats:
                    return step
        raise RuntimeError(
            f"Copying was not learned: second-half loss stayed above {recipe.copy_criterion_nats} nats "
            f"for {recipe.copy_max_steps} steps."
        )

    def learn_documents(self, folder: Path, probe_every: int = 200) -> None:
        """Phase 2, with a probe and a checkpoint every few steps."""
        recipe = self.recipe
        lengths, shares = zip(*recipe.row_lengths.items(), strict=True)
        for step in range(1, recipe.document_steps + 1):
            length = self.rng.choices(lengths, shares)[0]
            rows = [self.sampler.row(self.rng, length) for _ in range(recipe.tokens_per_step // length)]
            left = (recipe.document_steps - step) / (recipe.decay_share * recipe.document_steps)
            loss = self.step(rows, recipe.lr * min(1.0, max(0.03, left)))
            if step % probe_every == 0 or step == recipe.document_steps:
                self.probe(f"documents step {step} loss {loss:.3f}")
                self.save(folder)

    def probe(self, label: str) -> None:
        """Log teacher-forced word accuracy on needles and closed-book questions."""
        self.model.eval()
        needles = " ".join(
            f"{n}:{needle_accuracy(self.model, self.tokenizer, self.world, n, template=False):.2f}"
            f"/{needle_accuracy(self.model, self.tokenizer, self.world, n, template=True):.2f}"
            for n in (2, 12, 24, 36)
        )
        closed = closed_book_accuracy(self.model, self.tokenizer, self.world)
        self.report(f"{label} needles by fillers (plain/template) {needles} closed book {closed:.2f}")
        self.model.train()

    def report(self, text: str) -> None:
        """Log one line with the time so far."""
        self.log(f"[{time.time() - self.started:6.0f} s] {text}")

    def save(self, folder: Path) -> None:
        """Write weights in float16, config and tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        copy = LlamaForCausalLM(self.model.config)
        copy.load_state_dict(self.model.state_dict())
        copy.half().save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)


def pretrain(recipe: PretrainRecipe, folder: Path, log: Callable[[str], None] = print) -> Pretraining:
    """Run both phases and write the base model to ``folder``."""
    run = Pretraining(recipe, load_world(), log)
    run.report(f"{run.model.num_parameters():,} parameters, {len(run.tokenizer)} tokens")
    run.learn_copying()
    run.learn_documents(folder)
    return run


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the base model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pretrain(PretrainRecipe(seed=args.seed), args.out, log=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
