"""What to steer, and how that becomes a bias on the attention scores.

`Att'(x, y) = Att(x, y) / Z` for keys y of the target roles and `alpha * Att(x, y) / Z` for all others
(paper section 2.3) is exactly the same as adding log(alpha) to the score of every other key before softmax.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxlens.errors import InputError
from ctxlens.roles import Role

SteeringMode = Literal["paper", "prompt-only", "compounding"]
Heads = Literal["all"] | tuple[tuple[int, int], ...]

DEFAULT_ROLES = (Role.USER, Role.INDICATOR)


@dataclass(frozen=True)
class Steering:
    """Weakens every token that is not of the target roles, in chosen heads.

    Attributes:
        alpha: factor on the attention of all other tokens before renormalisation, in (0, 1];
            1 changes nothing.
        roles: the target roles, whose tokens keep their weight.
        heads: `"all"`, or pairs of layer and head.
        mode: `paper` weakens every other token, those that are being generated too (the paper's formula);
            `prompt-only` leaves generated tokens alone (PASTA's way); `compounding` is what the paper's
            released code does under eager attention: it edits one mask in place, so layer l (from 0) gets
            alpha ** (l + 1), generated tokens are left alone.

    Raises:
        InputError: alpha outside (0, 1], no or unknown roles, an unknown mode, malformed heads.
    """

    alpha: float | int
    roles: tuple[Role, ...] = DEFAULT_ROLES
    heads: Heads = "all"
    mode: SteeringMode | str = "paper"

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha <= 1:
            raise InputError(
                f"alpha must be in (0, 1], got {self.alpha!r}; 1 changes nothing, smaller steers more."
            )
        if self.mode not in get_args(SteeringMode):
            modes = ", ".join(get_args(SteeringMode))
            raise InputError(f"unknown steering mode {self.mode!r}; choose one of {modes}.")
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "roles", parse_roles(self.roles))
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
        self, role_ids: Int[Tensor, "batch key_pos"], prompt_tokens: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch key_pos"]:
        """What every key's score gets in the chosen heads, in nats: 0 or log(alpha).

        Args:
            role_ids: role of every key; -1 for padding, which gets 0.
            prompt_tokens: position from which on keys are generated ones, by row.
        """
        targets = torch.tensor([int(role) for role in self.roles], device=role_ids.device)
        weakened = ~torch.isin(role_ids, targets) & (role_ids >= 0)
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
        roles = [role.label for role in self.roles]
        return {"alpha": self.alpha, "roles": roles, "heads": heads, "mode": self.mode}


def combine_biases(
    steerings: Sequence[Steering],
    role_ids: Int[Tensor, "batch key_pos"],
    prompt_tokens: Int[Tensor, " batch"],
) -> Float[Tensor, "batch key_pos steering"]:
    """The key biases of several steerings, one column each."""
    return torch.stack([s.key_bias(role_ids, prompt_tokens) for s in steerings], dim=-1)


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
    "DEFAULT_ROLES", "Heads", "Steering", "SteeringMode", "as_heads", "combine_biases", "combine_selects",
    "parse_heads", "parse_roles",
]  # fmt: skip
