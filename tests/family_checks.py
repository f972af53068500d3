"""What is checked of every family of decoders; the tests assert it and the support table shows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from tiny_models import VOCAB, eager_shares, make_chat, make_tiny, make_tokenizer
from torch import Tensor

from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.errors import UnsupportedModelError
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.batch import TokenBatch, pad_queries
from ctxlens.models.backends.lens import LensBackend, bridge_from_hf
from ctxlens.models.backends.native import NativeBackend, attend
from ctxlens.models.backends.protocol import Backend

CHATS = [make_chat(20, 1, prompt=14), make_chat(13, 2, prompt=9)]
ASKED = Steering(target_share=0.7)
STEERED: list[list[Steering]] = [
    [Steering(0.2)],
    [Steering(0.5, mode="compounding")],
    [Steering(0.05, heads=((0, 1), (2, 3)), mode="prompt-only"), ASKED],
]
"""Every mode, some heads, and two steerings at once."""
NEW_TOKENS = 8
LAYERS = range(3)


@dataclass(frozen=True)
class FamilyCheck:
    """What the two backends do with one family, and how far they are from each other and from eager.

    Differences are the largest ones, of shares (0 to 1) or logits, over all layers, heads and queries. NaN
    where there is nothing to compare.

    Attributes:
        path: how the native path computes its layers (`fused` or `tiled`), or why it is refused.
        lens: `yes`, or why the lens is refused.
        windows: which layers see only the last tokens.
        shares: native or lens against eager.
        logits: the logits while reading, against the model's own.
        steered_shares: native against lens, in all modes of reading.
        steered_logits: likewise.
        decoded: steered decoding with cache, in a padded batch, against recomputing alone without cache.
        leaked: how much shares before a token change with that token.
        moved: how much shares after it change.
        padded: shares of a left-padded row against those of the row alone.
        target: how far target shares in the first layer are from what was asked.
    """

    path: str
    lens: str
    windows: str
    shares: float
    logits: float
    steered_shares: float
    steered_logits: float
    decoded: float
    leaked: float
    moved: float
    padded: float
    target: float


def right(chats: Sequence[RenderedChat]) -> TokenBatch:
    """A batch to read."""
    return TokenBatch.from_chats(chats, pad_id=0, side="right")


def left(chats: Sequence[RenderedChat]) -> TokenBatch:
    """A batch to continue."""
    return TokenBatch.from_chats(chats, pad_id=0, side="left")


def all_queries(chats: Sequence[RenderedChat]) -> Tensor:
    """Every position of every conversation."""
    return pad_queries([range(len(chat)) for chat in chats])


def read_all(
    backend: Backend, chats: Sequence[RenderedChat], steerings: Sequence[Steering] = ()
) -> list[np.ndarray]:
    """Shares `[layer, head, query, role]` of every conversation."""
    shares = backend.read_shares(right(chats), LAYERS, all_queries(chats), steerings)
    return [shares[i, :, :, : len(chat)].numpy() for i, chat in enumerate(chats)]


def logits_of(
    backend: Backend, chats: Sequence[RenderedChat], steerings: Sequence[Steering] = ()
) -> list[np.ndarray]:
    """Logits of every conversation's own positions."""
    logits = backend.logits(right(chats), steerings)
    return [logits[i, : len(chat)].numpy() for i, chat in enumerate(chats)]


def logits_while_reading(backend: NativeBackend, chats: Sequence[RenderedChat]) -> list[np.ndarray]:
    """Logits of a forward pass in which all layers are read."""
    batch = right(chats)
    with torch.no_grad(), attend(backend.hf_model, batch, layers=LAYERS):
        logits = backend.hf_model(input_ids=batch.tokens, use_cache=False).logits
    return [logits[i, : len(chat)].numpy() for i, chat in enumerate(chats)]


