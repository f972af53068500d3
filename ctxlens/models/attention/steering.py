"""What to steer, and how that becomes a bias on the attention scores.

`Att'(x, y) = Att(x, y) / Z` for keys y of the target roles and `alpha * Att(x, y) / Z` for all others (paper
section 2.3) is exactly the same as adding log(alpha) to the score of every other key before the softmax.

A target share t is reached in the same way. Where a query gives its targets the share s, adding
logit(t) - logit(s) to the scores of the targets makes their share t.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctxlens.chat.condition import Condition, check_strength
from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.errors import InputError
from ctxlens.parsing import parse_heads

SteeringMode = Literal["paper", "prompt-only", "compounding", "target-share"]
Heads = Literal["all"] | tuple[tuple[int, int], ...]

DEFAULT_ROLES = (Role.USER, Role.INDICATOR)


@dataclass(frozen=True)
class Steering:
    """Moves attention towards the target tokens, in chosen heads.

    Give either `alpha`, which weakens every other token by one factor, or `target_share`, for which
    every query of every chosen head gets its own factor.

    ```python
    import ctxlens as cl

    steering = cl.Steering(0.5, roles=(cl.Role.USER,), heads=((1, 2), (3, 0)))
    assert steering.mode == "paper"
    assert steering.describe()["heads"] == ["1.2", "3.0"]
    assert cl.Steering(target_share=0.8).mode == "target-share"
    ```

    Attributes:
        alpha: factor on the attention to all other tokens before renormalisation, in (0, 1];
            1 changes nothing. None with a target share.
        roles: the target roles, whose tokens keep their weight.
        heads: `"all"`, or pairs of layer and head.
        mode: `paper` (default with `alpha`) weakens every other token, including generated ones (the
            paper's formula). `prompt-only` leaves generated tokens alone, as PASTA does. `compounding`
            is what the paper's released code does under eager attention: it edits one mask in place, so
            that layer l (from 0) gets alpha ** (l + 1); generated tokens are left alone. `target-share`
            is the only mode with a target share.
        target_share: the targets' share of every query's attention, in (0, 1). It is reached exactly,
            from below or from above; proportions among the targets and among everything else stay the
            same. A query that sees no target, or only targets, stays as it is. Together with other
            steerings it is measured after all alphas and after the target shares given before it.
        emphasised: the targets are the tokens marked by `emphasise`, instead of those of the roles.

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
        check_strength(self.alpha, self.target_share)
        if self.alpha is not None:
            object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "mode", self._choose_mode())
        object.__setattr__(self, "roles", () if self.emphasised else parse_roles(self.roles))
        object.__setattr__(self, "heads", as_heads(self.heads))

    def _choose_mode(self) -> str:
        """The mode given, or the default; refuse one that is unknown or does not fit the strength."""
        default = "paper" if self.target_share is None else "target-share"
        mode = default if self.mode is None else self.mode
        if mode not in get_args(SteeringMode):
            modes = ", ".join(get_args(SteeringMode))
            raise InputError(f"unknown steering mode {mode!r}; choose one of {modes}.")
        if (mode == "target-share") != (self.target_share is not None):
            given = "alpha" if self.target_share is None else "a target share"
            raise InputError(f"steering mode {mode!r} does not go with {given}; leave the mode out.")
        return mode

    @property
    def changes_nothing(self) -> bool:
        """Whether attention under this steering is the same as without it."""
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
        """What is added to every key's score in the chosen heads, in nats, before weighting by head.

        Args:
            role_ids: role of every key; -1 for padding, which gets 0.
            prompt_tokens: by row, the position of the first generated key.
            emphasised: which keys are marked by `emphasise`; None means that no key is.

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
        """This steering in plain types, for the `meta` of a result."""
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
    import ctxlens as cl

    model = cl.load_model("organism-chat", backend="native", device="cpu")
    question = [{"role": "user", "content": "The tower is in Oakford. Where is the tower?"}]
    chat = cl.emphasise(model.render(question, add_generation_prompt=True), "in Oakford")
    with model.steer(0.1, emphasised=True):
        model.generate(chat, max_new_tokens=3)
    ```

    Args:
        chat: a rendered conversation.
        places: texts, each of which counts wherever it occurs in a message's content, or pairs of first
            and last character (exclusive) in `chat.text`. A token counts if any of its characters lies in a
            place. White space at the ends of a place is ignored.
        turns: messages whose whole content counts.

    Returns:
        The same conversation with these tokens marked, in addition to those that were marked before.

    Raises:
        InputError: a place or turn that has no token.
    """
    marked = np.zeros(len(chat), dtype=bool) if chat.emphasised is None else chat.emphasised.copy()
    for place in places:
        found = _find_text(chat, place) if isinstance(place, str) else _find_characters(chat, *place)
        if not found.any():
            raise InputError(f"{place!r} holds no token of the conversation, so it cannot be emphasised.")
        marked |= found
    for turn in turns:
        if turn < 0 or not (chat.turn == turn).any():
            raise InputError(f"turn {turn} has no token of content, so it cannot be emphasised.")
        marked |= chat.turn == turn
    return dataclasses.replace(chat, emphasised=marked)


