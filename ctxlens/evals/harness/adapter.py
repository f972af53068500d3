"""The model class for lm-eval: `--model ctxlens`.

Without steering its answers are those of lm-eval's own `hf` model, token for token. Prompts that are longer
than the window are truncated in the middle of their context, whereas `hf` truncates them at the start.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lm_eval.api.model import TemplateLM, hash_args
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ctxlens.chat.condition import Condition
from ctxlens.chat.roles import RenderedChat
from ctxlens.errors import InputError
from ctxlens.evals.harness.likelihood import Continuation, score_continuations
from ctxlens.evals.harness.prompts import Prompts
from ctxlens.evals.harness.requests import plan_requests
from ctxlens.models import Model, load_model
from ctxlens.models.attention.steering import Steering, parse_roles, steering_of
from ctxlens.models.indicator_token import require_indicator
from ctxlens.processes import Processes
from ctxlens.runs import Progress

_LOG = logging.getLogger("lm_eval.ctxlens")
_DEFAULT_NEW_TOKENS = 256
_GREEDY = {"do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks", "use_cache"}
"""Generation settings that are compatible with greedy decoding."""


@dataclass
class Counts:
    """Numbers of an adapter's requests, of truncated prompts, and of empty answers and answers cut off."""

    requests: int = 0
    truncated: int = 0
    empty: int = 0
    cut: int = 0


