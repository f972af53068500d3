"""What a self-check comes to, in two sentences: what `auto` takes and what fits, and what to mind."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ctxlens.chat.roles import RenderedChat, Role, render
from ctxlens.errors import CtxlensError, RenderError
from ctxlens.models import Model
from ctxlens.models.attention.sinks import LATER, RECEIVED
from ctxlens.models.checkpoint import locate_checkpoint
from ctxlens.models.doctor.findings import Finding
from ctxlens.models.dtype_choice import choose_dtype
from ctxlens.models.memory import forecast_memory, free_memory

_QUERIES = 16
_NAMED_SINKS = 2
_ASKED: Sequence[dict[str, str]] = (
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Who built the tower?"},
    {"role": "assistant", "content": "Two brothers."},
    {"role": "user", "content": "When?"},
)


def summarise(model: Model, chat: RenderedChat, findings: Sequence[Finding]) -> tuple[str, ...]:
    """Two sentences about a loaded model.

    Args:
        model: the model, on the backend that `auto` takes.
        chat: the conversation in which sinks are looked for.
        findings: the findings so far.
    """
    dtype, device = _automatic_dtype(model), model.device.type
    first = f"auto takes the {model.backend.name} backend and {dtype} on {device}; {_say_length(model)}."
    notes = [*_sinks(model, chat), *_notes(model, findings)]
    second = "; ".join(notes)
    return (first, f"{second[:1].upper()}{second[1:]}.") if second else (first,)


def _automatic_dtype(model: Model) -> str:
    """The number format that `auto` takes here, whatever the model was loaded with."""
    if model.asked.get("dtype", "auto") != "auto":
        source = locate_checkpoint(model.name)
        found = choose_dtype("auto", source, model.device, backend=model.backend.name)
        return str(found).removeprefix("torch.")
    return model.identity["dtype"]


def _say_length(model: Model) -> str:
    longest = longest_fitting(model, free_memory(model.device))
    if longest >= model.n_ctx:
        return f"conversations of up to {longest} tokens, the whole window, fit into the free memory"
    if not longest:
        return "no conversation fits into the free memory"
    return f"conversations of up to {longest} of the window's {model.n_ctx} tokens fit into the free memory"


def longest_fitting(model: Model, memory: int) -> int:
    """The longest conversation that can be read, steered and answered in some memory, in tokens."""

    def need(length: int) -> int:
        tasks = ("read", "steer", "generate")
        return max(forecast_memory(model, length=length, what=what).run for what in tasks)

    return bisect_right(range(1, model.n_ctx + 1), memory, key=need)


def _sinks(model: Model, chat: RenderedChat) -> Iterator[str]:
    """One clause on how much attention rests on sinks at the last position, and on which tokens."""
    last = chat.n_tokens - 1
    if chat.n_tokens <= LATER:
        return
    try:
        read = model.read_roles(chat, queries=[last], sinks=True)
        queries = np.unique(np.linspace(LATER, last, _QUERIES).astype(int))
        pattern = model.read_patterns(chat, queries=[int(query) for query in queries])
    except CtxlensError:
        return
    assert read.resting is not None
    share = float(np.nanmean(read.resting.sum(-1)))
    named = name_sinks(chat, pattern, queries, read.resting)
    if not named:
        yield "no attention rests on sinks"
        return
    amount = f"{100 * share:.0f} %" if share >= 0.01 else "less than 1 %"
    yield f"{amount} of the attention at the last position rests on sinks: {' and '.join(named)}"


def name_sinks(
    chat: RenderedChat, pattern: np.ndarray, queries: np.ndarray, resting: np.ndarray
) -> list[str]:
    """The tokens that receive most of the attention resting on sinks, in words.

    Args:
        chat: the conversation.
        pattern: attention of some query positions, `[layer, head, query, key]`.
        queries: these positions.
        resting: the shares that rest on sinks by role, `[layer, head, query, role]`.
    """
    later = queries[:, None] > np.arange(chat.n_tokens)
    counts = np.maximum(later.sum(0), 1)
    received = (pattern.mean(1) * later).sum(1) / counts
    rests = resting.mean((1, 2)) > 0
    is_sink = (received >= RECEIVED) & rests[:, chat.role]
    is_sink[:, max(0, chat.n_tokens - LATER) :] = False
    order = np.argsort(-(received * is_sink).sum(0))
    strings, layers = chat.token_strings(), pattern.shape[0]
    return [
        f"{_place(chat, int(at), strings[at])}, in {int(is_sink[:, at].sum())} of {layers} layers"
        for at in order[:_NAMED_SINKS]
        if is_sink[:, at].any()
    ]


def _place(chat: RenderedChat, at: int, text: str) -> str:
    role = Role(int(chat.role[at]))
    kind = {Role.BOS: "BOS", Role.TEMPLATE: "a marker of the template"}.get(role, f"said by the {role.label}")
    where = "the first token" if at == 0 else f"token {at}"
    return f"{where} {text!r} ({kind})"


def _notes(model: Model, findings: Sequence[Finding]) -> Iterator[str]:
    """Clauses on what is unusual about tokenizer, template and layers."""
    tokenizer = model.tokenizer
    if tokenizer.bos_token_id is None:
        yield "the tokenizer has no BOS token"
    elif tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        yield "the tokenizer adds no BOS by itself"
    windows = [layer.window for layer in model.backend.layers if layer.window is not None]
    if windows:
        n_layers = len(model.backend.layers)
        yield f"{len(windows)} of {n_layers} layers see only the last {min(windows)} tokens"
    if tokenizer.chat_template:
        yield from _template_notes(tokenizer)
    refused = [f.check for f in findings if f.area == "roles" and f.said.startswith("Refused")]
    if refused:
        yield f"the template refuses: {', '.join(refused)}"


def _template_notes(tokenizer: Any) -> Iterator[str]:
    try:
        chat = render(tokenizer, _ASKED)
    except RenderError:
        return
    bos = tokenizer.bos_token
    if bos and (chat.tokens == tokenizer.bos_token_id).sum() > 1:
        yield f"the BOS token {bos!r} also begins turns of the template"
    for turn in chat.left_out_turns():
        yield f"the template leaves out what the {chat.messages[turn]['role']} says"


__all__ = ["longest_fitting", "name_sinks", "summarise"]