def _find_text(chat: RenderedChat, text: str) -> Bool[np.ndarray, " pos"]:
    """The tokens of a text wherever it occurs in the content of messages."""
    found = np.zeros(len(chat), dtype=bool)
    if not text.strip():
        return found
    for match in re.finditer(re.escape(text.strip()), chat.text):
        inside = _overlapping(chat, match.start(), match.end())
        if (chat.turn[inside] >= 0).all():
            found |= inside
    return found


def _find_characters(chat: RenderedChat, first: int, last: int) -> Bool[np.ndarray, " pos"]:
    """The tokens of the characters from `first` to before `last`, without white space at the ends."""
    if not 0 <= first <= last <= len(chat.text):
        return np.zeros(len(chat), dtype=bool)
    said = chat.text[first:last]
    first += len(said) - len(said.lstrip())
    return _overlapping(chat, first, first + len(said.strip()))


def _overlapping(chat: RenderedChat, first: int, last: int) -> Bool[np.ndarray, " pos"]:
    """The tokens that have a character from `first` to before `last`."""
    return (chat.spans[:, 0] < last) & (chat.spans[:, 1] > first) & (last > first)


ReadShares = Callable[
    [Int[Tensor, "batch key_pos"], Float[Tensor, "batch head query_pos steering"]],
    Float[Tensor, "batch head query_pos role"],
]
"""Gives the shares of two kinds of keys, 0 and 1, and of the sink if there is one, under weighted biases."""


def weigh_targets(
    steerings: Sequence[Steering],
    key_bias: Float[Tensor, "batch key_pos steering"],
    select: Float[Tensor, "1 head 1 steering"],
    read_shares: ReadShares,
) -> Float[Tensor, "*#batch head *#query_pos steering"]:
    """The weights of the biases by head and query with which target shares are reached.

    Args:
        steerings: what is steered.
        key_bias: their key biases (`combine_biases`).
        select: their head weights (`combine_selects`); returned unchanged if there is no target share.
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
    biases = [s.key_bias(role_ids, prompt_tokens, emphasised) for s in steerings]
    return rearrange(biases, "steering batch key -> batch key steering")


def combine_selects(
    steerings: Sequence[Steering], layer: int, n_heads: int
) -> Float[Tensor, "1 head 1 steering"]:
    """The head weights of several steerings in one layer, one column each."""
    selects = [s.head_select(layer, n_heads) for s in steerings]
    return rearrange(selects, "steering head -> 1 head 1 steering")


def parse_roles(roles: str | Role | Iterable[str | Role]) -> tuple[Role, ...]:
    """Read roles given as `Role` values, names, or names separated by commas.

    Raises:
        InputError: an unknown role, or no role.
    """
    if isinstance(roles, str):
        roles = [part.strip() for part in roles.split(",")]
    elif isinstance(roles, Role):
        roles = [roles]
    parsed = tuple(Role.parse(role) for role in roles)
    if not parsed:
        raise InputError("steering needs at least one target role, for example user.")
    return parsed


def as_heads(heads: object) -> Heads:
    """Read heads in any form: `"all"`, text such as `"1.2,3.0"`, or pairs of layer and head.

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
