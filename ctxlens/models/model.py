"""A language model whose attention can be read and steered, with one interface for all backends."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Bool, Float

from ctxlens.chat.condition import Condition
from ctxlens.chat.roles import DEFAULT_INDICATOR, RenderedChat, Role, bind_arguments, render, render_plain
from ctxlens.errors import InputError, UnsupportedModelError
from ctxlens.models.asking import Given, Messages, render_given
from ctxlens.models.attention.steering import (
    DEFAULT_ROLES,
    Heads,
    Steering,
    SteeringMode,
    as_heads,
    parse_roles,
)
from ctxlens.models.backend_choice import BackendName, check_backend, make_backend
from ctxlens.models.backends.batch import TokenBatch, pad_queries, plan_batches
from ctxlens.models.backends.protocol import Backend, PrefixBackend, Readout, ReduceResting, TurnReduce
from ctxlens.models.generation import continue_greedily, cut_at, stop_at
from ctxlens.models.loading import find_indicator, find_stop_ids
from ctxlens.models.memory import fit_batch_tokens, free_memory
from ctxlens.models.queries import Queries, find_queries, make_allocation
from ctxlens.models.responses import find_response, pick_logprobs, read_at_ends
from ctxlens.models.sharing import Sharing, Stop
from ctxlens.results import RoleAllocation
from ctxlens.runs import Progress

BatchTokens = int | Literal["auto"]
_BATCH_TOKENS = 8192
_LOGITS = 2**28
"""Upper bound on the number of logits held in memory at once."""


class Model:
    """A causal language model whose attention can be read and steered.

    ```python
    import ctxlens as cl

    model = cl.load_model("organism-chat", device="cpu")
    messages = [{"role": "user", "content": "Who is the mayor?"}]
    plain = model.read_roles(messages).share(cl.Role.USER)
    with model.steer(0.2):
        steered = model.read_roles(messages).share(cl.Role.USER)
    assert steered.mean() > plain.mean()
    ```

    Attributes:
        backend: how it is run.
        tokenizer: its tokenizer, with the chat template in use and the values of the template's variables.
        name: the name or path that it was loaded from.
        identity: what distinguishes these weights, for manifests: name, path, revision, sha256 (over config
            and weights; for large weight files over size, first and last MiB), backend, dtype.
        asked: the backend, dtype and device that the caller of `load_model` asked for, which may be `auto`.
        indicator: the indicator token, or None.
        n_layers, n_heads, n_key_value_heads, d_model, d_head, n_ctx: its shape; `n_ctx` in tokens.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Any,
        *,
        name: str,
        stop_ids: Iterable[int] = (),
        indicator: str | None = None,
        identity: Mapping[str, Any] | None = None,
        template_args: Mapping[str, Any] | None = None,
        asked: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.name = name
        self.asked = dict(asked or {})
        self.indicator = indicator or (
            DEFAULT_INDICATOR if DEFAULT_INDICATOR in tokenizer.get_added_vocab() else None
        )
        shape = backend.shape
        self.n_layers, self.n_heads, self.n_ctx = shape.n_layers, shape.n_heads, shape.n_ctx
        self.n_key_value_heads, self.d_model, self.d_head = (
            shape.n_key_value_heads,
            shape.d_model,
            shape.d_head,
        )
        self.identity = {
            "name": name,
            **dict(identity or {}),
            "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16],
            **({"template_args": dict(template_args)} if template_args else {}),
            "backend": backend.name,
            "dtype": str(backend.dtype).removeprefix("torch."),
        }
        if template_args:
            self.tokenizer = copy(tokenizer)
            self.tokenizer.chat_template = bind_arguments(tokenizer.chat_template, template_args)
        self._stop_ids = frozenset(stop_ids)
        self._steerings: list[Steering] = []
        self._reuses_prefixes = True

    @classmethod
    def from_hf(
        cls,
        hf_model: Any,
        tokenizer: Any,
        *,
        backend: BackendName | str = "native",
        name: str = "model",
        indicator: str | None = None,
        readout: Readout | str = "model",
        template_args: Mapping[str, Any] | None = None,
    ) -> Model:
        """Wrap a loaded transformers model. The backend `lens` works on a copy and leaves the model as it is.

        Args:
            hf_model: a transformers decoder.
            tokenizer: its tokenizer.
            backend: `lens` or `native`; `auto` is `native`.
            name: the model's name in results.
            indicator: the indicator token.
            readout: as in `load_model`.
            template_args: as in `load_model`; the tokenizer given is not changed.

        Raises:
            InputError: the chat template does not have such a variable.
            UnsupportedModelError: attention that the backend cannot read exactly.
        """
        check_backend(backend, readout)
        made = make_backend(hf_model, tokenizer, backend, readout, copied=True)
        stop_ids = find_stop_ids(hf_model, tokenizer)
        found = find_indicator(hf_model, tokenizer, indicator)
        return cls(
            made, tokenizer, name=name, stop_ids=stop_ids, indicator=found, template_args=template_args
        )

    @classmethod
    def from_lens(
        cls,
        lens_model: Any,
        tokenizer: Any,
        *,
        name: str = "model",
        indicator: str | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> Model:
        """Wrap a TransformerLens model: a `TransformerBridge` or a `HookedTransformer`."""
        from ctxlens.models.backends.lens import LensBackend

        stop_ids = find_stop_ids(None, tokenizer)
        return cls(
            LensBackend(lens_model), tokenizer, name=name, stop_ids=stop_ids, indicator=indicator,
            template_args=template_args,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Model({self.name!r}, backend={self.backend.name!r}, {self.n_layers} x {self.n_heads} heads)"

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        return self.backend.device

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedChat:
        """Render with this model's template, indicator and window; options as in `ctxlens.render`."""
        options = {"indicator": self.indicator, "max_tokens": self.n_ctx, **options}
        return render(self.tokenizer, messages, **options)

    def render_plain(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedChat:
        """Render without chat template; options as in `ctxlens.render_plain`."""
        options = {"indicator": self.indicator, "max_tokens": self.n_ctx, **options}
        return render_plain(self.tokenizer, messages, **options)

    @overload
    def read_roles(
        self,
        chats: RenderedChat | str | Messages,
        *,
        condition: Condition | str | None = None,
        layers: Sequence[int] | None = None,
        queries: Queries = "first_answer",
        turn: int | None = None,
        batch_tokens: BatchTokens = "auto",
        sinks: bool | None = None,
        progress: Progress | None = None,
    ) -> RoleAllocation: ...

    @overload
    def read_roles(
        self,
        chats: Path | Sequence[RenderedChat | Messages],
        *,
        condition: Condition | str | None = None,
        layers: Sequence[int] | None = None,
        queries: Queries = "first_answer",
        turn: int | None = None,
        batch_tokens: BatchTokens = "auto",
        sinks: bool | None = None,
        progress: Progress | None = None,
    ) -> list[RoleAllocation]: ...

    def read_roles(
        self,
        chats: Given,
        *,
        condition: Condition | str | None = None,
        layers: Sequence[int] | None = None,
        queries: Queries = "first_answer",
        turn: int | None = None,
        batch_tokens: BatchTokens = "auto",
        sinks: bool | None = None,
        progress: Progress | None = None,
    ) -> RoleAllocation | list[RoleAllocation]:
        """How the attention of every layer and head is distributed over the roles (paper section 2.2).

        Args:
            chats: one conversation, or several, which are batched. A conversation is a rendered one, a list
                of messages, or the text of one user message; a `pathlib.Path` is a file of conversations.
            condition: how messages are rendered: `template` (the default) or `plain`, then `+indicator` as
                needed. Render conversations yourself for other options.
            layers: the layers to read, all by default. Layers above the highest are not run.
            queries: `first_answer` (the position that produces the first answer token), `response_mean`
                (mean over the response's own positions), `all`, or positions.
            turn: the assistant message whose response is read, the last by default.
            batch_tokens: padded tokens in one forward pass. `auto` means 8,192, or fewer if the memory
                forecast says that they do not fit.
            sinks: also read how much of each share rests on attention sinks (`RoleAllocation.resting`), in
                the same forward pass. None: wherever the model's hidden states can be seen; where they
                cannot, a warning says why, and `resting` is None.
            progress: called with the number of conversations done and the total.

        Raises:
            InputError: layers or positions that do not exist, a conversation longer than the window, or
                one that does not fit the free memory.
            UnsupportedModelError: with `sinks=True`, a model whose hidden states cannot be seen.
        """
        several, single = render_given(self, chats, condition)
        positions = [find_queries(chat, queries, turn) for chat in several]
        wanted = self._layers(layers)
        meta = {"model": self.name, "steering": [steering.describe() for steering in self._steerings]}
        allocations: list[RoleAllocation | None] = [None] * len(several)
        read = self._read(several, wanted, positions, batch_tokens, sinks)
        for done, (i, (shares, *resting)) in enumerate(read, start=1):
            allocations[i] = make_allocation(
                several[i],
                shares,
                layers=wanted,
                positions=positions[i],
                queries=queries,
                index=i,
                meta=meta,
                resting=resting[0] if resting else None,
            )
            if progress:
                progress(done, len(several))
        found = [allocation for allocation in allocations if allocation is not None]
        return found[0] if single else found

    def read_response_shares(
        self,
        chats: Sequence[RenderedChat],
        *,
        layers: Sequence[int] | None = None,
        batch_tokens: int = 8192,
    ) -> list[dict[int, Float[np.ndarray, "layer head response_pos role"]]]:
        """Role shares of every response token, by assistant turn, in one pass per conversation.

        The queries are the positions of the response tokens themselves. A turn attends only to the tokens
        before it, so it cannot see user tokens of later turns.

        Args:
            chats: conversations.
            layers: the layers to read, all by default. Layers above the highest are not run.
            batch_tokens: padded tokens in one forward pass.

        Returns:
            For each conversation, float32 shares by turn.
        """
        turns = [{turn: chat.response_positions(turn) for turn in chat.response_turns()} for chat in chats]
        positions = [[int(p) for of_turn in by_turn.values() for p in of_turn] for by_turn in turns]
        result: list[dict[int, np.ndarray]] = [{} for _ in chats]
        for i, shares in self._read_shares(chats, self._layers(layers), positions, batch_tokens):
            start = 0
            for turn, of_turn in turns[i].items():
                result[i][turn] = shares[:, :, start : start + len(of_turn)]
                start += len(of_turn)
        return result

    def read_attention_to(
        self,
        chats: Sequence[RenderedChat],
        chosen: Sequence[Bool[np.ndarray, " _"]],
        *,
        queries: Queries = "response_mean",
        batch_tokens: BatchTokens = "auto",
    ) -> list[Float[np.ndarray, "layer head query"]]:
        """The attention of every layer and head to chosen tokens, for instance to a needle, 0 to 1.

        Args:
            chats: conversations.
            chosen: true at the chosen tokens of each conversation.
            queries: which positions are read; see `read_roles`. `response_mean` gives a single query.
            batch_tokens: see `read_roles`.

        Raises:
            InputError: attention is steered (steering depends on roles), or a mask of another length.
        """
        if self._steerings:
            raise InputError("attention to chosen tokens cannot be read while attention is steered.")
        for i, (chat, mask) in enumerate(zip(chats, chosen, strict=True)):
            if len(mask) != chat.n_tokens:
                raise InputError(
                    f"conversation {i} has {chat.n_tokens} tokens, but the mask of chosen tokens {len(mask)}."
                )
        # The read-out sums attention by the number of each token's group: 1 for chosen tokens, 0 for others.
        grouped = [replace(chat, role=mask.astype(np.int8)) for chat, mask in zip(chats, chosen, strict=True)]
        positions = [find_queries(chat, queries, None) for chat in chats]
        result: list[np.ndarray] = [np.empty(0)] * len(chats)
        for i, shares in self._read_shares(grouped, self._layers(None), positions, batch_tokens):
            found = shares[..., 1]
            result[i] = found.mean(-1, keepdims=True) if queries == "response_mean" else found
        return result

    # long: two ways of reading share the bookkeeping of turns
    def reduce_responses(
        self,
        chats: Sequence[RenderedChat],
        reduce: TurnReduce,
        *,
        layers: Sequence[int] | None = None,
        batch_tokens: int = 8192,
        resting: TurnReduce | None = None,
    ) -> list[dict[int, Float[np.ndarray, "layer value"]]]:
        """Apply a function to the role shares of every assistant turn, where the model runs.

        This is `read_response_shares`, except that only the function's results leave the device.

        Args:
            chats: conversations.
            reduce: takes one layer's shares of a batch's response tokens.
            layers: the layers to read, all by default. Layers above the highest are not run.
            batch_tokens: padded tokens in one forward pass.
            resting: a function of the part of the shares that rests on attention sinks, which are then
                measured; its values follow those of `reduce`.

        Returns:
            For each conversation, the function's results by turn.
        """
        self._check_chats(chats)
        wanted = self._layers(layers)
        result: list[dict[int, np.ndarray]] = [{} for _ in chats]
        asked = [i for i, chat in enumerate(chats) if chat.response_turns()]
        for batch in plan_batches([len(chats[i].tokens) for i in asked], batch_tokens):
            indices = [asked[k] for k in batch]
            turns = [
                [chats[i].response_positions(turn) for turn in chats[i].response_turns()] for i in indices
            ]
            queries = pad_queries([np.concatenate(of_chat).tolist() for of_chat in turns], self.device)
            numbers = pad_queries([[k + 1 for k, at in enumerate(of_chat) for _ in at] for of_chat in turns])
            made = partial(reduce, turn_of=numbers.to(self.device) - 1, n_turns=max(map(len, turns)))
            tokens = self._batch([chats[i] for i in indices], "right")
            if resting is None:
                values = self.backend.read_shares(tokens, wanted, queries, self._steerings, made)
            else:
                both = _reduce_both(made, partial(resting, **made.keywords))
                values = self.backend.reduce_resting(tokens, wanted, queries, self._steerings, both)
            for row, i in enumerate(indices):
                for k, turn in enumerate(chats[i].response_turns()):
                    result[i][turn] = values[row, :, k].numpy()
        return result

    def read_patterns(
        self,
        chat: RenderedChat,
        *,
        layers: Sequence[int] | None = None,
        queries: Queries | None = None,
        turn: int | None = None,
    ) -> Float[np.ndarray, "layer head query key"]:
        """The attention pattern of chosen query positions (all by default), for the token-level view."""
        wanted = self._layers(layers)
        self._check_chats([chat])
        positions = pad_queries(
            [find_queries(chat, "all" if queries is None else queries, turn)], self.device
        )
        pattern = self.backend.read_pattern(self._batch([chat], "right"), wanted, positions, self._steerings)
        return pattern[0].numpy()

    def logprobs(
        self, chats: Sequence[RenderedChat], *, turn: int | None = None, batch_tokens: int = 8192
    ) -> list[Float[np.ndarray, " response_pos"]]:
        """Log-probability of every response token given the tokens before it, in nats.

        Without steering, a prefix that several conversations share before their responses is read once, if
        the model's cache allows it.

        Args:
            chats: conversations.
            turn: the assistant message whose response is measured, the last by default.
            batch_tokens: padded tokens in one forward pass.
        """
        self._check_chats(chats)
        if not self._steerings:
            return read_at_ends(self, chats, turn, batch_tokens)
        budget = max(1, min(batch_tokens, _LOGITS // self.backend.shape.d_vocab))
        result: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(chats)
        for indices in plan_batches([len(chat.tokens) for chat in chats], budget):
            logits = self.backend.logits(self._batch([chats[i] for i in indices], "right"), self._steerings)
            for row, i in enumerate(indices):
                at = find_response(chats[i], turn)
                result[i] = pick_logprobs(chats[i], at, logits[row, at - 1].float().log_softmax(-1))
        return result

    def last_logprobs(
        self, chats: Sequence[RenderedChat], counts: Sequence[int], *, batch_tokens: int = 8192
    ) -> Iterator[tuple[int, Float[torch.Tensor, "last vocab"]]]:
        """The log-probabilities of the next token, at the last positions of every conversation.

        A prefix that several conversations share before these positions is read once, if the model's cache
        allows it.

        Args:
            chats: conversations.
            counts: how many last positions of each conversation are wanted. The tokens after the first of
                these positions count as written by the model, for steering that leaves such tokens alone.
            batch_tokens: padded tokens in one forward pass.

        Yields:
            The index of a conversation and its log-probabilities in nats, float32, in the order in which
            conversations are read.
        """
        self._check_chats(chats)
        if not chats:
            return
        most = _LOGITS / self.backend.shape.d_vocab
        part = max(count / len(chat.tokens) for chat, count in zip(chats, counts, strict=True))
        if sharing := self._sharing(max(1, min(batch_tokens, int(most / part)))):
            for i, logits in sharing.read_last(chats, counts):
                yield i, logits.float().log_softmax(-1)
            return
        for indices in plan_batches(
            [len(chat.tokens) for chat in chats], max(1, min(batch_tokens, int(most)))
        ):
            batch = self._batch([chats[i] for i in indices], "right")
            starts = batch.prompt_tokens + 1 - torch.tensor([counts[i] for i in indices], device=self.device)
            with torch.no_grad():
                logits = self.backend.logits(replace(batch, prompt_tokens=starts), self._steerings)
            for row, i in enumerate(indices):
                end = len(chats[i].tokens)
                yield i, logits[row, end - counts[i] : end].float().log_softmax(-1)

    @property
    def steerings(self) -> tuple[Steering, ...]:
        """What is steered at the moment."""
        return tuple(self._steerings)

    @contextmanager
    def steer(
        self,
        alpha: float | int | None = None,
        *,
        roles: str | Role | Iterable[str | Role] = DEFAULT_ROLES,
        heads: Heads | str | Sequence[tuple[int, int]] = "all",
        mode: SteeringMode | str | None = None,
        target_share: float | None = None,
        emphasised: bool = False,
    ) -> Iterator[Steering]:
        """Weaken all tokens except the targets by `alpha`, or give the targets a fixed share of attention.

        The targets are the tokens of some roles or, with `emphasised`, those marked by `ctxlens.emphasise`.
        The steering is active inside the block. Blocks can be nested; their biases add up. For the arguments
        see `ctxlens.Steering`.

        Raises:
            InputError: not exactly one of alpha and target share, one of them out of range, unknown roles
                or mode, heads that the model does not have.
        """
        steering = Steering(alpha, parse_roles(roles), as_heads(heads), mode, target_share, emphasised)
        steering.check_heads(self.n_layers, self.n_heads)
        self._steerings.append(steering)
        try:
            yield steering
        finally:
            self._steerings.pop()

    @overload
    def generate(
        self,
        chats: RenderedChat | str | Messages,
        *,
        condition: Condition | str | None = None,
        max_new_tokens: int = 100,
        stop_strings: Sequence[str] = (),
        batch_tokens: int = 8192,
        on_cut: Callable[[int], None] | None = None,
        progress: Progress | None = None,
    ) -> str: ...

    @overload
    def generate(
        self,
        chats: Path | Sequence[RenderedChat | Messages],
        *,
        condition: Condition | str | None = None,
        max_new_tokens: int = 100,
        stop_strings: Sequence[str] = (),
        batch_tokens: int = 8192,
        on_cut: Callable[[int], None] | None = None,
        progress: Progress | None = None,
    ) -> list[str]: ...

    def generate(
        self,
        chats: Given,
        *,
        condition: Condition | str | None = None,
        max_new_tokens: int = 100,
        stop_strings: Sequence[str] = (),
        batch_tokens: int = 8192,
        on_cut: Callable[[int], None] | None = None,
        progress: Progress | None = None,
    ) -> str | list[str]:
        """Continue conversations greedily, up to a stop token, the limit or the end of the window.

        A prefix that several conversations share is read once, if the model's cache allows it.

        Args:
            chats: as in `read_roles`. If the last message of a list is the assistant's, it is continued.
            condition: how messages are rendered, as in `read_roles`.
            max_new_tokens: the longest continuation, in tokens.
            stop_strings: texts that end a continuation. The result ends before the first of them.
            batch_tokens: padded prompt and new tokens in one batch.
            on_cut: called with the index of every conversation whose continuation was cut off at the limit or
                the end of the window.
            progress: called with the number of conversations done and the total.

        Returns:
            The new text only, without special tokens; for several conversations a list in the order given.

        Raises:
            InputError: a conversation that fills the window.
            ModelFailureError: the model's logits are not numbers (NaN).
        """
        several, single = render_given(self, chats, condition, continues=True)
        self._check_chats(several, room=1)
        limits = [min(max_new_tokens, self.n_ctx - len(chat.tokens)) for chat in several]
        stop = stop_at(self.tokenizer, stop_strings)
        new = self._continue(several, limits, stop, batch_tokens, progress)
        for i, (tokens, limit) in enumerate(zip(new, limits, strict=True)):
            if on_cut and len(tokens) >= limit and not (stop and stop(tokens)):
                on_cut(i)
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in new]
        texts = [cut_at(text, stop_strings) for text in texts]
        return texts[0] if single else texts

    def _continue(
        self,
        chats: Sequence[RenderedChat],
        limits: Sequence[int],
        stop: Stop | None,
        batch_tokens: int,
        progress: Progress | None,
    ) -> list[list[int]]:
        """The new tokens of every conversation; shared prefixes are read once if the backend can do that."""
        if sharing := self._sharing(batch_tokens):
            return sharing.continue_greedily(
                chats, max_new_tokens=limits, stop_ids=self._stop_ids, stop=stop, progress=progress
            )
        written: list[list[int]] = [[] for _ in chats]
        sizes = [len(chat.tokens) + limit for chat, limit in zip(chats, limits, strict=True)]
        done = 0
        for indices in plan_batches(sizes, batch_tokens):
            new = continue_greedily(
                self.backend,
                self._batch([chats[i] for i in indices], "left"),
                self._steerings,
                max_new_tokens=[limits[i] for i in indices],
                stop_ids=self._stop_ids,
                stop=stop,
            )
            for i, tokens in zip(indices, new, strict=True):
                written[i] = tokens
            done += len(indices)
            if progress:
                progress(done, len(chats))
        return written

    def _sharing(self, batch_tokens: int) -> Sharing | None:
        """The way to read shared prefixes once; None if this model has none."""
        if not self._reuses_prefixes or not isinstance(self.backend, PrefixBackend):
            return None
        if not self.backend.shares_prefixes:
            return None
        return Sharing(self.backend, self._steerings, self._pad_id(), self.device, batch_tokens)

    def _read_shares(
        self,
        chats: Sequence[RenderedChat],
        layers: tuple[int, ...],
        positions: Sequence[Sequence[int]],
        batch_tokens: BatchTokens,
    ) -> Iterator[tuple[int, Float[np.ndarray, "layer head query role"]]]:
        """The index of every conversation that has query positions, and the shares there."""
        for i, (shares,) in self._read(chats, layers, positions, batch_tokens, sinks=False):
            yield i, shares

    # long: the batches, and the way out for a model whose sinks cannot be found
    def _read(
        self,
        chats: Sequence[RenderedChat],
        layers: tuple[int, ...],
        positions: Sequence[Sequence[int]],
        batch_tokens: BatchTokens,
        sinks: bool | None,
    ) -> Iterator[tuple[int, tuple[Float[np.ndarray, "layer head query role"], ...]]]:
        """The same; with `sinks`, the part of the shares that rests on sinks comes second."""
        self._check_chats(chats)
        asked = [i for i, row in enumerate(positions) if len(row)]
        lengths = [len(chats[i].tokens) for i in asked]
        budget = _BATCH_TOKENS if isinstance(batch_tokens, str) else batch_tokens
        if asked and batch_tokens == "auto":
            rows = max(len(positions[i]) for i in asked)
            sized = {"queries": rows, "sinks": sinks is not False}
            budget = min(budget, fit_batch_tokens(self, free_memory(self.device), max(lengths), **sized))
        for batch in plan_batches(lengths, budget):
            indices = [asked[i] for i in batch]
            queries = pad_queries([positions[i] for i in indices], self.device)
            tokens = self._batch([chats[i] for i in indices], "right")
            found: tuple[torch.Tensor, ...] = ()
            if sinks is not False:
                try:
                    found = tuple(self.backend.read_resting(tokens, layers, queries, self._steerings))
                except UnsupportedModelError as error:
                    if sinks:
                        raise
                    warnings.warn(f"read without attention sinks: {error}", stacklevel=3)
                    sinks = False
            if sinks is False:
                found = (self.backend.read_shares(tokens, layers, queries, self._steerings),)
            for row, i in enumerate(indices):
                yield i, tuple(x[row, :, :, : len(positions[i])].numpy() for x in found)

    def _batch(self, chats: Sequence[RenderedChat], side: Literal["left", "right"]) -> TokenBatch:
        return TokenBatch.from_chats(chats, pad_id=self._pad_id(), side=side, device=self.device)

    def _pad_id(self) -> int:
        """A token id for padding that the model has an embedding for."""
        candidates = (self.tokenizer.pad_token_id, *sorted(self._stop_ids), 0)
        return next(i for i in candidates if i is not None and 0 <= i < self.backend.shape.d_vocab)

    def _layers(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        """The layers asked for, all by default; `InputError` if one does not exist."""
        wanted = tuple(range(self.n_layers)) if layers is None else tuple(int(layer) for layer in layers)
        bad = [layer for layer in wanted if not 0 <= layer < self.n_layers]
        if bad or not wanted:
            what = f"layer {bad[0]} does not exist" if bad else "no layers given"
            raise InputError(f"{what}: the model has layers 0 to {self.n_layers - 1}.")
        return wanted

    def _check_chats(self, chats: Sequence[RenderedChat], room: int = 0) -> None:
        """Refuse conversations that the model cannot read, or that leave no `room` in its window."""
        for i, chat in enumerate(chats):
            which = f"conversation {i} " if len(chats) > 1 else "the conversation "
            if not len(chat.tokens):
                raise InputError(f"{which}has no tokens.")
            if len(chat.tokens) + room > self.n_ctx:
                raise InputError(
                    f"{which}has {len(chat.tokens)} tokens, but the model's window is {self.n_ctx}"
                    + (" and must also hold an answer." if room else ".")
                )
            if chat.emphasised is None and any(steering.emphasised for steering in self._steerings):
                raise InputError(f"{which}has no emphasised tokens; mark them with ctxlens.emphasise.")
            if int(np.max(chat.tokens)) >= self.backend.shape.d_vocab:
                raise InputError(
                    f"{which}has token id {int(np.max(chat.tokens))}, but the model has "
                    f"{self.backend.shape.d_vocab} tokens; was it rendered with another tokenizer?"
                )


def _reduce_both(
    shares: Callable[[torch.Tensor], torch.Tensor], resting: Callable[[torch.Tensor], torch.Tensor]
) -> ReduceResting:
    """One function of a layer's shares and resting parts: the values of both, one after the other."""
    return lambda found: torch.cat([shares(found.shares), resting(found.resting)], -1)


__all__ = ["Model"]