def furthest(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """The largest difference between arrays of two lists."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def decode_both_ways(backend: Backend, steerings: Sequence[Steering]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of every step from a padded batch with cache, and from one row alone without cache."""
    new = torch.randint(3, VOCAB, (len(CHATS), NEW_TOKENS), generator=torch.Generator().manual_seed(0))
    prompts = left(CHATS)
    with backend.decoder(prompts, steerings) as decode:
        steps = [decode(prompts.tokens), *(decode(new[:, i : i + 1]) for i in range(NEW_TOKENS - 1))]
    for row, chat in enumerate(CHATS):
        said = new[row, : NEW_TOKENS - 1]
        tokens = torch.cat([torch.from_numpy(chat.tokens), said])[None]
        roles = torch.from_numpy(chat.role).long()
        roles = torch.cat([roles, torch.full_like(said, int(Role.ASSISTANT))])[None]
        whole = TokenBatch(tokens, roles, torch.ones_like(tokens), torch.tensor([len(chat)]))
        alone = backend.logits(whole, steerings)[0, len(chat) - 1 :]
        yield torch.stack([step[row] for step in steps]), alone


def change_late_tokens(backend: Backend, steerings: Sequence[Steering]) -> tuple[float, float]:
    """How much shares and logits before position 12 change with the tokens from there on; and after it."""
    chat, changed = make_chat(20, 1), make_chat(20, 1)
    changed.tokens[12:] = (changed.tokens[12:] + 7 - 3) % (VOCAB - 3) + 3
    changed.role[12:] = int(Role.TOOL)
    shares = [read_all(backend, [c], steerings)[0] for c in (chat, changed)]
    logits = [logits_of(backend, [c], steerings)[0] for c in (chat, changed)]
    before = furthest([shares[0][:, :, :12], logits[0][:12]], [shares[1][:, :, :12], logits[1][:12]])
    return before, furthest([shares[0][:, :, 12:]], [shares[1][:, :, 12:]])


def read_left_padded(model: NativeBackend, steerings: Sequence[Steering]) -> float:
    """The largest difference between shares in a left-padded batch and those of its rows alone."""
    prompts = left(CHATS)
    positions = (prompts.attention_mask.cumsum(-1) - 1).clamp_min(0)
    inputs = {"input_ids": prompts.tokens, "attention_mask": prompts.attention_mask}
    if model._takes_positions:
        inputs["position_ids"] = positions
    with torch.no_grad(), attend(model.hf_model, prompts, steerings=steerings, layers=LAYERS) as attending:
        model.hf_model(**inputs, use_cache=False)
    shares = torch.stack([attending.collected[layer] for layer in LAYERS], dim=1)
    rows = [shares[i, :, :, -len(chat) :].numpy() for i, chat in enumerate(CHATS)]
    return furthest(rows, [read_all(model, [chat], steerings)[0] for chat in CHATS])


@cache
def check_family(family: str) -> FamilyCheck:
    """Check one family of `tiny_models.FAMILIES` in every way."""
    eager = make_tiny(family, attn="eager")
    model = make_tiny(family)
    with torch.no_grad():
        own = [model(input_ids=right([chat]).tokens).logits[0].numpy() for chat in CHATS]
    native = lens = None
    try:
        native = NativeBackend(model)
        path = " and ".join(sorted(set(native.paths.values())))
    except UnsupportedModelError as error:
        path = f"refused: {error}"
    try:
        lens = LensBackend(bridge_from_hf(eager, make_tokenizer(), copied=True))
        seen_by_lens = "yes"
    except UnsupportedModelError as error:
        seen_by_lens = f"refused: {error}"
    backends = [backend for backend in (native, lens) if backend is not None]
    absent: tuple[str, ...] = ("steered_shares", "steered_logits", "decoded", "padded", "target")
    check: dict[str, float] = dict.fromkeys(absent, np.nan)
    causal = [change_late_tokens(backend, STEERED[2]) for backend in backends]
    want = eager_shares(family, CHATS)
    check["shares"] = max(furthest(read_all(backend, CHATS), want) for backend in backends)
    check["leaked"] = max(before for before, _ in causal)
    check["moved"] = min(after for _, after in causal)
    check["logits"] = max(furthest(logits_of(backend, CHATS), own) for backend in backends)
    if native is not None:
        check["logits"] = max(check["logits"], furthest(logits_while_reading(native, CHATS), own))
        pairs = (pair for steerings in STEERED[1:] for pair in decode_both_ways(native, steerings))
        check["decoded"] = max(float((got - alone).abs().max()) for got, alone in pairs)
        check["padded"] = max(read_left_padded(native, steerings) for steerings in ([], STEERED[2]))
        given = [
            shares[0][..., [int(role) for role in ASKED.roles]].sum(-1)
            for shares in read_all(native, CHATS, [ASKED])
        ]
        free = [shares[(shares > 0) & (shares < 1)] for shares in given]
        check["target"] = furthest(free, [np.full_like(shares, 0.7) for shares in free])
    if len(backends) == 2:
        both = [[read_all(b, CHATS, steerings) for b in backends] for steerings in STEERED]
        check["steered_shares"] = max(furthest(*pair) for pair in both)
        both = [[logits_of(b, CHATS, steerings) for b in backends] for steerings in STEERED]
        check["steered_logits"] = max(furthest(*pair) for pair in both)
    return FamilyCheck(path, seen_by_lens, describe_windows(model.config), **check)


def describe_windows(config: Any) -> str:
    """Which layers see only the last tokens: `none`, `all`, or `2 of 3 layers`."""
    from transformers.cache_utils import DynamicCache

    sliding = [bool(getattr(layer, "is_sliding", False)) for layer in DynamicCache(config=config).layers]
    if not any(sliding):
        return "none"
    return "all" if all(sliding) else f"{sum(sliding)} of {len(sliding)} layers"
