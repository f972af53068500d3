"""Does a backend read and steer this model's attention exactly? The same observations, made in every way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ctxlens.chat.roles import N_ROLES, RenderedChat, Role
from ctxlens.models import Model
from ctxlens.models.attention.shares import compute_role_shares
from ctxlens.models.attention.steering import Steering
from ctxlens.models.backends.batch import TokenBatch
from ctxlens.models.backends.protocol import Backend, EagerBackend
from ctxlens.models.doctor.findings import Finding, compare

ALPHA = 0.3
STEERING = Steering(ALPHA)
NEW_TOKENS = 8

_TOLERANCES = {  # shares; logits in units of the largest logit
    torch.float32: (1e-5, 1e-4),
    torch.float16: (2e-2, 2e-2),
    torch.bfloat16: (1e-1, 1e-1),
}
_SAME_PROGRAM = 1e-2
"""The largest difference allowed between two runs of the same way, in any dtype."""


@dataclass(frozen=True)
class Observed:
    """What one way of running a model gives for a conversation, float32, on the CPU.

    Attributes:
        shares: role shares of every layer, head and position.
        logits: next-token logits of every position.
        steered: the logits under `STEERING`; None if this way has no steering.
    """

    shares: Float[Tensor, "layer head query role"]
    logits: Float[Tensor, "pos vocab"]
    steered: Float[Tensor, "pos vocab"] | None


@torch.no_grad()
def observe(model: Model, chat: RenderedChat) -> Observed:
    """Shares, steered logits, and logits of a forward pass in which every layer is read."""
    backend, batch = model.backend, as_batch(model, [chat])
    shares = read_shares(backend, batch)[0]
    logits, steered = backend.logits_while_reading(batch), backend.logits(batch, (STEERING,))
    return Observed(shares, logits[0].float().cpu(), steered[0].float().cpu())


def read_own_logits(model: Model, chat: RenderedChat) -> Float[Tensor, "pos vocab"] | None:
    """The logits from the model's own library alone; None if the backend cannot run it that way."""
    if not isinstance(model.backend, EagerBackend):
        return None
    return model.backend.read_alone(as_batch(model, [chat]))[0].float().cpu()


def observe_eagerly(model: Model, chat: RenderedChat, own: Float[Tensor, "pos vocab"]) -> Observed:
    """Shares and logits of a conversation from the explicit attention of the model's own library.

    The part that a pattern's rows lack to 1 is the share of the sink.

    Raises:
        ValueError: the model has no explicit attention, it gives no patterns, or its logits differ from those
            that the model computes otherwise (`own`).
    """
    if not isinstance(model.backend, EagerBackend):
        raise ValueError("its backend cannot run it explicitly")
    batch = as_batch(model, [chat])
    logits, patterns = model.backend.read_eagerly(batch)
    logits = logits[0].float().cpu()
    if (difference := _relative(logits, own)) > 10 * _tolerances(model)[1]:
        raise ValueError(f"switched to eager, its logits differ by {difference:.1e}")
    shares = []
    for pattern in patterns:
        wide = pattern.float()
        of_layer = compute_role_shares(wide, batch.role_ids.to(wide.device), N_ROLES)
        of_layer[..., int(Role.SINK)] = 1 - wide.sum(-1)
        shares.append(of_layer[0].cpu())
    return Observed(torch.stack(shares), logits, None)


def compare_ways(one: str, ours: Observed, other: str, theirs: Observed, dtype: torch.dtype) -> list[Finding]:
    """Parity of two ways: shares, logits, and steered logits if both have them."""
    for_shares, for_logits = _TOLERANCES.get(dtype, _TOLERANCES[torch.float32])
    ways = f"{one} = {other}"
    found = [
        compare(
            "parity",
            f"shares, {ways}",
            _largest(ours.shares - theirs.shares),
            for_shares,
            "Role shares of all layers, heads and positions",
        ),
        compare("parity", f"logits, {ways}", _relative(ours.logits, theirs.logits), for_logits, "Logits"),
    ]
    if ours.steered is not None and theirs.steered is not None:
        difference = _relative(ours.steered, theirs.steered)
        said = f"Logits steered with α = {ALPHA}"
        found.append(compare("parity", f"steered logits, {ways}", difference, for_logits, said))
    return found


def compare_logits(ours: Observed, own: Tensor, dtype: torch.dtype) -> Finding:
    """Parity with the logits of the model's own library alone."""
    tolerance = _TOLERANCES.get(dtype, _TOLERANCES[torch.float32])[1]
    said = "Logits with our attention and with the model's own"
    return compare("parity", "logits, native = model alone", _relative(ours.logits, own), tolerance, said)