class CtxlensLM(TemplateLM):
    """A model of ctxlens with the interface that lm-eval calls.

    Args:
        pretrained: a folder, Hub id or packaged model, or a loaded `Model`.
        template: put every prompt that lm-eval has not rendered itself (`--apply_chat_template`) into the
            chat template, as one user message.
        indicator: append the model's indicator to the last user message.
        alpha: steering as in `Model.steer`: factor on the attention to all other roles.
        target_share: steering to a share of attention, instead of `alpha`.
        roles: the roles that attention is steered to, separated by slashes or commas.
        heads: `all`, or layer.head pairs separated by slashes or commas, such as 1.2/3.0. A single pair
            needs a slash at its end, 1.2/, on lm-eval's command line.
        mode: steering mode, as in `Model.steer`.
        backend: `native` or `lens`.
        device: `auto`, `cpu` or `cuda`. The CPU is used if there is no CUDA device.
        dtype: number format of the weights.
        batch_tokens: upper bound on the prompt and new tokens in one batch.
        batch_size: if it is a number above 1, the number of requests in one batch, instead of
            `batch_tokens`.
        max_length: a window smaller than the model's.
        add_bos_token: whether texts begin with the BOS token; by default the tokenizer decides.
        chat_template: a Jinja file instead of the tokenizer's own template.
        trust_remote_code: run code that comes with the checkpoint.
        processes: the processes that share the requests; by default those that were launched together.
        max_batch_size: accepted because lm-eval passes it, but not used.
        on_batch: called after each batch with the numbers of finished and of all requests.
    """

    def __init__(
        self,
        pretrained: Any,
        template: bool = False,
        indicator: bool = False,
        alpha: float | int | None = None,
        target_share: float | int | None = None,
        roles: str = "user,indicator",
        heads: Any = "all",
        mode: str | None = None,
        backend: str = "native",
        device: str | None = "auto",
        dtype: str = "float32",
        batch_tokens: int = 8192,
        batch_size: Any = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
        processes: Processes | None = None,
        max_batch_size: Any = None,
        on_batch: Progress | None = None,
    ) -> None:
        super().__init__()
        self.processes = Processes.join(cpu=device == "cpu") if processes is None else processes
        self._rank, self._world_size = self.processes.rank, self.processes.count
        if not isinstance(pretrained, Model):
            pretrained = load_model(
                pretrained,
                backend=backend,
                device=_find_device(device),
                dtype=dtype,
                chat_template=chat_template,
                trust_remote_code=trust_remote_code,
            )
        self.model = pretrained
        self.tokenizer = self.model.tokenizer
        condition = Condition(
            template,
            indicator=indicator,
            alpha=_as_float(alpha),
            target_share=_as_float(target_share),
            heads=_read_heads(heads),
        )
        self.steering = _find_steering(self.model, condition, roles, mode)
        if indicator:
            require_indicator(self.model)
        self.prompts = Prompts(
            self.tokenizer,
            min(self.model.n_ctx, int(max_length or self.model.n_ctx)),
            template=template,
            indicator=self.model.indicator if indicator else None,
            add_bos_token=add_bos_token,
        )
        rows = str(batch_size)
        self.rows = int(rows) if rows.isdecimal() and int(rows) > 1 else None
        self.batch_tokens = batch_tokens
        self.on_batch = on_batch
        self.counts = Counts()
        self._cut: set[str] = set()

    @property
    def device(self) -> torch.device:
        """The device of the input tokens."""
        return self.model.device

    @property
    def max_length(self) -> int:
        """The window in tokens."""
        return self.prompts.n_ctx

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that precedes a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm-eval caches built requests.

        It is different every time, so that no cached request is reused: the roles of its tokens would be
        lost.
        """
        return f"{self.model.name}-{uuid.uuid4().hex}".replace("/", "__")

    @property
    def settings(self) -> dict[str, Any]:
        """Everything besides the requests that answers depend on, as JSON values."""
        return {
            "model": {key: str(value) for key, value in self.model.identity.items()},
            "template": self.prompts.template,
            "indicator": self.prompts.indicator,
            "steering": None if self.steering is None else self.steering.describe(),
            "window": self.prompts.n_ctx,
            "add_bos_token": self.prompts.add_bos_token,
        }

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to its results: the settings, and the numbers of `Counts`."""
        return {"ctxlens": {**self.settings, "counts": vars(self.counts)}}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Use lm-eval's cache of answers.

        Raises:
            InputError: the cache holds answers that were given under other settings.
        """
        super().set_cache_hook(cache_hook)
        if (kept := cache_hook.dbdict) is None:
            return
        found = kept.get("ctxlens", None if len(kept) else self.settings)
        if found != self.settings:
            raise InputError(
                f"the cache {kept.filename} holds answers of another model or condition; give --use_cache "
                "another name."
            )
        kept["ctxlens"] = self.settings

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, concatenated."""
        if self.world_size == 1:
            return tensor
        from accelerate.utils import gather

        gathered: Any = gather(tensor.to(self.device))
        return gathered

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes in the first process; None in the others."""
        return self.processes.gather(obj)

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.processes.wait()

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation, with the indicator if it is on, and remember the roles of its tokens."""
        return self.prompts.render(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text."""
        if add_special_tokens is False:
            return self.tokenizer(string, add_special_tokens=False)["input_ids"]
        return self.prompts.encode(string)[0].tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer prompts greedily.

        Raises:
            InputError: the task asks for sampling, beams, or more new tokens than the window holds.
        """
        answers: list[str | None] = [None] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(_read_kwargs(request.args[1]), []).append(index)
        done = 0
        for (new_tokens, until), members in groups.items():
            whole = {i: self.prompts.chat(requests[i].args[0]) for i in members}
            chats = [self.prompts.fit(whole[i], new_tokens) for i in members]
            sizes = [chat.n_tokens + new_tokens for chat in chats]
            for batch in plan_requests(chats, sizes, self.batch_tokens, self.rows):
                found = self._generate([chats[k] for k in batch], new_tokens, until)
                for k, (text, cut) in zip(batch, found, strict=True):
                    answers[members[k]] = text
                    if cut:
                        self._note_cut(requests[members[k]])
                    self.counts.empty += not text.strip()
                    self.cache_hook.add_partial("generate_until", requests[members[k]].args, text)
                done += len(batch)
                if self.on_batch:
                    self.on_batch(done, len(requests))
            self._count(chats)
        return [answer for answer in answers if answer is not None]

    def _generate(
        self, chats: list[RenderedChat], new_tokens: int, until: tuple[str, ...]
    ) -> Iterator[tuple[str, bool]]:
        """Each answer, and whether it was cut off at its longest."""
        budget = self.batch_tokens
        if self.rows:
            budget = len(chats) * (max(chat.n_tokens for chat in chats) + new_tokens + 1)
        cut: set[int] = set()
        with self._steered():
            texts = self.model.generate(
                chats, max_new_tokens=new_tokens, stop_strings=until, batch_tokens=budget, on_cut=cut.add
            )
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        for i, text in enumerate(texts):
            yield postprocess_generated_text(text, [*until, eos], None), i in cut

    def _note_cut(self, request: Any) -> None:
        """Remember that the answer to a request was cut off, in lm-eval's cache as well."""
        self.counts.cut += 1
        self._cut.add(hash_args("cut", request.args))
        self.cache_hook.add_partial("cut", request.args, True)

    def was_cut(self, request: Any) -> bool:
        """Whether the answer to a request was cut off at its longest, now or when it was cached."""
        key, kept = hash_args("cut", request.args), self.cache_hook.dbdict
        return key in self._cut or (kept is not None and key in kept)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Each continuation's log-probability in nats, and whether greedy decoding would say the same."""
        asked = [self._continuation(*request.args) for request in requests]
        self._count([one.chat for one in asked])

        def keep(index: int, answer: tuple[float, bool]) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[index].args, answer)

        return self._score(asked, keep)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts in nats, read window by window; the text counts as the user's."""
        asked: list[Continuation] = []
        owner: list[int] = []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                asked.append(Continuation.of_tokens(*make_disjoint_window(window)))
                owner.append(index)
        self.counts.requests += len(requests)
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(owner, self._score(asked), strict=True):
            totals[index] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Score contexts and continuations given as tokens; the context counts as the user's."""
        return self._score([Continuation.of_tokens(context, after) for _, context, after in requests])

    def _continuation(self, context: str, after: str) -> Continuation:
        if not context:
            tokens = self.tok_encode(after, add_special_tokens=False)
            if tokens[:1] == [self.prefix_token_id]:
                return Continuation.of_tokens(tokens[:1], tokens[1:])
            return Continuation.of_tokens([self.prefix_token_id], tokens)
        chat = self.prompts.chat(context)
        # As in `TemplateLM`: white space at the end of the context is moved to the continuation and scored.
        before, said = self._encode_pair(chat.text, after)
        if before != chat.tokens.tolist():
            chat = self.prompts.shorten(chat, len(chat.text.rstrip()))
        return Continuation(self.prompts.fit(chat, len(said) - 1), tuple(said))

    def describe(self, request: Any) -> tuple[str, bool]:
        """A request's prompt before truncation, as rendered for the model, and whether it is truncated."""
        context = request.args[0]
        if request.request_type == "generate_until":
            chat = self.prompts.chat(context)
            return chat.text, self.prompts.fit(chat, _read_kwargs(request.args[1])[0]).truncated is not None
        if request.request_type == "loglikelihood" and context:
            return self.prompts.chat(context).text, self._continuation(
                *request.args
            ).chat.truncated is not None
        return context, False

    def _score(
        self,
        asked: Sequence[Continuation],
        keep: Callable[[int, tuple[float, bool]], None] | None = None,
    ) -> list[tuple[float, bool]]:
        with self._steered():
            return score_continuations(
                self.model, asked,
                batch_tokens=self.batch_tokens, rows=self.rows, keep=keep, progress=self.on_batch,
            )  # fmt: skip

    def _count(self, chats: Sequence[RenderedChat]) -> None:
        cut = sum(chat.truncated is not None for chat in chats)
        self.counts.requests += len(chats)
        self.counts.truncated += cut
        if cut:
            _LOG.warning("%d of %d prompts were truncated in the middle to fit the window", cut, len(chats))

    def _steered(self) -> contextlib.AbstractContextManager[Any]:
        if self.steering is None or self.steering.changes_nothing:
            return contextlib.nullcontext()
        s = self.steering
        return self.model.steer(
            s.alpha, roles=s.roles, heads=s.heads, mode=s.mode, target_share=s.target_share
        )


