"""Models for needle tests that are no models: they copy, remember or stop by rule."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import numpy as np

from ctxlens.chat.roles import N_ROLES, Role, render, render_plain
from ctxlens.models.attention.steering import Steering
from ctxlens.results import RoleAllocation

UNPUNCTUATED = {
    "transcript": "river stone market lantern harbour copper " * 400,
    "lines": "river stone market\nlantern harbour copper\n" * 400,
    "crlf": "river stone market\r\nlantern harbour copper\r\n" * 400,
    "paragraphs": "\n\n".join("river stone market lantern " * 100 for _ in range(20)),
    "code": "\n".join(f"    value_{i} = compute(value_{i + 1}, [])" for i in range(800)),
    "one word": "0123456789abcdef" * 2000,
    "thai": "แม่น้ำไหลผ่านเมืองเก่าและสะพานไม้" * 300,
    "hindi": "नदी पुराने शहर से होकर बहती है। " * 300,
    "chinese": "河水流过老城和木桥" * 600,
    "arabic": "النهر يجري عبر المدينة القديمة " * 300,
    "emoji": "👩🏽🇹🇭🙂" * 900,
}
"""Texts without a full stop."""


def check_lengths(cells):
    """What was built is at most 5 % or 16 tokens shorter than what was asked for."""
    assert cells
    for cell in cells:
        assert 0 <= cell.context_tokens - cell.context.tokens <= max(16, 0.05 * cell.context_tokens)


class WordTokenizer:
    """One token a word, so that lengths can be counted by hand."""

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        spans = [match.span() for match in re.finditer(r"\S+", text)]
        return {"input_ids": [0] * len(spans), "offset_mapping": spans}


class CopyingModel:
    """Finds the sentence that begins as its answer does and says the rest.

    With a template it says what it knows by heart instead, unless it is steered at least to
    `gives_in` or sees its indicator. Without a prefix it repeats its whole user message. On texts that
    hold `fails_on` it raises.
    """

    name = "copier"
    n_layers, n_heads = 2, 3

    def __init__(
        self,
        tokenizer: Any,
        *,
        n_ctx: int = 512,
        indicator: str | None = None,
        knows: str | None = None,
        gives_in: float = 0.1,
        stop_after: int | None = None,
        fails_on: str | None = None,
    ) -> None:
        self.tokenizer, self.n_ctx, self.indicator = tokenizer, n_ctx, indicator
        self.knows, self.gives_in, self.stop_after = knows, gives_in, stop_after
        self.fails_on = fails_on
        self.identity = {"name": self.name}
        self.batches: list[list[str]] = []
        self.steered: list[Steering] = []

    def render(self, messages, **options):
        options = {"indicator": self.indicator, "max_tokens": self.n_ctx, **options}
        return render(self.tokenizer, messages, **options)

    def render_plain(self, messages, **options):
        options = {"indicator": self.indicator, "max_tokens": self.n_ctx, **options}
        return render_plain(self.tokenizer, messages, **options)

    @contextlib.contextmanager
    def steer(self, alpha, *, roles=("user", "indicator"), heads="all", mode="paper", **more):
        self.steered.append(Steering(alpha, roles, heads, mode, **more))
        try:
            yield
        finally:
            self.steered.pop()

    def generate(self, chats, *, max_new_tokens=100, batch_tokens=8192):
        if self.stop_after is not None and len(self.batches) >= self.stop_after:
            raise KeyboardInterrupt
        self._check(chats)
        self.batches.append([chat.text for chat in chats])
        return [self._answer(chat) for chat in chats]

    def logprobs(self, chats, *, batch_tokens=8192):
        """Minus the number of the token in the response, from 1."""
        self._check(chats)
        return [-np.arange(1.0, len(chat.response_positions()) + 1) for chat in chats]

    def _check(self, chats):
        if self.fails_on and any(self.fails_on in chat.text for chat in chats):
            raise RuntimeError(f"no {self.fails_on} please\nsecond line")

    def _answer(self, chat) -> str:
        said = chat.text[chat.spans[chat.mask("user", "assistant"), 0].min() :]
        if not chat.response_turns():
            return said
        steered = any(s.alpha <= self.gives_in for s in self.steered)
        if self.knows and chat.templated and not steered and not chat.mask("indicator").any():
            return self.knows
        prefix = said.rsplit("\n", 1)[-1]
        match = re.search(re.escape(prefix) + r"([^.]*\.)", said)
        return match[1] if match else ""

    def read_roles(self, chats, *, queries="first_answer", batch_tokens=8192, **options):
        """Layer 0: head 2 looks at the user; layer 1: head 1 does."""
        return [self._allocation(queries) for _ in chats]

    def read_attention_to(self, chats, chosen, *, batch_tokens=8192):
        """Head 0 of layer 1 looks at whatever is chosen, if anything is."""
        found = [np.zeros((self.n_layers, self.n_heads, 1), dtype=np.float32) for _ in chats]
        for one, mask in zip(found, chosen, strict=True):
            one[1, 0] = 0.6 * mask.any()
        return found

    def _allocation(self, queries) -> RoleAllocation:
        shares = np.zeros((self.n_layers, self.n_heads, 1, N_ROLES), dtype=np.float32)
        shares[..., Role.BOS] = 1
        for layer, head, share in ((0, 2, 0.5), (1, 1, 0.75)):
            shares[layer, head, 0, Role.USER] = share
            shares[layer, head, 0, Role.BOS] = 1 - share
        counts = np.ones((1, N_ROLES), dtype=np.float32)
        return RoleAllocation(shares, counts, (0, 1), ("0",), queries, {})
