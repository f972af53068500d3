"""What to steer, and how that becomes a bias on the attention scores.

`Att'(x, y) = Att(x, y) / Z` for keys y of the target roles and `alpha * Att(x, y) / Z` for all others
(paper section 2.3) is exactly the same as adding log(alpha) to the score of every other key before softmax.

A target share t is reached in the same way: where a query gives its targets the share s, adding
logit(t) - logit(s) to the scores of the targets makes it t.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctxlens.chat.condition import Condition
from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.errors import InputError

SteeringMode = Literal["paper", "prompt-only", "compounding", "target-share"]
Heads = Literal["all"] | tuple[tuple[int, int], ...]

DEFAULT_ROLES = (Role.USER, Role.INDICATOR)


@dataclass(frozen=True)
class Steering:
    """Moves attention towards the target tokens, in chosen heads.

    Give either `alpha`, which weakens every other token by one factor, or `target_share`, which gives
    every query of every chosen head its own factor.

    Attributes:
        alpha: factor on the attention of all other tokens before renormalisation, in (0, 1];
            1 changes nothing. None with a target share.
        roles: the target roles, whose tokens keep their weight.
        heads: `"all"`, or pairs of layer and head.
        mode: `paper` (default with `alpha`) weakens every other token, those that are being generated too
            (the paper's formula); `prompt-only` leaves generated tokens alone (PASTA's way); `compounding`
            is what the paper's released code does under eager attention: it edits one mask in place, so
            layer l (from 0) gets alpha ** (l + 1), generated tokens are left alone. `target-share`
            is the only mode with a target share.
        target_share: what the targets get of every query's attention, in (0, 1). It is reached exactly,
            from below or from above; proportions among the targets and among everything else stay. A
            query that sees no target, or nothing else, stays as it is. Beside other steerings it is
            measured after all alphas and after the target shares given before it.
        emphasised: the targets are the tokens marked by `emphasise`, in place of those of the roles.

    Raises:
        InputError: not exactly one of alpha and target share, one of them out of range, no or unknown
            roles, an unknown mode or one that does not fit, malformed heads.
    """

    alpha: float | int | None = None
    roles: tuple[Role, ...] = DEFAULT_ROLES
    heads: Heads = "all"
    mode: SteeringMode | str | None = None
    target_share: float | None = None
    emphasised: bool = False

    def __post_init__(self) -> None:
        if (self.alpha is None) == (self.target_share is None):
            raise InputError(
                f"give either alpha or a target share, not {'both' if self.alpha is not None else 'neither'}."
            )
        if self.alpha is not None:
            if isinstance(self.alpha, bool) or not (
                isinstance(self.alpha, int | float) and 0 < self.alpha <= 1
            ):
                raise InputError(
                    f"alpha must be in (0, 1], got {self.alpha!r}; 1 changes nothing, smaller steers more."
                )
            object.__setattr__(self, "alpha", float(self.alpha))
        elif not (isinstance(self.target_share, float) and 0 < self.target_share < 1):
            raise InputError(f"the target share must be in (0, 1), got {self.target_share!r}.")
        default = "paper" if self.target_share is None else "target-share"
        mode = default if self.mode is None else self.mode
        if mode not in get_args(SteeringMode):
            modes = ", ".join(get_args(SteeringMode))
            raise InputError(f"unknown steering mode {mode!r}; choose one of {modes}.")
        if (mode == "target-share") != (self.target_share is not None):
            given = "alpha" if self.target_share is None else "a target share"
            raise InputError(f"steering mode {mode!r} does not go with {given}; leave the mode out.")
        object.__setattr__(self, "mode", mode)
        object.__setattr__(self, "roles", () if self.emphasised else parse_roles(self.roles))
        object.__setattr__(self, "heads", as_heads(self.heads))

    @property
    def changes_nothing(self) -> bool:
        """Whether attention under this steering is attention without it."""
        return self.alpha == 1 or self.heads == ()

    def check_heads(self, n_layers: int, n_heads: int) -> None:
        """Raise `InputError` if a chosen head does not exist in a model of this shape."""
        for layer, head in () if self.heads == "all" else self.heads:
            if not (0 <= layer < n_layers and 0 <= head < n_heads):
                raise InputError(
                    f"head {layer}.{head} does not exist: the model has layers 0 to {n_layers - 1} "
                    f"with heads 0 to {n_heads - 1}."
                )

    def key_bias(
        self,
        role_ids: Int[Tensor, "batch key_pos"],
        prompt_tokens: Int[Tensor, " batch"],
        emphasised: Bool[Tensor, "batch key_pos"] | None = None,
    ) -> Float[Tensor, "batch key_pos"]:
        """What every key's score gets in the chosen heads, in nats, before it is weighed by head and query.

        Args:
            role_ids: role of every key; -1 for padding, which gets 0.
            prompt_tokens: position from which on keys are generated ones, by row.
            emphasised: the keys marked by `emphasise`; None: none.

        Returns:
            0 for targets and log(alpha) for others; with a target share 1 for targets and 0 for others.
        """
        if self.emphasised:
            target = torch.zeros_like(role_ids, dtype=torch.bool) if emphasised is None else emphasised
        else:
            roles = torch.tensor([int(role) for role in self.roles], device=role_ids.device)
            target = torch.isin(role_ids, roles)
        if self.alpha is None:
            return target.float()
        weakened = ~target & (role_ids >= 0)
        if self.mode != "paper":
            position = torch.arange(role_ids.shape[1], device=role_ids.device)
            weakened &= position < prompt_tokens.to(role_ids.device)[:, None]
        return weakened.float() * math.log(self.alpha)

    def head_select(self, layer: int, n_heads: int) -> Float[Tensor, " head"]:
        """The weight of the bias in every head of a layer: 0 where not steered, else 1 (or layer + 1)."""
        weight = float(layer + 1) if self.mode == "compounding" else 1.0
        if self.heads == "all":
            return torch.full((n_heads,), weight)
        select = torch.zeros(n_heads)
        select[[h for at, h in self.heads if at == layer]] = weight
        return select

    def touches(self, layer: int) -> bool:
        """Whether any head of this layer is steered."""
        return not self.changes_nothing and (self.heads == "all" or any(at == layer for at, _ in self.heads))

    def describe(self) -> dict[str, object]:
        """For a result's `meta`."""
        heads = self.heads if self.heads == "all" else [f"{layer}.{head}" for layer, head in self.heads]
        roles = ["emphasised"] if self.emphasised else [role.label for role in self.roles]
        strength = {"alpha": self.alpha} if self.target_share is None else {"target_share": self.target_share}
        return {**strength, "roles": roles, "heads": heads, "mode": self.mode}


