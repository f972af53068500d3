"""Pretrain the base: copying up to a measured criterion, then text; a kill costs two minutes at most."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from ctxlens.files import write_atomic
from experiments.natural_model.corpus import ignored_tokens
from experiments.natural_model.presets import Preset
from experiments.organism.texts import IGNORED, repeated_tokens

COPY_CRITERION_NATS = 0.5
COPY_LR = 1e-3
CHECKPOINT_SECONDS = 120
VALIDATION_ROWS = 32
DECAY_SHARE = 0.5
WARM_UP = 100
_TIMED_STEPS = 20
_EVERY = 25


def build_model(preset: Preset, tokenizer: Any, seed: int) -> LlamaForCausalLM:
    """A Llama model with random weights (standard deviation 0.02) and tied embeddings."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=preset.d_model, intermediate_size=preset.d_mlp,
            num_hidden_layers=preset.n_layers, num_attention_heads=preset.n_heads,
            num_key_value_heads=preset.n_key_value_heads, max_position_embeddings=preset.n_ctx,
            tie_word_embeddings=True, initializer_range=0.02, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


class Pretraining:
    """One run: model, optimiser, place in the data and clock, all kept in a checkpoint.

    Args:
        preset: sizes and budget.
        tokenizer: of the corpus.
        corpus: packed rows; the last ones are for validation and not trained on.
        folder: where the checkpoint goes, and finally the model.
        minutes: budget of both phases; the number of text steps is derived from the time that they take. With
            another budget than before, a run continues and plans its steps again.
        seed: of weights and of the order of rows.
        log: called with one line at a time.
    """

    def __init__(
        self,
        preset: Preset,
        tokenizer: Any,
        corpus: np.ndarray,
        folder: Path,
        *,
        minutes: float,
        seed: int = 0,
        log: Callable[[str], None] = print,
    ) -> None:
        self.preset, self.tokenizer, self.folder = preset, tokenizer, folder
        self.minutes, self.seed, self.log = minutes, seed, log
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_float32_matmul_precision("high")
        self.model = build_model(preset, tokenizer, seed).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=COPY_LR, weight_decay=0.0, betas=(0.9, 0.99), fused=True
        )
        self.rows, self.validation = corpus[:-VALIDATION_ROWS], corpus[-VALIDATION_ROWS:]
        self.ignored = torch.from_numpy(ignored_tokens(tokenizer))
        counts = np.bincount(self.rows[:2000].ravel(), minlength=len(tokenizer))
        counts[self.ignored.numpy()] = -1
        frequent = np.argsort(-counts, kind="stable")[: int((counts >= 0).sum())][: preset.copy_vocab]
        self.copy_vocab = torch.from_numpy(np.sort(frequent).copy()).to(self.device)
        self.state: dict[str, Any] = {"phase": "copy", "step": 0, "steps": None, "seconds": 0.0, "log": []}
        self.state["minutes"] = minutes
        self.saved = self.started = time.monotonic()
        self._resume()

    @property
    def checkpoint(self) -> Path:
        """The file that a run continues from."""
        return self.folder / "checkpoint.pt"

    def _resume(self) -> None:
        if self.checkpoint.is_file():
            kept = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            self.model.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.state = kept["state"]
            self.started -= self.state["seconds"]
            if self.state.get("minutes") != self.minutes:
                self.state |= {"steps": None, "minutes": self.minutes}
            self.log(f"goes on at step {self.state['step']} of phase {self.state['phase']}")

    def save(self) -> None:
        """Save everything that a run needs to continue."""
        self.state["seconds"] = time.monotonic() - self.started
        kept = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "state": self.state,
        }  # fmt: skip
        write_atomic(self.checkpoint, lambda path: torch.save(kept, path))
        self.saved = time.monotonic()

    def run(self) -> Path:
        """Both phases; writes the model and its loss curve, and returns the model's folder."""
        if self.state["phase"] == "copy":
            self._learn_copying()
        self._learn_text()
        out = self.folder / "base"
        self.model.cpu().save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        self.state["seconds"] = time.monotonic() - self.started
        done = {**self.state, "parameters": self.model.num_parameters(), "rows": len(self.rows)}
        write_atomic(self.folder / "pretrain.json", json.dumps(done))
        return out

    def _autocast(self) -> Any:
        if self.preset.precision == "float32" or self.device == "cpu":
            return nullcontext()
        return torch.autocast(self.device, getattr(torch, self.preset.precision))

    def _update(self, loss: Tensor, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            self.save()
        return loss.item()

    def _copy_losses(self, rng: random.Random, n_rows: int) -> Tensor:
        """Losses of repeated sequences at every position but the first, over the copying vocabulary alone."""
        length, known = self.preset.copy_length, range(len(self.copy_vocab))
        drawn = torch.tensor([repeated_tokens(rng, known, length) for _ in range(n_rows)]).to(self.device)
        with self._autocast():
            hidden = self.model.model(input_ids=self.copy_vocab[drawn], use_cache=False).last_hidden_state
            logits = hidden[:, :-1] @ self.model.lm_head.weight[self.copy_vocab].T
        losses = cross_entropy(logits.flatten(0, 1).float(), drawn[:, 1:].flatten(), reduction="none")
        return losses.view(n_rows, length - 1)

    def copy_nats(self) -> float:
        """Loss on the second halves of fresh repeated sequences."""
        with torch.no_grad():
            losses = self._copy_losses(random.Random(12345), 64)
        return losses[:, self.preset.copy_length // 2 :].mean().item()

    def _learn_copying(self) -> None:
        n_rows = self.preset.copy_tokens // self.preset.copy_length
        while self.state["step"] < self.preset.copy_max_steps:
            self.state["step"] += 1
            step = self.state["step"]
            losses = self._copy_losses(random.Random(f"{self.seed}-copy-{step}"), n_rows)
            loss = self._update(losses.mean(), COPY_LR * min(1.0, step / WARM_UP))
            if step % _EVERY == 0:
                second = self.copy_nats()
                self._note({"phase": "copy", "step": step, "loss": loss, "second_half": second})
                if second < COPY_CRITERION_NATS:
                    break
        else:
            self.log("copying was not learned; the text phase begins without it")
        self.state |= {"phase": "text", "step": 0, "copy_steps": self.state["step"]}
        self.save()

    def _batches(self) -> Iterator[Int[Tensor, "row pos"]]:
        """Batches of rows from the step reached on; every pass has its own order."""
        n_rows = self.preset.row_tokens // self.preset.n_ctx
        per_pass = len(self.rows) // n_rows
        step = self.state["step"]
        while True:
            order = np.random.default_rng([self.seed, step // per_pass]).permutation(len(self.rows))
            for at in range(step % per_pass, per_pass):
                rows = self.rows[np.sort(order[at * n_rows : (at + 1) * n_rows])]
                yield torch.from_numpy(rows.astype(np.int64))
                step += 1

    def _loss(self, rows: Int[Tensor, "row pos"]) -> Tensor:
        labels = rows.masked_fill(self.ignored[rows], IGNORED)
        with self._autocast():
            return self.model(
                input_ids=rows.to(self.device), labels=labels.to(self.device), use_cache=False
            ).loss

    def _learning_rate(self) -> float:
        step, steps = self.state["step"], self.state["steps"]
        rise = min(1.0, step / WARM_UP)
        left = 1.0 if steps is None else (steps - step) / (DECAY_SHARE * steps)
        return self.preset.lr * min(rise, max(0.03, left))

    def _learn_text(self) -> None:
        began, first = time.monotonic(), self.state["step"]
        for rows in self._batches():
            if self.state["steps"] is not None and self.state["step"] >= self.state["steps"]:
                break
            self.state["step"] += 1
            loss = self._update(self._loss(rows), self._learning_rate())
            if self.state["steps"] is None and self.state["step"] - first == _TIMED_STEPS:
                self._plan_steps((time.monotonic() - began) / _TIMED_STEPS)
            if self.state["step"] % _EVERY == 0:
                self._note({"phase": "text", "step": self.state["step"], "loss": loss, **self._validate()})
        self.save()

    def _plan_steps(self, step_seconds: float) -> None:
        """Derive the number of text steps from the remaining time; a resumed run keeps it."""
        left = self.minutes * 60 - (time.monotonic() - self.started)
        self.state["steps"] = self.state["step"] + max(_TIMED_STEPS, int(left / step_seconds))
        self.log(f"{self.state['steps']} text steps of {step_seconds:.2f} s")

    def _validate(self) -> dict[str, float]:
        if self.state["step"] % (4 * _EVERY) and self.state["step"] != self.state["steps"]:
            return {}
        with torch.no_grad():
            parts = torch.from_numpy(self.validation.astype(np.int64)).split(8)
            loss = sum(self._loss(rows).item() for rows in parts) / len(parts)
        return {"validation": loss, "second_half": self.copy_nats()}

    def _note(self, entry: dict[str, Any]) -> None:
        entry["seconds"] = time.monotonic() - self.started
        self.state["log"].append(entry)
        shown = " ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items())
        self.log(shown)
