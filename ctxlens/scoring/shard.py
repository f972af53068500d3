"""Score conversations in memory, the step that every way of scoring a data set shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from ctxlens.chat.data import Conversation, fingerprint_conversations
from ctxlens.chat.roles import RenderedChat, Role
from ctxlens.chat.roles.left_out import count_left_out
from ctxlens.errors import InputError
from ctxlens.models.backends.batch import plan_batches
from ctxlens.models.backends.protocol import TurnReduce
from ctxlens.results.scores import (
    LAYER_COLUMNS,
    RESTING_COLUMNS,
    TURN_COLUMNS,
    Precision,
    check_precision,
    make_turns,
)
from ctxlens.scoring.layers import default_layers
from ctxlens.scoring.measure import VALUES, mean_turns, reduce_turns, uniform_share

if TYPE_CHECKING:
    import pyarrow as pa

Turn = tuple[str, int]
"""A conversation's id and the index of an assistant message in it."""

BATCH_TOKENS = {"cpu": 1024, "other": 8192}
"""Padded tokens per forward pass, by kind of device."""

_SOURCES = {
    name: VALUES.index("share_user" if name == "mean_heads" else name)
    for name in LAYER_COLUMNS
    if name not in RESTING_COLUMNS
}
_RESTING_SOURCES = {f"resting_{role.label}": len(VALUES) + int(role) for role in Role if role is not Role.PAD}
"""Where the values of the columns stand: those of `reduce_turns`, then those of `mean_turns`."""


@runtime_checkable
class Scorer(Protocol):
    """What scoring requires of a model; `ctxlens.load_model` returns one."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> Mapping[str, Any]: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_ctx(self) -> int: ...

    def render(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> RenderedChat:
        """Render a conversation with the model's tokenizer and template."""
        ...

    def reduce_responses(
        self,
        chats: Sequence[RenderedChat],
        reduce: TurnReduce,
        *,
        layers: Sequence[int],
        batch_tokens: int,
        resting: TurnReduce | None = None,
    ) -> list[dict[int, Float[np.ndarray, "layer value"]]]:
        """The result of a function of the role shares, for every chat and assistant turn.

        With `resting`, a function of what rests on attention sinks, its values follow.
        """
        ...


@dataclass(frozen=True)
class Settings:
    """How conversations are scored.

    Attributes:
        layers: the layers to score; the forward pass stops after the highest.
        max_tokens: conversations are truncated to this many tokens.
        batch_tokens: padded tokens per forward pass.
        precision: the number format in which scores are stored.
        kinds: known kinds of turns, stored in the column `kind`.
        sinks: also store what of each role's share rests on attention sinks.
    """

    layers: tuple[int, ...]
    max_tokens: int
    batch_tokens: int
    precision: Precision | str = "float32"
    kinds: Mapping[Turn, str] | None = None
    sinks: bool = False

    @classmethod
    def of(
        cls,
        model: Scorer,
        *,
        layers: Sequence[int] | str | None = None,
        max_tokens: int | None = None,
        batch_tokens: int | None = None,
        **options: Any,
    ) -> Settings:
        """Settings for a model.

        Args:
            model: the model.
            layers: see `check_layers`.
            max_tokens: at most the model's window, which is the default.
            batch_tokens: by default few on a CPU, so that they fit its caches, and more elsewhere
                (`BATCH_TOKENS`).
            options: the other attributes.

        Raises:
            InputError: a setting is out of range.
        """
        check_precision(options.get("precision", "float32"))
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}; expected a number of tokens of at least 1.")
        window = min(max_tokens or model.n_ctx, model.n_ctx)
        if batch_tokens is None:
            device = str(getattr(model, "device", "other")).partition(":")[0]
            batch_tokens = BATCH_TOKENS.get(device, BATCH_TOKENS["other"])
        return cls(check_layers(model, layers), window, batch_tokens, **options)


@dataclass(frozen=True)
class Shard:
    """The scores of some conversations: one row per turn, with counts in `meta`."""

    turns: pa.Table
    meta: Mapping[str, Any]