register_model("ctxlens")(CtxlensLM)


def _read_kwargs(given: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """The number of new tokens and the stop strings that generation settings ask for."""
    kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, _DEFAULT_NEW_TOKENS))
    if kwargs["do_sample"]:
        raise InputError(
            "the task asks for sampling, but ctxlens answers greedily, so that conditions can be compared; "
            "set do_sample to false (--gen_kwargs do_sample=False,temperature=0)."
        )
    if unknown := sorted(set(kwargs) - _GREEDY):
        raise InputError(
            f"the task sets {', '.join(unknown)}, but ctxlens decodes greedily; remove these settings."
        )
    return int(kwargs["max_gen_toks"]), tuple(str(one) for one in kwargs["until"])


def _as_float(number: float | int | None) -> float | None:
    """The number; lm-eval's command line turns `1` into an integer."""
    return float(number) if type(number) is int else number


def _find_steering(model: Model, condition: Condition, roles: str, mode: str | None) -> Steering | None:
    """The condition's steering, to these roles and in this mode, checked against the model's heads."""
    steering = steering_of(condition)
    if steering is None:
        return None
    steering = replace(steering, roles=parse_roles(roles.replace("/", ",")), mode=mode or steering.mode)
    steering.check_heads(model.n_layers, model.n_heads)
    return steering


def _read_heads(heads: str | float | Sequence[tuple[int, int]]) -> str:
    """Heads as a condition spells them; lm-eval's command line turns a text such as `1.10` into a number."""
    if isinstance(heads, int | float):
        raise InputError(
            f"heads={heads} arrived as a number, which does not tell 1.1 from 1.10; put a slash behind a "
            "single head, such as heads=1.10/."
        )
    if isinstance(heads, str):
        return heads.replace(",", "/")
    return "/".join(f"{layer}.{head}" for layer, head in heads)


def _find_device(device: str | None) -> str:
    """The device for `load_model`; `cuda`, lm-eval's default, means a CUDA device if there is one."""
    if device is None or device.startswith("cuda"):
        return "auto"
    return device


__all__ = ["Counts", "CtxlensLM"]