def check_causality(model: Model, chat: RenderedChat) -> Finding:
    """Changing tokens at the end must change nothing before them."""
    for_shares, for_logits = _tolerances(model)
    kept = max(1, chat.n_tokens * 2 // 3)
    batch = as_batch(model, [chat])
    tokens = batch.tokens.clone()
    tokens[:, kept:] = tokens[:, kept:].flip(-1).roll(1, -1)
    tokens[:, -1] = tokens[:, 0]
    changed = TokenBatch(tokens, batch.role_ids, batch.attention_mask, batch.prompt_tokens)
    shares, logits = [], []
    for given in (batch, changed):
        shares.append(read_shares(model.backend, given)[0, :, :, :kept])
        with torch.no_grad():
            logits.append(model.backend.logits(given, ())[0, :kept].float().cpu())
    difference = _worst(_largest(shares[0] - shares[1]), _relative(*logits) * for_shares / for_logits)
    said = f"Changing the tokens from position {kept} on changes nothing before it"
    return compare("attention", "causality", difference, min(for_shares, _SAME_PROGRAM), said)


def check_padding(model: Model, chat: RenderedChat, short: RenderedChat) -> Finding:
    """Shares and next-token logits must not depend on the other conversations of the batch."""
    for_shares, for_logits = _tolerances(model)
    both, alone = as_batch(model, [chat, short]), as_batch(model, [short])
    n = short.n_tokens
    shares = read_shares(model.backend, both)[1, :, :, :n] - read_shares(model.backend, alone)[0]
    logits = []
    for chats in ([chat, short], [short]):
        left = as_batch(model, chats, left=True)
        with model.backend.decoder(left, (STEERING,)) as decode:
            logits.append(decode(left.tokens)[-1].cpu())
    difference = _worst(_largest(shares), _relative(*logits) * for_shares / for_logits)
    said = f"{n} tokens alone and padded to {chat.n_tokens} give the same shares and next token"
    return compare("attention", "padding", difference, for_shares, said)


def check_steering(model: Model, chat: RenderedChat) -> list[Finding]:
    """The first layer's steered shares follow from its unsteered ones, and the user's share goes up."""
    tolerance = _tolerances(model)[0]
    batch = as_batch(model, [chat])
    before, after = (read_shares(model.backend, batch, s)[0] for s in ((), (STEERING,)))
    targets = [int(role) for role in STEERING.roles]
    factor = torch.full((N_ROLES,), ALPHA)
    factor[[*targets, int(Role.SINK)]] = 1.0
    weakened = before[0] * factor
    said = f"First layer with α = {ALPHA}: shares are weakened and renormalised according to the formula"
    formula = compare(
        "steering",
        "formula",
        _largest(after[0] - weakened / weakened.sum(-1, keepdim=True)),
        tolerance,
        said,
    )
    low, high = (float(shares[:, :, -1, targets].sum(-1).mean()) for shares in (before, after))
    said = (
        f"Mean share of the user's tokens at the last position goes from {low:.3f} to {high:.3f} "
        f"with α = {ALPHA}."
    )
    return [formula, Finding("steering", "user's share", "pass" if high > low else "fail", said)]


@torch.no_grad()
def check_generation(model: Model, chat: RenderedChat) -> Finding:
    """Steered decoding with cache must give the same as recomputing every step without one."""
    backend, tolerance = model.backend, _tolerances(model)[1]
    steps = min(NEW_TOKENS, model.n_ctx - chat.n_tokens)
    batch = as_batch(model, [chat], left=True)
    cached, given = [], batch.tokens
    with backend.decoder(batch, (STEERING,)) as decode:
        for _ in range(steps):
            cached.append(decode(given)[0].cpu())
            given = cached[-1].argmax().reshape(1, 1).to(batch.tokens.device)
    tokens, roles = batch.tokens, batch.role_ids
    worst, same = 0.0, 0
    for logits in cached:
        whole = TokenBatch(tokens, roles, torch.ones_like(tokens), batch.prompt_tokens)
        again = backend.logits(whole, (STEERING,))[0, -1].float().cpu()
        worst = _worst(worst, _relative(logits, again))
        same += int(logits.argmax() == again.argmax())
        tokens = torch.cat([tokens, logits.argmax().reshape(1, 1).to(tokens.device)], dim=1)
        roles = torch.nn.functional.pad(roles, (0, 1), value=int(Role.ASSISTANT))
    said = f"{steps} tokens steered with cache against recomputing each step: {same} are the same; logits"
    return compare("steering", "generation", worst, tolerance, said)


def read_shares(
    backend: Backend, batch: TokenBatch, steerings: tuple[Steering, ...] = ()
) -> Float[Tensor, "batch layer head query role"]:
    """Shares of all layers and positions of a right-padded batch."""
    n_rows, length = batch.tokens.shape
    queries = torch.arange(length, device=batch.tokens.device).expand(n_rows, -1)
    return backend.read_shares(batch, range(backend.shape.n_layers), queries, steerings)


def as_batch(model: Model, chats: list[RenderedChat], *, left: bool = False) -> TokenBatch:
    """Conversations as a batch; padding holds a token that every model knows."""
    side = "left" if left else "right"
    return TokenBatch.from_chats(chats, pad_id=0, side=side, device=model.device)


def _tolerances(model: Model) -> tuple[float, float]:
    return _TOLERANCES.get(model.backend.dtype, _TOLERANCES[torch.float32])


def _worst(*differences: float) -> float:
    """The largest difference; unlike `max`, NaN if any is NaN."""
    return float(np.max(differences))


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _relative(one: Tensor, other: Tensor) -> float:
    """The largest difference of logits, in units of the largest logit if that is above 1."""
    return _largest(one - other) / max(1.0, _largest(other))


__all__ = [
    "NEW_TOKENS", "STEERING", "Observed", "as_batch", "check_causality", "check_generation", "check_padding",
    "check_steering", "compare_logits", "compare_ways", "observe", "observe_eagerly", "read_own_logits",
]  # fmt: skip