def check_layers(model: Scorer, layers: Sequence[int] | str | None) -> tuple[int, ...]:
    """The layers to score, in order.

    Args:
        model: the model.
        layers: numbers, or `"all"`. By default, all layers up to the paper's relative depth, 15 of 22, which
            costs no more than that layer alone and a quarter less than all layers.

    Raises:
        InputError: the model lacks a layer, or no layer is given.
    """
    if layers is None:
        return default_layers(model.n_layers)
    if layers == "all":
        return tuple(range(model.n_layers))
    if isinstance(layers, str):
        raise InputError(f'layers must be numbers or "all", got {layers!r}.')
    chosen = tuple(sorted(set(layers)))
    if not chosen or any(not 0 <= layer < model.n_layers for layer in chosen):
        raise InputError(
            f"layers must lie in 0 to {model.n_layers - 1} for {model.name}, got {list(layers)}."
        )
    return chosen


def score_shard(
    model: Scorer,
    part: Sequence[Conversation],
    settings: Settings,
    progress: Callable[[int], None] | None = None,
) -> Shard:
    """Score every assistant turn of some conversations, in batches of similar length.

    Args:
        model: the model.
        part: the conversations. One that cannot be rendered or has no assistant turn is skipped and listed
            with the reason in the shard's `skipped`.
        settings: how to score.
        progress: called with the number of finished conversations.

    Raises:
        InputError: attention is not a number; the message names the model and the turn.
    """
    chats, skipped = _render(model, part, settings)
    done = len(part) - len(chats)
    places = list(chats)
    values: dict[int, dict[int, np.ndarray]] = {}
    for batch in plan_batches([chats[at].n_tokens for at in places], settings.batch_tokens):
        members = [places[k] for k in batch]
        found = model.reduce_responses(
            [chats[at] for at in members],
            reduce_turns,
            layers=settings.layers,
            batch_tokens=settings.batch_tokens,
            **({"resting": mean_turns} if settings.sinks else {}),
        )
        for at, turns in zip(members, found, strict=True):
            _check_finite(model, part[at].id, turns)
            values[at] = turns
        done += len(batch)
        if progress is not None:
            progress(done)
    meta = {
        "conversations": len(part),
        "skipped": skipped,
        "truncated": sum(chat.truncated is not None for chat in chats.values()),
        "left_out": count_left_out(chats.values()),
        "fingerprint": fingerprint_conversations(part),
    }
    return Shard(_table(part, chats, values, settings), meta)


def _render(
    model: Scorer, part: Sequence[Conversation], settings: Settings
) -> tuple[dict[int, RenderedChat], list[tuple[str, str]]]:
    chats: dict[int, RenderedChat] = {}
    skipped: list[tuple[str, str]] = []
    for at, conversation in enumerate(part):
        try:
            chat = model.render(conversation.messages, max_tokens=settings.max_tokens, truncate=True)
        except InputError as error:
            skipped.append((conversation.id, str(error)))
            continue
        if chat.response_turns():
            chats[at] = chat
        else:
            skipped.append((conversation.id, "no assistant turn has tokens"))
    return chats, skipped


def _check_finite(model: Scorer, name: str, turns: Mapping[int, np.ndarray]) -> None:
    for turn, values in turns.items():
        if not np.isfinite(values).all():
            raise InputError(
                f"{model.name} gives attention that is not a number in turn {turn} of conversation {name!r}; "
                "load it in float32 or check its weights."
            )


def _table(
    part: Sequence[Conversation],
    chats: Mapping[int, RenderedChat],
    values: Mapping[int, Mapping[int, np.ndarray]],
    settings: Settings,
) -> pa.Table:
    turns = [(at, turn) for at, chat in chats.items() for turn in chat.response_turns()]
    columns: dict[str, Any] = {name: [] for name in TURN_COLUMNS}
    for at, turn in turns:
        is_user, positions = chats[at].mask(Role.USER), chats[at].response_positions(turn)
        row = {
            "conversation": part[at].id,
            "turn": turn,
            "uniform": uniform_share(is_user, positions),
            "response_tokens": len(positions),
            "context_tokens": int(is_user[: positions[0]].sum()),
            "truncated": chats[at].truncated is not None,
        }
        for name, value in row.items():
            columns[name].append(value)
    if settings.kinds is not None:
        columns["kind"] = [settings.kinds.get((part[at].id, turn), "") for at, turn in turns]
    sources = _SOURCES | (_RESTING_SOURCES if settings.sinks else {})
    shape = (len(turns), len(settings.layers), len(VALUES) + len(Role) * settings.sinks)
    stacked = np.array([values[at][turn] for at, turn in turns], dtype=np.float32).reshape(shape)
    by_layer = {name: stacked[:, :, place] for name, place in sources.items()}
    return make_turns(columns, by_layer, settings.precision)


__all__ = ["Scorer", "Settings", "Shard", "Turn", "check_layers", "score_shard"]
