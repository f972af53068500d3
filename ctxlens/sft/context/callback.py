"""The callback: when a reading is due, whether it is paid for, and where its result goes."""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from ctxlens.errors import InputError
from ctxlens.evals.material import choose_material
from ctxlens.evals.needle.haystack import Haystack
from ctxlens.evals.needle.needles import Needle
from ctxlens.evals.needle.prompts import Window
from ctxlens.files import plain_value, write_atomic
from ctxlens.models.loading import find_indicator
from ctxlens.processes import Processes
from ctxlens.sft.context.asking import Asking, Reading, wrap
from ctxlens.sft.context.budget import Budget
from ctxlens.sft.context.questions import QuestionSet, build_set
from ctxlens.sft.context.record import FOLDER, Record
from ctxlens.sft.context.rules import (
    PREFIX,
    check_quantity,
    find_metric,
    has_fallen,
    is_best,
    recalls,
)
from ctxlens.sft.context.trainee import find_decoder, find_tokenizer

BEST = "best"
_PARTS = 20
"""By default, a reading is due after every twentieth part of the steps."""


class ContextWarning(UserWarning):
    """A reading was not taken, or the training stops because the model has lost its context."""


class ContextCallback(TrainerCallback):
    """Measures, while a model is trained, how it uses its context.

    It works with every trainer of transformers and TRL (SFT, DPO, GRPO and the others):

    ```python
    trainer = SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.add_callback(ContextCallback(trainer))
    trainer.train()
    ```

    A reading asks a fixed set: facts in short texts with and without the chat template, the user's share of
    the attention where the answer begins (without sinks), and questions that need no text. It logs
    `context/recall_template`, `context/recall_plain`, `context/user_share_template`,
    `context/user_share_plain` and `context/closed_book` (and `context/recall_indicator`, if the model has an
    indicator) to whatever `report_to` names, and keeps them in `OUTPUT_DIR/context`, which `ctxlens report`
    draws.

    The first reading is taken on the untouched weights, after the first step's gradients are computed and
    before they are applied: only then is it known how long a step takes. Readings take at most `share` of
    the training's time. So the first one asks fewer texts where the time is short (the same for all
    readings after it), and later ones wait until the time that has passed pays for them.

    Model, gradients, random states and memory are as before after every reading, so that the training does
    not change. With several processes (DDP), each one asks its part of the texts.

    Attributes:
        readings: the readings so far, as in `OUTPUT_DIR/context/readings.jsonl`.
        stopped: why the training was stopped; empty if it was not.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        every: int | None = None,
        share: float | int = 0.05,
        texts: int = 8,
        lengths: Sequence[int] = (200, 400),
        stop_below: float | None = None,
        keep_best: str | None = None,
        haystack: str | Haystack | None = None,
        facts: Sequence[Needle] = (),
        seed: int = 0,
    ) -> None:
        """Check everything, and build the questions; the model reads eight tokens.

        Args:
            trainer: the trainer, complete with model and tokenizer.
            every: steps between readings. By default a twentieth of all steps; or `eval_steps`, if
                `metric_for_best_model` names one of the quantities.
            share: the share of the training's wall time that readings may take, above 0, at most 1.
            texts: texts of each length.
            lengths: lengths of the texts in tokens.
            stop_below: stop when two readings in a row have a recall with the template that lies more than
                this below the first reading's; above 0, below 1. By default nothing is stopped.
            keep_best: the quantity by which the best model is kept in `OUTPUT_DIR/context/best`, such as
                `recall_template`. Saving does not count as reading.
            haystack: the texts, as in `ctxlens.audit`; by default neutral ones.
            facts: the facts to hide and ask for; by default invented ones.
            seed: seed of texts and facts.

        Raises:
            InputError: a value out of range; a trainer without tokenizer or chat template; a window that is
                too short; a model that is split over processes.
            UnsupportedModelError: a model whose attention cannot be read exactly.
        """
        begun = time.perf_counter()
        self._trainer = trainer
        self._metric = find_metric(trainer.args)
        self._every, self._stop_below = every, stop_below
        self._keep_best = None if keep_best is None else check_quantity(keep_best, "keep_best")
        _check_numbers(every, share, texts, lengths, stop_below)
        args: Any = trainer.args
        processes = Processes(args.process_index, args.world_size)
        hf_model, tokenizer = find_decoder(trainer), find_tokenizer(trainer)
        name = getattr(hf_model.config, "_name_or_path", "") or "model"
        asked = _build(hf_model, tokenizer, name, haystack, facts, lengths, texts, seed)
        model = wrap(hf_model, tokenizer, name)
        self._asking = Asking(model, asked, processes, lambda: trainer.accelerator.autocast())
        folder = Path(str(args.output_dir)) / FOLDER
        self._record = Record(folder, asked.describe(), writes=processes.is_first)
        self._budget = Budget(share, spent=time.perf_counter() - begun)
        self._start, self._step_begun = 0, time.perf_counter()
        self.stopped = ""

    @property
    def readings(self) -> list[dict[str, Any]]:
        """The readings so far."""
        return self._record.lines

    def figure(self) -> Any:
        """The readings as a plotly figure."""
        from ctxlens.report.plots.context import context_curves

        return context_curves(self.readings)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the record, or go on with it, and start the clock."""
        self._start = state.global_step
        self._record.open(state.global_step)
        self._asking.processes.wait()
        if self.readings:
            self._budget.resume(*self._record.times)
            asked = [line["texts"] for line in self.readings if line.get("texts")]
            self._asking.n_texts = asked[-1] if asked else None
            seconds = [line["seconds"] for line in self.readings if line.get("texts")]
            self._asking.round_seconds = seconds[-1] / self._asking.n_rounds if seconds else None
        self._budget.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when the first step begins."""
        if not self.readings:
            self._step_begun = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the first reading, before the weights change for the first time."""
        if not self.readings and not getattr(self._trainer, "is_deepspeed_enabled", False):
            self._read_first(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take a reading that is due and paid for."""
        step = state.global_step
        if not self.readings:  # DeepSpeed has already applied the gradients of the first step
            self._read_first(state, control)
        elif (step % self._interval(state) == 0 or step >= state.max_steps) and not self._record.at(step):
            self._read_later(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Give the trainer the quantity by which it chooses the best checkpoint."""
        if self._metric is None or metrics is None:
            return
        if self.readings and not self._record.at(state.global_step):
            self._read_later(state, control)
        value = (self._record.at(state.global_step) or {}).get(self._metric)
        metrics[f"eval_{PREFIX}{self._metric}"] = math.nan if value is None else value

    def _interval(self, state: Any) -> int:
        """Steps between readings."""
        if self._every is not None:
            return self._every
        if self._metric is not None and isinstance(state.eval_steps, int) and state.eval_steps > 0:
            return state.eval_steps
        return max(1, state.max_steps // _PARTS)

    def _read_first(self, state: Any, control: Any) -> None:
        """Take the first reading, with as many texts as the planned steps will pay for."""
        per_step = time.perf_counter() - self._step_begun
        planned = per_step * (state.max_steps - self._start)
        budget = self._budget
        with budget.spending():
            forecast = self._asking.forecast()
        if not self._asking.processes.agree(budget.allows_first(forecast, planned)):
            self._skip(state, forecast, planned)
            return
        with budget.spending():
            reading = self._asking.read(
                lambda seconds: budget.affordable(seconds, planned, self._asking.n_rounds)
            )
        self._keep(reading, state, control)

    def _skip(self, state: Any, seconds: float, planned: float) -> None:
        """Say that the training is too short for a reading, and keep that in the record."""
        sentence = (
            f"the training is too short for a reading: one text takes about {seconds:.1f} s, and "
            f"{self._budget.share:.0%} of the planned {planned:.0f} s have to pay for all readings; give a "
            "larger share, shorter lengths, or more steps."
        )
        self._record.add({"step": state.global_step, "error": sentence, **self._times(0.0)})
        if self._asking.processes.is_first:
            warnings.warn(sentence, ContextWarning, stacklevel=3)

    def _read_later(self, state: Any, control: Any) -> None:
        """Take a reading if it is paid for; all processes decide alike."""
        expected = self._asking.expected_seconds
        if self._asking.n_texts is None or expected is None:  # the first one was skipped
            return
        if not self._asking.processes.agree(self._budget.allows(expected)):
            return
        with self._budget.spending():
            reading = self._asking.read()
        self._keep(reading, state, control)

    def _keep(self, reading: Reading, state: Any, control: Any) -> None:
        """Record and log a reading, and do what follows from it."""
        best = self._keep_best
        earlier = [line.get(best) for line in self.readings] if best else []
        line = {
            "step": state.global_step, "epoch": state.epoch, **reading.values, "texts": reading.n_texts,
            **self._times(reading.seconds), "by_text": reading.by_text, "error": reading.error,
        }  # fmt: skip
        self._record.add(line)
        if reading.error and self._asking.processes.is_first:
            warnings.warn(f"a reading failed ({reading.error}).", ContextWarning, stacklevel=3)
        self._log(reading, control)
        if best and state.global_step and is_best(reading.values.get(best), earlier[1:]):
            self._save_best(line)
        if self._stop_below is not None and has_fallen(self.readings, self._stop_below):
            self._stop(control)

    def _times(self, seconds: float) -> dict[str, float]:
        return {
            "seconds": round(seconds, 3),
            "elapsed_seconds": round(self._budget.elapsed, 3),
            "spent_seconds": round(self._budget.spent, 3),
        }

    def _log(self, reading: Reading, control: Any) -> None:
        """Log through the trainer, in the form that all trainers share.

        TRL's own `log` would also write, and clear, what it has collected for the next regular entry; and
        every entry takes back that one is wanted.
        """
        logs = {PREFIX + name: value for name, value in reading.values.items() if not math.isnan(value)}
        if not logs:
            return
        wanted = control.should_log
        logs[f"{PREFIX}seconds"] = round(reading.seconds, 3)
        Trainer.log(self._trainer, logs)
        control.should_log = self._trainer.control.should_log = wanted

    def _save_best(self, line: dict[str, Any]) -> None:
        """Save the model of the best reading in place of the one before it."""
        folder = self._record.folder / BEST
        saving = folder.with_name(f".{BEST}")
        self._trainer.save_model(str(saving), _internal_call=True)
        self._asking.processes.wait()
        if self._asking.processes.is_first:
            write_atomic(saving / "reading.json", json.dumps(plain_value(line), indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            saving.replace(folder)

    def _stop(self, control: Any) -> None:
        first, *_, last = recalls(self.readings)
        self.stopped = (
            f"the training stops at step {self.readings[-1]['step']}: recall with the template fell from "
            f"{first:.2f} to {last:.2f}, more than {self._stop_below} in two readings in a row."
        )
        control.should_training_stop = True
        if self._asking.processes.is_first:
            warnings.warn(self.stopped, ContextWarning, stacklevel=3)


def _build(
    hf_model: Any,
    tokenizer: Any,
    name: str,
    haystack: str | Haystack | None,
    facts: Sequence[Needle],
    lengths: Sequence[int],
    texts: int,
    seed: int,
) -> QuestionSet:
    """The questions for a model, built from its tokenizer and window."""
    config = hf_model.config
    n_ctx = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31 - 1
    window = Window(name, tokenizer, n_ctx, find_indicator(hf_model, tokenizer))
    material = choose_material(name, haystack=haystack, facts=facts, seed=seed)
    return build_set(window, material, lengths=lengths, n_texts=texts, seed=seed)


def _check_numbers(
    every: int | None, share: float | int, texts: int, lengths: Sequence[int], stop_below: float | None
) -> None:
    if every is not None and every < 1:
        raise InputError(f"every must be at least 1 step, got {every}.")
    if not 0 < share <= 1:
        raise InputError(f"share must be above 0 and at most 1, got {share}; 0.05 means 5 % of the time.")
    if texts < 1:
        raise InputError(f"texts must be at least 1, got {texts}.")
    if not lengths or min(lengths) < 1:
        raise InputError(f"lengths must be numbers of tokens, got {list(lengths)}.")
    if stop_below is not None and not 0 < stop_below < 1:
        raise InputError(f"stop_below must be above 0 and below 1, got {stop_below}.")


__all__ = ["BEST", "ContextCallback", "ContextWarning"]
