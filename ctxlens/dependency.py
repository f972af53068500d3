"""How much each assistant turn draws on the user's text, and which turns to call context-dependent.

The score of a turn (paper section 3.1) is the attention that its response tokens pay to all user tokens
before them, in the head of one layer that pays most. `score_conversations` computes it for every turn and
layer in one forward pass that stops after the highest layer; threshold, layer and reduction are chosen
afterwards, by `select_turns`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from ctxlens.data import Conversation
from ctxlens.errors import InputError, RunExistsError
from ctxlens.results import Scores
from ctxlens.roles import RenderedChat, Role
from ctxlens.runs import Run

if TYPE_CHECKING:
    import pandas as pd

Turn = tuple[str, int]
"""A conversation's id and the index of an assistant message in it."""

SHARD_CONVERSATIONS = 128
"""Conversations a shard: what is done again after a kill, and the most that is held at once."""

_SHARDS = "score-shards"
_RESULT = "scores.parquet"
_DTYPES = {
    "conversation": "str", "turn": "int32", "layer": "int32", "best_of_mean": "float32",
    "mean_of_best": "float32", "mean_heads": "float32", "uniform": "float32",
    "response_tokens": "int32", "context_tokens": "int32", "truncated": "bool",
}  # fmt: skip


@runtime_checkable
class Scorer(Protocol):
    """What scoring needs of a model; `ctxlens.load_model` gives one."""

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

    def read_response_shares(
        self, chats: Sequence[RenderedChat], *, layers: Sequence[int], batch_tokens: int
    ) -> list[dict[int, Float[np.ndarray, "layer head response_pos role"]]]:
        """Role shares of the response tokens of every assistant turn, by chat and turn."""
        ...


def score_conversations(
    model: Scorer,
    conversations: Iterable[Conversation],
    *,
    layers: Sequence[int] | None = None,
    out: Run | None = None,
    progress: Callable[[int, int], None] | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = 8192,
    kinds: Mapping[Turn, str] | None = None,
) -> Scores:
    """Score every assistant turn of a data set at every layer.

    The score is the share of role `user`; an indicator's tokens do not count as the user's. A conversation
    longer than the window is truncated and flagged; one that cannot be rendered, or has no assistant turn,
    is left out. Both are counted in the result's `meta`; what was left out, and why, is in `skipped`
    there and in the run's `skipped.json`.

    Args:
        model: the seed model, fine-tuned without indicator.
        conversations: the data set; ids must be unique.
        layers: layers to score; all if not given. The forward pass stops after the highest.
        out: a run folder. Finished shards are kept there, so that the same call goes on after a kill, and
            the result is written as `scores.parquet`.
        progress: called with conversations done and in all.
        max_tokens: truncate to fewer tokens than the model's window.
        batch_tokens: padded tokens a forward pass.
        kinds: known kinds of turns, kept beside the scores in the column `kind`.

    Raises:
        InputError: no conversations, ids that are not unique, layers out of range, or attention that is
            not a number (model and turn are named).
        RunExistsError: the run holds scores of other data, another model or other settings.
    """
    data = list(conversations)
    layers = check_layers(model, layers)
    plan = _plan(model, data, layers, max_tokens, kinds)
    if out is not None and out.has(_RESULT):
        return _finished(out, plan)
    settings = _Settings(layers, min(max_tokens or model.n_ctx, model.n_ctx), batch_tokens, kinds)
    shards = []
    for index, start in enumerate(range(0, len(data), SHARD_CONVERSATIONS)):
        part = data[start : start + SHARD_CONVERSATIONS]
        shard = _stored_shard(out, index, plan)
        if shard is None:
            shard = _score_shard(model, part, settings, _shifted(progress, start, len(data)))
            if out is not None:
                shard = Scores(shard.frame, {**shard.meta, "plan": plan})
                out.save(_shard_name(index), shard)
        elif progress is not None:
            progress(start + len(part), len(data))
        shards.append(shard)
    scores = _merge(shards, model, len(data), layers, settings.max_tokens, plan)
    if out is not None:
        out.write_json("skipped.json", scores.meta["skipped"])
        out.save(_RESULT, scores)
        shutil.rmtree(out.path(_SHARDS), ignore_errors=True)
    return scores


@dataclass(frozen=True)
class _Settings:
    layers: tuple[int, ...]
    max_tokens: int
    batch_tokens: int
    kinds: Mapping[Turn, str] | None


