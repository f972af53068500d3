"""One reading: the processes share the texts, and all of them get the same result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ctxlens.chat.roles import RenderedChat
from ctxlens.errors import InputError, first_line
from ctxlens.evals.needle.prompts import render_cell
from ctxlens.models import Model
from ctxlens.processes import Processes
from ctxlens.sft.context.questions import QuestionSet, ask, average
from ctxlens.sft.context.trainee import left_as_it_was


@dataclass(frozen=True)
class Reading:
    """What a reading found.

    Attributes:
        values: the mean of every quantity over the texts.
        by_text: the quantities of every text.
        seconds: how long it took.
        error: why there is nothing, in words; empty if there is something.
    """

    values: dict[str, float]
    by_text: list[dict[str, float]]
    seconds: float
    error: str = ""

    @property
    def n_texts(self) -> int:
        """The number of texts that were asked about."""
        return len(self.by_text)


class Asking:
    """Asks the fixed set, a round at a time: in a round every process asks about one text.

    Attributes:
        asked: the whole set.
        n_texts: how many of its texts every reading asks, once the first reading has decided it.
        round_seconds: expected seconds of a round; None before anything was timed.
    """

    def __init__(
        self,
        model: Model,
        asked: QuestionSet,
        processes: Processes,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Prepare without asking.

        Args:
            model: the model.
            asked: the set.
            processes: those that share it.
            autocast: the mixed precision of the training.
        """
        self.model, self.asked, self.processes = model, asked, processes
        self.n_texts: int | None = None
        self.round_seconds: float | None = None
        self._autocast = autocast

    @property
    def n_rounds(self) -> int:
        """Rounds of a reading: of the whole set, until the number of its texts is decided."""
        n_texts = len(self.asked.texts) if self.n_texts is None else self.n_texts
        return -(-n_texts // self.processes.count)

    @property
    def expected_seconds(self) -> float | None:
        """How long a reading is expected to take; None before anything was timed."""
        return None if self.round_seconds is None else self.round_seconds * self.n_rounds

    def forecast(self) -> float:
        """Time two prompts, and forecast from them how long one text takes; the same in all processes.

        A call of a model takes some time however short the prompt is, and then some for every token.
        """
        cell = self.asked.texts[0].cells[0]
        long = render_cell(self.model, cell, self.asked.config, self.asked.conditions[-1])
        question = [{"role": "user", "content": cell.needle.question}]
        short = self.model.render(question, add_generation_prompt=True)
        with self._undisturbed():
            self._time(short)  # warms up
            call, whole = self._time(short), self._time(long)
        per_token = max(0.0, whole - call) / max(1, long.n_tokens - short.n_tokens)
        seconds = self.processes.agree(call * self.asked.passes + per_token * self.asked.tokens)
        self.round_seconds = seconds
        return seconds

    def _time(self, chat: RenderedChat) -> float:
        begun = time.perf_counter()
        with torch.autocast(self.model.device.type, enabled=False):
            self.model.read_roles(chat, sinks=False)
        return time.perf_counter() - begun

    def read(self, limit: Callable[[float], int] | None = None) -> Reading:
        """Ask the set. What a model fails on does not stop the training: the reading says why.

        Args:
            limit: for the first reading: takes the seconds of a round and returns how many rounds every
                reading has. Called in the first process.
        """
        begun = time.perf_counter()
        mine: list[dict[str, float]] = []
        error = ""
        done = 0
        with self._undisturbed():
            while done < self.n_rounds:
                started = time.perf_counter()
                number = done * self.processes.count + self.processes.rank
                if not error and number < (self.n_texts or len(self.asked.texts)):
                    error = self._ask(number, mine)
                done += 1
                if limit is not None:
                    self._decide(limit, time.perf_counter() - started)
                    limit = None
        return self._gather(mine, error, begun)

    def _ask(self, number: int, mine: list[dict[str, float]]) -> str:
        try:
            mine.append(ask(self.model, self.asked, number))
        except Exception as found:  # whatever the model raises concerns this reading, not the training
            return f"{type(found).__name__}: {first_line(found)}"
        return ""

    def _decide(self, limit: Callable[[float], int], seconds: float) -> None:
        """Cut the set to the rounds that the time allows, by the slowest process."""
        all_seconds = self.processes.gather(seconds)
        rounds = limit(max(all_seconds)) if all_seconds is not None else None
        rounds = self.processes.agree(rounds)
        self.n_texts = min(len(self.asked.texts), rounds * self.processes.count)

    def _gather(self, mine: list[dict[str, float]], error: str, begun: float) -> Reading:
        """Put the results of all processes together, in the order of the texts."""
        parts = self.processes.gather((mine, error))
        reading = None
        if parts is not None:
            rounds = max(len(found) for found, _ in parts)
            texts = [found[i] for i in range(rounds) for found, _ in parts if i < len(found)]
            errors = [problem for _, problem in parts if problem]
            seconds = time.perf_counter() - begun
            values = {} if errors else average(texts)
            reading = Reading(values, [] if errors else texts, seconds, errors[0] if errors else "")
        reading = self.processes.agree(reading)
        self.round_seconds = reading.seconds / self.n_rounds
        return reading

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        hf_model = getattr(self.model.backend, "hf_model", None)
        with left_as_it_was(hf_model), self._autocast():
            yield


def wrap(hf_model: Any, tokenizer: Any, name: str) -> Model:
    """The model under training as one that can be asked; it is left as it was.

    Raises:
        UnsupportedModelError: its attention cannot be read exactly.
    """
    with left_as_it_was(hf_model):
        try:
            return Model.from_hf(hf_model, tokenizer, backend="native", name=name)
        except InputError as error:
            raise type(error)(str(error).replace('; try backend="lens"', "")) from error


__all__ = ["Asking", "Reading", "wrap"]