def steering_of(condition: Condition) -> Steering | None:
    """The steering that a condition asks for, to the default roles; None if it asks for none.

    ```python
    steering_of(Condition.parse("template+steered:0.5:1.2/3.0"))  # alpha 0.5, heads (1, 2) and (3, 0)
    ```

    Raises:
        InputError: the condition's heads cannot be read, or are `retrieval`: these depend on a model and an
            input, so the caller has to find them first.
    """
    if not condition.steered:
        return None
    heads = as_heads(condition.heads.strip("/").replace("/", ","))
    return Steering(condition.alpha, heads=heads, target_share=condition.target_share)


def emphasise(chat: RenderedChat, *places: str | tuple[int, int], turns: Sequence[int] = ()) -> RenderedChat:
    """Mark tokens of a conversation as the targets of `Steering(..., emphasised=True)`.

    ```python
    chat = emphasise(chat, "in Paris", (120, 154), turns=[0])
    with model.steer(0.1, emphasised=True):
        model.generate(chat)
    ```

    Args:
        chat: a rendered conversation.
        places: texts, each of which counts wherever it stands in a message's content, or pairs of first
            and last character (exclusive) in `chat.text`. A token counts if any of its characters lies in a
            place; white space at a place's ends does not.
        turns: messages whose whole content counts.

    Returns:
        The same conversation with these tokens marked, beside those that were marked before.

    Raises:
        InputError: a place or turn that has no token.
    """
    start, end = chat.spans[:, 0], chat.spans[:, 1]
    marked = np.zeros(len(chat), dtype=bool) if chat.emphasised is None else chat.emphasised.copy()
    for place in places:
        if isinstance(place, str):
            found = np.zeros(len(chat), dtype=bool)
            for match in re.finditer(re.escape(place.strip()), chat.text) if place.strip() else ():
                inside = (start < match.end()) & (end > match.start())
                found |= inside & bool((chat.turn[inside] >= 0).all())
        else:
            first, last = place
            said = chat.text[first:last] if 0 <= first <= last <= len(chat.text) else ""
            first += len(said) - len(said.lstrip())
            last = first + len(said.strip())
            found = (start < last) & (end > first) & (last > first)
        if not found.any():
            raise InputError(f"{place!r} holds no token of the conversation, so it cannot be emphasised.")
        marked |= found
    for turn in turns:
        if turn < 0 or not (chat.turn == turn).any():
            raise InputError(f"turn {turn} has no token of content, so it cannot be emphasised.")
        marked |= chat.turn == turn
    return dataclasses.replace(chat, emphasised=marked)