def check_layers(model: Scorer, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers to score, in order: all if none are given; `InputError` if the model lacks one."""
    chosen = tuple(range(model.n_layers)) if layers is None else tuple(sorted(set(layers)))
    wrong = [layer for layer in chosen if not 0 <= layer < model.n_layers]
    if wrong or not chosen:
        raise InputError(
            f"layers must lie in 0 to {model.n_layers - 1} for {model.name}, got {list(layers or ())}."
        )
    return chosen


def _plan(
    model: Scorer,
    data: Sequence[Conversation],
    layers: Sequence[int],
    max_tokens: int | None,
    kinds: Mapping[Turn, str] | None,
) -> str:
    """A digest of everything that the scores depend on."""
    if not data:
        raise InputError("there are no conversations to score; give a data set with at least one.")
    name, count = Counter(conversation.id for conversation in data).most_common(1)[0]
    if count > 1:
        raise InputError(f"conversation ids must be unique, but {name!r} occurs {count} times.")
    settings = [dict(model.identity), list(layers), max_tokens, SHARD_CONVERSATIONS]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for conversation in data:
        content = [conversation.id, [dict(message) for message in conversation.messages]]
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    digest.update(repr(sorted((kinds or {}).items())).encode())
    return digest.hexdigest()


def _shifted(progress: Callable[[int, int], None] | None, start: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(start + done, total) if progress is not None else None


def _finished(out: Run, plan: str) -> Scores:
    scores = Scores.load(out.path(_RESULT))
    if scores.meta.get("plan") != plan:
        raise RunExistsError(
            f"{out.folder} already holds scores of other conversations, another model or other settings; "
            "choose another folder."
        )
    shutil.rmtree(out.path(_SHARDS), ignore_errors=True)
    return scores


def _shard_name(index: int) -> str:
    return f"{_SHARDS}/{index:06d}.parquet"


def _stored_shard(out: Run | None, index: int, plan: str) -> Scores | None:
    """A shard that an earlier call has finished; one that cannot be read is scored again."""
    if out is None or not out.has(_shard_name(index)):
        return None
    try:
        shard = Scores.load(out.path(_shard_name(index)))
    except InputError as error:
        warnings.warn(f"scoring a damaged shard again: {error}", stacklevel=3)
        return None
    if shard.meta.get("plan") != plan:
        raise RunExistsError(
            f"{out.folder} holds unfinished scores of other conversations, another model or other settings; "
            f"choose another folder, or remove {_SHARDS} in it."
        )
    return shard


def _score_shard(
    model: Scorer, part: Sequence[Conversation], settings: _Settings, progress: Callable[[int], None]
) -> Scores:
    from ctxlens.batching import plan_batches

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
    done = len(part) - len(chats)
    progress(done)
    places = list(chats)
    rows: dict[int, list[dict[str, Any]]] = {}
    for batch in plan_batches([chats[at].n_tokens for at in places], settings.batch_tokens):
        members = [places[k] for k in batch]
        shares = model.read_response_shares(
            [chats[at] for at in members], layers=settings.layers, batch_tokens=settings.batch_tokens
        )
        for at, turns in zip(members, shares, strict=True):
            rows[at] = _score_chat(model.name, part[at].id, chats[at], turns, settings)
        done += len(batch)
        progress(done)
    frame = _frame([row for at in sorted(rows) for row in rows[at]], settings.kinds is not None)
    truncated = sum(chat.truncated is not None for chat in chats.values())
    return Scores(frame, {"skipped": skipped, "truncated": truncated})


def _score_chat(
    model_name: str,
    name: str,
    chat: RenderedChat,
    turns: Mapping[int, Float[np.ndarray, "layer head response_pos role"]],
    settings: _Settings,
) -> list[dict[str, Any]]:
    rows = []
    is_user = chat.mask(Role.USER)
    for turn in chat.response_turns():
        user = np.asarray(turns[turn], dtype=np.float64)[..., Role.USER]
        if not np.isfinite(user).all():
            raise InputError(
                f"{model_name} gives attention that is not a number in turn {turn} of conversation {name!r}; "
                "load it in float32 or check its weights."
            )
        positions = chat.response_positions(turn)
        reductions = reduce_user_shares(user)
        common = {
            "uniform": uniform_share(is_user, positions),
            "response_tokens": len(positions),
            "context_tokens": int(is_user[: positions[0]].sum()),
            "truncated": chat.truncated is not None,
        }
        kind = {} if settings.kinds is None else {"kind": settings.kinds.get((name, turn), "")}
        for at, layer in enumerate(settings.layers):
            values = {reduction: float(value[at]) for reduction, value in reductions.items()}
            rows.append({"conversation": name, "turn": turn, "layer": layer, **values, **common, **kind})
    return rows


def reduce_user_shares(
    user: Float[np.ndarray, "layer head response_pos"],
) -> dict[str, Float[np.ndarray, " layer"]]:
    """The reductions of user shares over heads and response tokens, each 0 to 1.

    `best_of_mean` is the paper's text: the head with the largest mean over the tokens. `mean_of_best` is
    its released code: the largest head of every token, then the mean; never smaller. `mean_heads` is the
    mean over both.
    """
    return {
        "best_of_mean": user.mean(axis=2).max(axis=1),
        "mean_of_best": user.max(axis=1).mean(axis=1),
        "mean_heads": user.mean(axis=(1, 2)),
    }


def uniform_share(is_user: Bool[np.ndarray, " pos"], positions: np.ndarray) -> float:
    """The user share, 0 to 1, if every response token attended equally to itself and all before it."""
    positions = np.asarray(positions)
    return float((np.cumsum(is_user)[positions] / (positions + 1)).mean())


def _frame(rows: Sequence[Mapping[str, Any]], with_kind: bool) -> pd.DataFrame:
    import pandas as pd

    dtypes = {**_DTYPES, "kind": "str"} if with_kind else _DTYPES
    return pd.DataFrame(list(rows), columns=pd.Index(list(dtypes))).astype(dtypes)


def _merge(
    shards: Sequence[Scores], model: Scorer, n: int, layers: tuple[int, ...], max_tokens: int, plan: str
) -> Scores:
    skipped = [tuple(entry) for shard in shards for entry in shard.meta["skipped"]]
    meta = {
        "model": dict(model.identity),
        "layers": list(layers),
        "max_tokens": max_tokens,
        "conversations": n,
        "truncated": sum(shard.meta["truncated"] for shard in shards),
        "skipped": [{"conversation": name, "reason": reason} for name, reason in skipped],
        "plan": plan,
    }
    return Scores(Scores.concat(shards).frame, meta)


__all__ = ["Scorer", "Turn", "check_layers", "reduce_user_shares", "score_conversations", "uniform_share"]
