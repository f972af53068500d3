"""Before an audit measures anything: what the model is, what it allows, and how fast it is here."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ctxlens.auditing.plan import CONDITIONS, LADDER
from ctxlens.auditing.speed import Speed, measure_speed
from ctxlens.chat.condition import Condition
from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.errors import InputError, RenderError
from ctxlens.evals.needle.cells import SPARE_TOKENS
from ctxlens.evals.needle.controls import Renderer, render_controlled
from ctxlens.evals.texts import Material
from ctxlens.models import Model
from ctxlens.models.memory import forecast_memory, free_memory


@dataclass(frozen=True)
class Ready:
    """What an audit knows before it begins.

    Attributes:
        model: name, backend, number format and device, in words.
        longest: the longest context in tokens that window and memory hold.
        overhead: tokens that template, question and answer take.
        controls: the controls that template and tokenizer allow.
        sinks: share of the attention that rests on sinks in a short chat, without and with the template.
        speed: the measured speed.
    """

    model: str
    longest: int
    overhead: int
    controls: tuple[Condition, ...]
    sinks: tuple[float, float]
    speed: Speed

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "controls": [condition.name for condition in self.controls]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Ready:
        """What `as_dict` has described."""
        return cls(
            **{
                **values,
                "controls": tuple(map(Condition.parse, values["controls"])),
                "sinks": tuple(values["sinks"]),
                "speed": Speed(**values["speed"]),
            }
        )

    def describe(self) -> list[str]:
        """In lines, for the terminal."""
        plain, template = self.sinks
        return [
            self.model,
            f"every token has its role; sinks hold {plain:.0%} of the attention without the template and "
            f"{template:.0%} with it",
            f"reads {self.speed.tokens_per_second:,.0f} tokens/s; contexts of up to {self.longest:,} tokens "
            "fit",
        ]


def look(model: Model, material: Material, max_new_tokens: int) -> Ready:
    """Check that a model can be audited, and measure its speed.

    Raises:
        InputError: no chat template, or a window or memory that is too small for any text.
        RenderError: a template whose tokens cannot be told apart by speaker.
    """
    if not getattr(model.tokenizer, "chat_template", None):
        raise InputError(
            f"{model.name} has no chat template, so there is nothing to compare; give one with "
            "--chat-template (for a base model, that of its instruction-tuned version, or chatml, which "
            "comes with ctxlens)."
        )
    overhead = max(
        model.render(messages, continue_final_message=True).n_tokens
        for messages in ([
            {"role": "user", "content": f"\n{fact.question}"},
            {"role": "assistant", "content": fact.prefix},
        ] for fact in material.facts)
    ) + max_new_tokens + SPARE_TOKENS  # fmt: skip
    longest = longest_in_memory(model, model.n_ctx - overhead)
    if longest < LADDER[0] // 2:
        raise InputError(
            f"{model.name} holds contexts of at most {max(0, longest)} tokens beside template, question and "
            f"answer, too few for an audit; use a model with a larger window or more memory."
        )
    words = " ".join(itertools.islice(material.haystack.sentences(0, 4000), 400))
    backend = model.backend
    return Ready(
        f"{model.name}: {backend.name} backend, {str(backend.dtype).removeprefix('torch.')}, {model.device}, "
        f"{model.n_layers} x {model.n_heads} heads, window {model.n_ctx:,}",
        longest,
        overhead,
        find_controls(model),
        read_sinks(model, words),
        measure_speed(model, words),
    )


def longest_in_memory(model: Model, n_tokens: int) -> int:
    """The longest context up to `n_tokens` that the free memory holds, from the steps of the plan.

    The cache counts twice: the questions about a text share the part of it that is kept for them.
    """
    steps = sorted({n_tokens, *(length for length in LADDER if length < n_tokens)}, reverse=True)
    for length in steps:
        forecast = forecast_memory(model, length=max(1, length), what="generate")
        if forecast.run + forecast.cache <= free_memory(model.device):
            return length
    return 0


def find_controls(model: Renderer) -> tuple[Condition, ...]:
    """The controls that a model's template and tokenizer allow, as conditions with prefix."""
    plain = model.render_plain(_MESSAGES, continue_final_message=True)
    controls = [Condition(template=False, prefix=True, control="matched")]
    if plain.role[0] == Role.BOS:
        controls.append(Condition(template=False, prefix=True, control="nobos"))
    elif model.tokenizer.bos_token_id is not None:
        controls.append(Condition(template=False, prefix=True, control="bos"))
    without = Condition(prefix=True, control="nosystem")
    try:
        default = model.render(_MESSAGES, continue_final_message=True)
        bare = render_controlled(model, _MESSAGES, without, continue_final_message=True)
    except (InputError, RenderError):
        return tuple(controls)
    if bare.n_tokens < default.n_tokens:  # the template has a default system prompt
        controls.append(without)
    return tuple(controls)


_MESSAGES = ({"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "It is"})


def read_sinks(model: Model, words: str) -> tuple[float, float]:
    """The share of the attention before an answer that rests on sinks, without and with template."""
    text = " ".join(words.split()[:150])
    question = [{"role": "user", "content": f"{text}\nWhat is this about?"}]
    found = []
    for condition in CONDITIONS:
        render = model.render if condition.template else model.render_plain
        found.append(sink_share(model, render(question, add_generation_prompt=True)))
    return found[0], found[1]


def sink_share(model: Model, chat: RenderedChat) -> float:
    """The share of attention on sinks at the last position, mean over layers and heads."""
    return float(model.read_roles(chat, sinks=True).with_sinks_apart().share(Role.SINK).mean())


__all__ = ["Ready", "find_controls", "look"]
