"""Score a whole data set shard by shard, in one process or several; a killed run loses no finished shard."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any

from ctxlens.chat.data import (
    Conversation,
    ConversationSet,
    ConversationStream,
    Fingerprint,
    as_conversations,
    fingerprint_conversations,
)
from ctxlens.chat.data.given_rows import Source
from ctxlens.errors import InputError
from ctxlens.parsing import check_part
from ctxlens.processes import ALONE, Processes
from ctxlens.results import Scores
from ctxlens.results.scores import Precision
from ctxlens.runs import Progress, Run
from ctxlens.scoring.selection import choose_layer
from ctxlens.scoring.shard import Scorer, Settings, Shard, Turn, score_shard
from ctxlens.scoring.store import RESULT, ShardStore, finished_scores, merge_in_memory, merge_shards

SHARD_CONVERSATIONS = 512
"""Conversations per shard. At most one shard per process is scored again after a kill, and batches are
sorted by length within a shard."""


def score_conversations(
    model: Scorer,
    conversations: Iterable[Conversation] | Source,
    *,
    layers: Sequence[int] | str | None = None,
    out: Run | None = None,
    progress: Progress | None = None,
    max_tokens: int | None = None,
    batch_tokens: int | None = None,
    precision: Precision | str = "float32",
    kinds: Mapping[Turn, str] | None = None,
) -> Scores:
    """Score every assistant turn of a data set at several layers.

    The score is the share of role `user`; indicator tokens do not count as user tokens. A conversation longer
    than the window is truncated and flagged. A conversation that cannot be rendered or has no assistant turn
    is skipped. Both are counted in the result's `meta`. The entry `skipped` there, and `skipped.json` in the
    run folder, list the skipped conversations with the reasons.

    Args:
        model: the seed model, fine-tuned without the indicator.
        conversations: the data set or a stream of it; ids must be unique. Anything else that
            `load_conversations` takes is loaded: a path, a `datasets.Dataset`, a data frame, a list of rows.
        layers: layers to score, or `"all"`. By default, all layers up to the paper's relative depth, 15 of
            22. The forward pass stops after the highest one.
        out: a run folder. Finished shards are kept there, so that the same call resumes after a kill, and
            the result is written to `scores.parquet`.
        progress: called with the number of finished conversations and the total (0 if it is not known).
        max_tokens: truncate to fewer tokens than the model's window.
        batch_tokens: padded tokens per forward pass; by default 1,024 on a CPU and 8,192 elsewhere.
        precision: the number format of the scores in the file.
        kinds: known kinds of turns, stored with the scores in the column `kind`.

    Raises:
        InputError: there are no conversations, or none can be scored; ids are not unique; layers are out of
            range; attention is not a number (the message names the model and the turn); the disk is full.
        RunExistsError: the run holds scores of other data, another model or other settings.
    """
    settings = Settings.of(
        model,
        layers=layers,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        precision=precision,
        kinds=kinds,
    )
    if out is not None:
        score_to_run(model, conversations, settings, out, progress=progress)
        return Scores.load(out.path(RESULT))
    shards: list[Shard] = []
    data_pass = _DataPass(model, conversations, settings, progress)
    for _, part in data_pass.own_shards():
        shards.append(data_pass.score(part))
    data_pass.check_not_empty()
    turns, meta = merge_in_memory(shards, _head(model, settings), data_pass.describe())
    return Scores.from_turns(turns, settings.layers, meta)


def score_to_run(
    model: Scorer,
    conversations: Iterable[Conversation] | Source,
    settings: Settings,
    out: Run,
    *,
    progress: Progress | None = None,
    processes: Processes = ALONE,
    part: tuple[int, int] = (0, 1),
    notice: Callable[[str], None] = warnings.warn,
) -> Mapping[str, Any] | None:
    """Score a data set into a run folder, holding one shard of it at a time.

    Every process reads the whole data set and scores its own shards: shard k belongs to process k modulo the
    number of processes. After a kill, the same call resumes with the shards that are not finished.

    Args:
        model: the seed model.
        conversations: the data set or a stream of it, the same for every process; ids must be unique.
        settings: how it is scored.
        out: the run folder, shared by all processes.
        progress: called with the number of conversations that this process has finished and its total (0 if
            the total is not known).
        processes: the processes that wait for one another; the first one merges the shards.
        part: number of this job, from 0, and the number of jobs, for jobs that do not wait for one another.
            The last step is then `merge_shards`.
        notice: called with a message for each damaged shard that is scored again.

    Returns:
        The `meta` of the scores, which are in `scores.parquet`; None if this job scores only a part.

    Raises:
        InputError, RunExistsError: as in `score_conversations`.
    """
    check_part(part)
    number, jobs = part
    share = (number * processes.count + processes.rank, jobs * processes.count)
    head = _head(model, settings)
    data_pass = _DataPass(model, conversations, settings, progress, share)
    found = finished_scores(out, head["plan"], data_pass.read_fingerprint)
    if found is None:
        store = ShardStore(out, head, notice)
        for index, members in data_pass.own_shards():
            if store.has(index, fingerprint_conversations(members)):
                data_pass.count_done(members)
            else:
                store.save(index, data_pass.score(members))
        data_pass.check_not_empty()
        store.close(data_pass.n_shards, data_pass.describe())
    processes.wait()
    if jobs > 1:
        return found
    if found is None and processes.is_first:
        found = merge_shards(out)
    processes.wait()
    return merge_shards(out) if found is None else found


class _DataPass:
    """One process's pass over a data set: which shards belong to it, and what it has read of the whole."""

    def __init__(
        self,
        model: Scorer,
        conversations: Iterable[Conversation] | Source,
        settings: Settings,
        progress: Progress | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.model, self.conversations, self.settings = model, as_conversations(conversations), settings
        self.progress, self.share = progress, share
        self.shard_size = SHARD_CONVERSATIONS
        self._begin()

    def _begin(self) -> None:
        self.n_shards = self.n_conversations = self.n_done = 0
        self.fingerprint = Fingerprint()

    def own_shards(self) -> Iterator[tuple[int, list[Conversation]]]:
        """Number and conversations of every shard that belongs to this process; counts all shards."""
        self._begin()
        rows = iter(_check_unique(self.conversations))
        while part := list(islice(rows, self.shard_size)):
            index = self.n_shards
            self.n_shards += 1
            self.n_conversations += len(part)
            for conversation in part:
                self.fingerprint.add(conversation)
            if index % self.share[1] == self.share[0]:
                yield index, part

    def score(self, part: Sequence[Conversation]) -> Shard:
        """Score a shard and count it as done."""
        shard = score_shard(self.model, part, self.settings, lambda done: self._tell(self.n_done + done))
        self.count_done(part)
        return shard

    def count_done(self, part: Sequence[Conversation]) -> None:
        """Count a shard as done."""
        self.n_done += len(part)
        self._tell(self.n_done)

    def read_fingerprint(self) -> str:
        """Read the data set without scoring it, and return the fingerprint of all conversations."""
        for _ in self.own_shards():
            pass
        return str(self.fingerprint)

    def _tell(self, done: int) -> None:
        if self.progress is not None:
            self.progress(done, self._total())

    def _total(self) -> int:
        if not isinstance(self.conversations, Sized):
            return 0
        number, jobs = self.share
        starts = range(number * self.shard_size, len(self.conversations), jobs * self.shard_size)
        return sum(min(self.shard_size, len(self.conversations) - start) for start in starts)

    def check_not_empty(self) -> None:
        """Raise `InputError` if the data set has no conversations; the message says why."""
        if self.n_conversations:
            return
        reasons = Counter(entry["reason"] for entry in self.describe()["unread"]).most_common(3)
        why = "; ".join(f"{count} rows: {reason}" for reason, count in reasons)
        raise InputError(
            "there are no conversations to score"
            + (f" ({why})." if why else "; give a data set with at least one.")
        )

    def describe(self) -> dict[str, Any]:
        """Describe what has been read of the data set."""
        data = self.conversations
        known = isinstance(data, ConversationSet | ConversationStream)
        unread = data.skipped if known else ()
        return {
            "conversations": self.n_conversations,
            "fingerprint": str(self.fingerprint),
            "reading": {
                "layout": data.layout if known else None,
                "rows_left_out": len(unread),
                "turns_dropped": dict(sorted(data.dropped.items())) if known else {},
                **({"noted": dict(sorted(data.noted.items()))} if known and data.noted else {}),
            },
            "unread": [{"conversation": name, "reason": reason} for name, reason in unread],
        }


def _check_unique(conversations: Iterable[Conversation]) -> Iterable[Conversation]:
    """The conversations unchanged; a repeated id raises `InputError`, in a list before anything is scored."""
    if isinstance(conversations, ConversationSet | ConversationStream):
        return conversations  # reading has made their ids unique
    checked = _refuse_repeated(conversations)
    return list(checked) if isinstance(conversations, Sequence) else checked


def _refuse_repeated(conversations: Iterable[Conversation]) -> Iterator[Conversation]:
    seen: set[str] = set()
    for conversation in conversations:
        if conversation.id in seen:
            raise InputError(f"conversation ids must be unique, but {conversation.id!r} occurs twice.")
        seen.add(conversation.id)
        yield conversation


def _head(model: Scorer, settings: Settings) -> dict[str, Any]:
    """What all shards have in common, with the plan: a digest of what scores depend on besides the data."""
    head = {
        "model": dict(model.identity),
        "layers": list(settings.layers),
        "n_layers": model.n_layers,
        "probe_layer": choose_layer(model.n_layers, rule="middle"),
        "max_tokens": settings.max_tokens,
        "precision": settings.precision,
    }
    # Not `ctxlens.runs.digest`: shards and scores on disk carry this value, all 64 digits of it and with the
    # kinds, and a run that was started by an earlier version resumes only if the value stays the same.
    depends = [head, SHARD_CONVERSATIONS]
    plan = hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode())
    plan.update(repr(sorted((settings.kinds or {}).items())).encode())
    return {**head, "batch_tokens": settings.batch_tokens, "plan": plan.hexdigest()}


__all__ = ["SHARD_CONVERSATIONS", "check_part", "score_conversations", "score_to_run"]
