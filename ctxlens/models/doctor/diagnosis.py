"""The self-check: can the results for this model be trusted, and how much memory will they need?"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ctxlens.chat.roles import RenderedChat
from ctxlens.errors import CtxlensError, InputError, MissingPackageError, UnsupportedModelError
from ctxlens.models import Model
from ctxlens.models.backends.protocol import LayerFacts
from ctxlens.models.doctor import attention
from ctxlens.models.doctor.findings import Diagnosis, Finding
from ctxlens.models.doctor.spans import TURNS, Messages, check_roles
from ctxlens.models.doctor.summary import summarise
from ctxlens.models.memory import MemoryForecast, forecast_memory, free_memory
from ctxlens.runs import Progress

LONGEST_PROBE = 512
"""Upper bound on the tokens on which parity is checked, because eager patterns grow with their square."""

DEFAULT_LENGTH = 8192


def diagnose(
    tokenizer: Any,
    load: Callable[[str], Model],
    *,
    conversations: Sequence[Messages] = (),
    length: int | None = None,
    with_lens: bool = True,
    with_eager: bool = True,
    progress: Progress | None = None,
) -> Diagnosis:
    """Check a model: role spans, parity of three ways, causality, padding, steering, memory.

    The three ways to the same shares are ctxlens' fused call (`native`), TransformerLens hooks (`lens`) and
    transformers' eager patterns, reduced. The first and the last share their weights. TransformerLens changes
    the modules of a model, so it gets a model of its own, after the first one is released.

    Args:
        tokenizer: the model's tokenizer, with the chat template in use.
        load: returns a freshly loaded model for `native` and for `lens`; called once for each.
        conversations: the user's own conversations, whose roles are checked too. The first one is read,
            truncated to the window or to 512 tokens. By default a probe conversation is read.
        length: tokens for the memory forecast; by default the model's window, at most 8,192.
        with_lens: whether to compare with TransformerLens.
        with_eager: whether to compare with eager patterns.
        progress: called with the number of steps done and the total.

    Returns:
        The findings. Failures and refusals are findings too and raise nothing.

    Raises:
        InputError: a length below 1; a checkpoint that cannot be loaded.
    """
    if length is not None and length < 1:
        raise InputError(f"length is {length}; expected the tokens of a conversation, at least 1.")
    checkup = _Checkup(tokenizer, load, conversations, length, with_lens, with_eager)
    findings = []
    for step, found in enumerate(checkup.steps(), start=1):
        findings += found
        if progress:
            progress(step, checkup.N_STEPS)
    if progress:
        progress(checkup.N_STEPS, checkup.N_STEPS)
    return Diagnosis(checkup.identity, tuple(findings), checkup.layers, checkup.forecasts, checkup.summary)


class _Checkup:
    """One self-check while it runs."""

    N_STEPS = 6

    def __init__(
        self,
        tokenizer: Any,
        load: Callable[[str], Model],
        conversations: Sequence[Messages],
        length: int | None,
        with_lens: bool,
        with_eager: bool,
    ) -> None:
        self.tokenizer, self.load = tokenizer, load
        self.conversations, self.length = conversations, length
        self.with_lens, self.with_eager = with_lens, with_eager
        self.identity: Mapping[str, Any] = {}
        self.layers: tuple[LayerFacts, ...] = ()
        self.forecasts: tuple[MemoryForecast, ...] = ()
        self.summary: tuple[str, ...] = ()

    def steps(self) -> Iterator[list[Finding]]:
        """The findings of every step."""
        roles = list(check_roles(self.tokenizer, self.conversations))
        yield roles
        native, refusal = self._try_loading("native")
        if native is None:
            yield [Finding("attention", "native", "skipped", f"Refused: {refusal}")]
            yield from self._without_native(roles)
            return
        yield [self._look_at_layers(native)]
        chat, short = self._choose_chats(native)
        ours = attention.observe(native, chat)
        yield self._compare_with_eager(native, chat, ours)
        yield self._check_use(native, chat, short)
        yield [self._forecast(native)]
        self.summary = summarise(native, chat, roles)
        dtype = native.backend.dtype
        del native  # before TransformerLens loads weights of its own
        gc.collect()
        yield self._compare_with_lens(chat, ours, dtype)

    def _without_native(self, roles: list[Finding]) -> Iterator[list[Finding]]:
        lens, refusal = self._try_loading_lens() if self.with_lens else (None, "not requested.")
        if lens is None:
            said = f"No backend can read this model; TransformerLens: {refusal}"
            yield [Finding("attention", "any way", "fail", said)]
            return
        self.layers = lens.backend.layers
        chat, short = self._choose_chats(lens)
        yield self._check_use(lens, chat, short)
        yield [self._forecast(lens)]
        self.summary = summarise(lens, chat, roles)

    def _try_loading(self, backend: str) -> tuple[Model | None, str]:
        """A model, or one sentence on why there is none."""
        try:
            model = self.load(backend)
        except UnsupportedModelError as error:
            return None, str(error)
        self.identity = self.identity or {k: v for k, v in model.identity.items() if k != "backend"}
        return model, ""

    def _try_loading_lens(self) -> tuple[Model | None, str]:
        """A model read through TransformerLens, or one sentence on why there is none."""
        try:
            return self._try_loading("lens")
        except MissingPackageError as error:
            return None, str(error)
        except CtxlensError:
            raise
        except Exception as error:  # TransformerLens raises all kinds of errors for models it does not know
            return None, f"it raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def _look_at_layers(self, model: Model) -> Finding:
        """The path of every layer, as it was taken when the backend first ran the model."""
        self.layers = model.backend.layers
        paths = [layer.path for layer in self.layers]
        counts = ", ".join(f"{paths.count(path)} {path}" for path in dict.fromkeys(paths))
        said = f"Our attention was called in {len(paths)} of {model.n_layers} layers: {counts}."
        outcome = "pass" if len(paths) == model.n_layers else "fail"
        return Finding("attention", "our function is called", outcome, said)

    def _choose_chats(self, model: Model) -> tuple[RenderedChat, RenderedChat]:
        """The conversation that is read, and the shorter one that is padded to it."""
        longest = min(LONGEST_PROBE, model.n_ctx - attention.NEW_TOKENS)
        render = model.render if self.tokenizer.chat_template else model.render_plain
        options = {"max_tokens": longest, "truncate": True}
        for messages in (*self.conversations[:1], TURNS[:3], TURNS[:1]):
            open_ended = messages[-1]["role"] != "assistant"
            try:
                chat = render(messages, add_generation_prompt=open_ended, **options)
                break
            except CtxlensError:
                render = model.render_plain if messages is TURNS[:3] else render
        else:
            chat = model.render_plain(TURNS[:1], **options)
        short = model.render_plain(TURNS[:1], max_tokens=max(2, chat.n_tokens // 2), truncate=True)
        return chat, short

    def _compare_with_eager(
        self, model: Model, chat: RenderedChat, ours: attention.Observed
    ) -> list[Finding]:
        dtype = model.backend.dtype
        own = attention.read_own_logits(model, chat)
        if own is None:
            said = "The backend cannot run this model without our attention."
            return [Finding("parity", "native = eager", "skipped", said)]
        found = [attention.compare_logits(ours, own, dtype)]
        if not self.with_eager:
            return [*found, Finding("parity", "native = eager", "skipped", "Not requested.")]
        try:
            theirs = attention.observe_eagerly(model, chat, own)
        except (ValueError, NotImplementedError) as error:
            said = f"transformers gives no eager patterns for this model to compare with ({error})."
            return [*found, Finding("parity", "native = eager", "skipped", said)]
        return found + attention.compare_ways("native", ours, "eager", theirs, dtype)

    def _compare_with_lens(self, chat: RenderedChat, ours: attention.Observed, dtype: Any) -> list[Finding]:
        if not self.with_lens:
            return [Finding("parity", "native = lens", "skipped", "Not requested.")]
        lens, refusal = self._try_loading_lens()
        if lens is None:
            return [Finding("parity", "native = lens", "skipped", f"Refused: {refusal}")]
        theirs = attention.observe(lens, chat)
        return attention.compare_ways("native", ours, "lens", theirs, dtype)

    def _check_use(self, model: Model, chat: RenderedChat, short: RenderedChat) -> list[Finding]:
        return [
            attention.check_causality(model, chat),
            attention.check_padding(model, chat, short),
            *attention.check_steering(model, chat),
            attention.check_generation(model, chat),
        ]

    def _forecast(self, model: Model) -> Finding:
        length = self.length or min(model.n_ctx, DEFAULT_LENGTH)
        new = min(attention.NEW_TOKENS, length)
        self.forecasts = tuple(
            forecast_memory(model, length=length, what=what, new_tokens=new if what == "generate" else 0)
            for what in ("read", "steer", "generate")
        )
        need, free = max(forecast.run for forecast in self.forecasts), free_memory(model.device)
        said = (
            f"One conversation of {length} tokens needs up to {_in_words(need)} beyond the weights; "
            f"{_in_words(free)} are free on {model.device.type}."
        )
        outcome = "pass" if need <= free else "fail" if self.length else "skipped"
        return Finding("memory", "fits", outcome, said)


def _in_words(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


__all__ = ["DEFAULT_LENGTH", "LONGEST_PROBE", "diagnose"]
