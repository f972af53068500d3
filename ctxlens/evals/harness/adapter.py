"""The model class that lm-eval gets: `--model ctxlens`.

Without steering its answers are those of lm-eval's own `hf` model, token for token. Prompts that are longer
than the window are cut in the middle of their context, where `hf` cuts what comes first.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ctxlens.chat.roles import RenderedChat
from ctxlens.errors import InputError
from ctxlens.evals.harness.likelihood import Continuation, score_continuations
from ctxlens.evals.harness.prompts import Prompts
from ctxlens.evals.harness.requests import plan_requests
from ctxlens.models import Model, load_model
from ctxlens.models.attention.steering import Steering, as_heads, parse_roles
from ctxlens.processes import Processes

_LOG = logging.getLogger("lm_eval.ctxlens")
_DEFAULT_NEW_TOKENS = 256
_GREEDY = {"do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks", "use_cache"}
"""Generation settings that say nothing against the most likely token."""


@dataclass
class Counts:
    """What happened to the prompts of an adapter: how many, cut to the window, answered by nothing."""

    requests: int = 0
    truncated: int = 0
    empty: int = 0


class CtxlensLM(TemplateLM):
    """A model of ctxlens as lm-eval calls it.

    Args:
        pretrained: a folder, Hub id or packaged model, or a loaded `Model`.
        template: put every prompt that lm-eval did not let render (`--apply_chat_template`) into the chat
            template, as one user message.
        indicator: append the model's indicator to the last user message.
        alpha: steering as in `Model.steer`: factor on the attention to all other roles.
        target_share: steering to a share of attention, in place of `alpha`.
        roles: the roles steered to, separated by `/` or commas.
        heads: `all`, or layer.head pairs with slashes (or commas) between them: 1.2/3.0; 1.2/ for one.
        mode: steering mode.
        backend: `native` or `lens`.
        device: `auto`, `cpu` or `cuda`; a CUDA device that is not there becomes the CPU.
        dtype: number format of the weights.
        batch_tokens: prompt and new tokens worked on at once.
        batch_size: with a number above 1, so many requests at once in place of `batch_tokens`.
        max_length: a window smaller than the model's.
        add_bos_token: whether texts begin with the BOS token; by default as the tokenizer does.
        chat_template: a Jinja file in place of the tokenizer's own template.
        trust_remote_code: run code that comes with the checkpoint.
        processes: those that share the requests; by default those that were launched together.
        max_batch_size: not used.
        on_batch: called with the numbers of requests done and in all after each batch.
    """

    def __init__(
        self,
        pretrained: Any,
        template: bool = False,
        indicator: bool = False,
        alpha: float | int | None = None,
        target_share: float | None = None,
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
        on_batch: Callable[[int, int], None] | None = None,
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
        self.steering = _make_steering(self.model, alpha, target_share, roles, heads, mode)
        if indicator and self.model.indicator is None:
            raise InputError(f"{self.model.name} has no indicator token; train it with one (ctxlens train).")
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

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
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
        """What a text without context is read after."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm-eval keeps built requests.

        It never comes again: a request that was built by another process would come without its roles.
        """
        return f"{self.model.name}-{uuid.uuid4().hex}".replace("/", "__")

    @property
    def settings(self) -> dict[str, Any]:
        """All that answers depend on besides the requests, as JSON values."""
        return {
            "model": {key: str(value) for key, value in self.model.identity.items()},
            "template": self.prompts.template,
            "indicator": self.prompts.indicator,
            "steering": None if self.steering is None else self.steering.describe(),
            "window": self.prompts.n_ctx,
            "add_bos_token": self.prompts.add_bos_token,
        }

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's results: settings, and how many prompts were cut or answered by nothing."""
        return {"ctxlens": {**self.settings, "counts": vars(self.counts)}}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take lm-eval's cache of answers.

        Raises:
            InputError: it holds answers that were given under other settings.
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
        """The tensors of all processes, one after another."""
        if self.world_size == 1:
            return tensor
        from accelerate.utils import gather

        gathered: Any = gather(tensor.to(self.device))
        return gathered

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes, for the first."""
        return self.processes.gather(obj)

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.processes.wait()

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation, the indicator included, and remember the roles of its tokens."""
        return self.prompts.render(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text."""
        if add_special_tokens is False:
            return self.tokenizer(string, add_special_tokens=False)["input_ids"]
        return self.prompts.encode(string)[0].tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer prompts greedily.

        Raises:
            InputError: sampling or beams are asked for, or more new tokens than the window holds.
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
                texts = self._generate([chats[k] for k in batch], new_tokens, until)
                for k, text in zip(batch, texts, strict=True):
                    answers[members[k]] = text
                    self.counts.empty += not text.strip()
                    self.cache_hook.add_partial("generate_until", requests[members[k]].args, text)
                done += len(batch)
                if self.on_batch:
                    self.on_batch(done, len(requests))
            self._count(chats)
        return [answer for answer in answers if answer is not None]

    def _generate(self, chats: list[RenderedChat], new_tokens: int, until: tuple[str, ...]) -> Iterator[str]:
        budget = self.batch_tokens
        if self.rows:
            budget = len(chats) * (max(chat.n_tokens for chat in chats) + new_tokens + 1)
        with self._steered():
            texts = self.model.generate(
                chats, max_new_tokens=new_tokens, stop_strings=until, batch_tokens=budget
            )
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        for text in texts:
            yield postprocess_generated_text(text, [*until, eos], None)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """How likely each continuation is after its context, in nats, and whether it is the greedy one."""
        asked = [self._continuation(*request.args) for request in requests]
        self._count([one.chat for one in asked])

        def keep(index: int, answer: tuple[float, bool]) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[index].args, answer)

        return self._score(asked, keep)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """How likely whole texts are, in nats, in windows of the model's length; the text is the user's."""
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
        """Score contexts and continuations that are tokens already; the context counts as the user's."""
        return self._score([Continuation.of_tokens(context, after) for _, context, after in requests])

    def _continuation(self, context: str, after: str) -> Continuation:
        if not context:
            tokens = self.tok_encode(after, add_special_tokens=False)
            if tokens[:1] == [self.prefix_token_id]:
                return Continuation.of_tokens(tokens[:1], tokens[1:])
            return Continuation.of_tokens([self.prefix_token_id], tokens)
        chat = self.prompts.chat(context)
        # As in `TemplateLM`: what ends in white space is cut there, and the white space is scored too.
        before, said = self._encode_pair(chat.text, after)
        if before != chat.tokens.tolist():
            chat = self.prompts.shorten(chat, len(chat.text.rstrip()))
        return Continuation(self.prompts.fit(chat, len(said) - 1), tuple(said))

    def describe(self, request: Any) -> tuple[str, bool]:
        """The prompt of a request as the model gets it, before it is cut, and whether it is cut."""
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
            _LOG.warning("%d of %d prompts were cut in their middle to fit the window", cut, len(chats))

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
            "the task asks for sampling, but ctxlens answers greedily, so that conditions can be paired; "
            "set do_sample to false (--gen_kwargs do_sample=False,temperature=0)."
        )
    if unknown := sorted(set(kwargs) - _GREEDY):
        raise InputError(
            f"the task sets {', '.join(unknown)}, but ctxlens takes the most likely token each time; leave "
            "that out."
        )
    return int(kwargs["max_gen_toks"]), tuple(str(one) for one in kwargs["until"])


def _make_steering(
    model: Model, alpha: float | int | None, target_share: float | None, roles: str, heads: Any, mode: Any
) -> Steering | None:
    if alpha is None and target_share is None:
        return None
    if isinstance(heads, int | float):
        raise InputError(
            f"heads={heads} arrived as a number, which does not tell 1.1 from 1.10; end a single head with a "
            "slash, such as heads=1.10/."
        )
    if isinstance(heads, str):
        heads = heads.strip("/").replace("/", ",")
    steering = Steering(alpha, parse_roles(roles.replace("/", ",")), as_heads(heads), mode, target_share)
    steering.check_heads(model.n_layers, model.n_heads)
    return steering


def _find_device(device: str | None) -> str:
    """The device asked for; any CUDA device, which lm-eval asks for by default, is taken if there is one."""
    if device is None or device.startswith("cuda"):
        return "auto"
    return device


__all__ = ["Counts", "CtxlensLM"]
