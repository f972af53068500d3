"""How long this model needs on this machine, measured in a few seconds, to plan an audit by its budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ctxlens.chat.roles import RenderedChat
from ctxlens.models import Model

QUESTIONS = 4
"""Questions about one text while the speed is measured."""
_LONG, _NEW = 256, 16
_SHARED = 2.0
"""Four questions that take less than this many readings share one."""
_PARAMETERS = 12
"""Weights of a common layer, in squares of its width."""


@dataclass(frozen=True)
class Speed:
    """Measured times.

    Attributes:
        per_token: seconds of reading per token.
        per_square: seconds of reading per token and token before it (attention), by arithmetic.
        answers: seconds to write the answers to the questions about one text.
        repeats: how many times a text is read in effect for all its questions; 1 if the model keeps what it
            has read.
        steered: time of reading with steering, as a factor.
    """

    per_token: float
    per_square: float
    answers: float
    repeats: float
    steered: float

    def reading(self, n_tokens: int) -> float:
        """Seconds to read a prompt once."""
        return self.per_token * n_tokens + self.per_square * n_tokens**2

    def text(self, n_tokens: int, questions: int = QUESTIONS) -> float:
        """Seconds to read a text and to answer all its questions."""
        repeats = 1 + (self.repeats - 1) * (questions - 1) / (QUESTIONS - 1)
        return repeats * self.reading(n_tokens) + self.answers * questions / QUESTIONS

    @property
    def tokens_per_second(self) -> float:
        """Tokens read per second in a prompt of 1,000 tokens."""
        return 1000 / self.reading(1000)


def measure_speed(model: Model, words: str) -> Speed:
    """Time reading and writing on prompts of 256 tokens, or half the window if that is less.

    How much slower longer prompts are follows from the number of operations of attention and of a common
    layer; timing it would take long prompts.

    Args:
        model: the model.
        words: any text of at least a thousand words.
    """
    long = min(_LONG, model.n_ctx // 2)
    one = [_prompt(model, words, long, 0)]
    several = [_prompt(model, words, long, number) for number in range(QUESTIONS)]
    brief = [_prompt(model, words, 24, number) for number in range(QUESTIONS)]
    _time(lambda: model.generate(brief, max_new_tokens=1))  # the first call is slower
    slow = _time(lambda: model.generate(one, max_new_tokens=1))
    answers = _time(lambda: model.generate(brief, max_new_tokens=_NEW))
    together = _time(lambda: model.generate(several, max_new_tokens=_NEW), 1)
    with model.steer(0.5):
        steered = _time(lambda: model.generate(one, max_new_tokens=1))
    repeats = min(float(QUESTIONS), (together - answers) / slow)
    if repeats < _SHARED:  # the text is read once; what remains is the writing after a longer text
        repeats, answers = 1.0, max(answers, together - slow)
    squares = attention_share(model)
    token = slow / long / (1 + squares * long)
    return Speed(
        per_token=token,
        per_square=squares * token,
        answers=answers,
        repeats=repeats,
        steered=max(1.0, steered / slow),
    )


def attention_share(model: Model) -> float:
    """Operations of attention for each earlier token, over those of a token's layers: about 1 / (12 × width).

    Causal attention takes 2 × heads × head width operations per token and earlier token on average over a
    prompt, a weight takes 2 per token. Layers with a sliding window do not count.
    """
    shape = model.backend.shape
    whole = sum(facts.window is None for facts in model.backend.layers) / shape.n_layers
    return whole * shape.n_heads * shape.d_head / (_PARAMETERS * shape.d_model**2)


def _prompt(model: Model, words: str, n_tokens: int, number: int) -> RenderedChat:
    """A prompt of about this many tokens; prompts of other numbers differ from it only at the end."""
    ids: Sequence[int] = model.tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
    text = model.tokenizer.decode((list(ids) * (n_tokens // len(ids) + 1))[:n_tokens])
    ending = f"{text}\n{'What is said about the harbour? ' * (number > 0)}Question {number}"
    return model.render_plain([{"role": "user", "content": ending}], add_generation_prompt=True)


def _time(work: Callable[[], object], runs: int = 2) -> float:
    """Seconds of the fastest of some runs, because other work on the machine only makes runs slower."""
    seconds = []
    for _ in range(runs):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


__all__ = ["QUESTIONS", "Speed", "measure_speed"]