ReadShares = Callable[
    [Int[Tensor, "batch key_pos"], Float[Tensor, "batch head query_pos steering"]],
    Float[Tensor, "batch head query_pos role"],
]
"""Shares of two kinds of keys, 0 and 1, and of the sink if there is one, under some weights of the biases."""


def weigh_targets(
    steerings: Sequence[Steering],
    key_bias: Float[Tensor, "batch key_pos steering"],
    select: Float[Tensor, "1 head 1 steering"],
    read_shares: ReadShares,
) -> Float[Tensor, "*#batch head *#query_pos steering"]:
    """The weights of the biases by head and query, so that target shares are reached.

    Args:
        steerings: what is steered.
        key_bias: their key biases (`combine_biases`).
        select: their head weights (`combine_selects`); returned as it is where there is no target share.
        read_shares: computes how a layer's attention spreads over two kinds of keys.
    """
    if all(steering.target_share is None for steering in steerings):
        return select
    chosen = select.unbind(-1)
    weights = [weight * float(s.target_share is None) for weight, s in zip(chosen, steerings, strict=True)]
    for i, steering in enumerate(steerings):
        if steering.target_share is None:
            continue
        wanted = math.log(steering.target_share / (1 - steering.target_share))
        together = torch.stack(torch.broadcast_tensors(*weights), dim=-1)
        shares = read_shares(key_bias[..., i].long(), together)
        target, rest = shares[..., 1], shares[..., 0] + shares[..., 2:].sum(-1)
        both = (target > 0) & (rest > 0)
        needed = wanted + torch.where(both, rest, 1.0).log() - torch.where(both, target, 1.0).log()
        weights[i] = chosen[i] * torch.where(both, needed, 0.0)
    return torch.stack(torch.broadcast_tensors(*weights), dim=-1)


def combine_biases(
    steerings: Sequence[Steering],
    role_ids: Int[Tensor, "batch key_pos"],
    prompt_tokens: Int[Tensor, " batch"],
    emphasised: Bool[Tensor, "batch key_pos"] | None = None,
) -> Float[Tensor, "batch key_pos steering"]:
    """The key biases of several steerings, one column each."""
    return torch.stack([s.key_bias(role_ids, prompt_tokens, emphasised) for s in steerings], dim=-1)


def combine_selects(
    steerings: Sequence[Steering], layer: int, n_heads: int
) -> Float[Tensor, "1 head 1 steering"]:
    """The head weights of several steerings in one layer, one column each."""
    return torch.stack([s.head_select(layer, n_heads) for s in steerings], dim=-1)[None, :, None]


def parse_roles(roles: str | Role | Iterable[str | Role]) -> tuple[Role, ...]:
    """Roles by name, value or both; `InputError` for unknown ones or none."""
    if isinstance(roles, str):
        roles = [part.strip() for part in roles.split(",")]
    elif isinstance(roles, Role):
        roles = [roles]
    parsed = tuple(Role.parse(role) for role in roles)
    if not parsed:
        raise InputError("steering needs at least one target role, for example user.")
    return parsed


def parse_heads(text: str) -> Heads | Literal["retrieval"]:
    """Read the heads of a command line: `all`, `retrieval`, or pairs such as `1.2,3.0` (layer.head).

    Raises:
        InputError: anything else, naming the part that could not be read.
    """
    text = text.strip()
    if text in ("all", "retrieval"):
        return cast(Literal["all", "retrieval"], text)
    pairs = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\.(\d+)\s*", part)
        if not match:
            raise InputError(
                f"heads {part.strip()!r} cannot be read; give all, retrieval, or pairs such as 1.2,3.0."
            )
        pairs.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(pairs))


def as_heads(heads: object) -> Heads:
    """Heads from what a caller may give: `"all"`, text such as `"1.2,3.0"`, or pairs of layer and head.

    Raises:
        InputError: anything else; also `retrieval`, which depends on a model and an input.
    """
    if isinstance(heads, str):
        heads = parse_heads(heads)
        if heads == "retrieval":
            raise InputError(
                "the retrieval heads depend on a model and an input; give all or layer.head pairs."
            )
        return heads
    try:
        pairs = tuple((int(layer), int(head)) for layer, head in heads)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise InputError(f"heads must be 'all' or pairs of layer and head, got {heads!r}.") from None
    return tuple(dict.fromkeys(pairs))


__all__ = [
    "DEFAULT_ROLES", "Heads", "ReadShares", "Steering", "SteeringMode", "as_heads", "combine_biases",
    "combine_selects", "emphasise", "parse_heads", "parse_roles", "steering_of", "weigh_targets",
]  # fmt: skip
