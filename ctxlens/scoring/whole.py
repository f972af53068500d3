"""A whole data set scored shard by shard, by one process or several, so that no work is ever lost."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any

from ctxlens.chat.data import Conversation, ConversationSet, ConversationStream, Fingerprint
from ctxlens.errors import InputError
from ctxlens.processes import ALONE, Processes
from ctxlens.results import Scores
from ctxlens.results.scores import Precision
from ctxlens.runs import Run
from ctxlens.scoring.selection import choose_layer
from ctxlens.scoring.shard import Scorer, Settings, Shard, Turn, score_shard
from ctxlens.scoring.store import RESULT, ShardStore, finished_scores, merge_in_memory, merge_shards

SHARD_CONVERSATIONS = 512
"""Conversations a shard: what is done again after a kill, and the window that batches are sorted in."""

Progress = Callable[[int, int], None]
"""Called with the conversations done and in all (0: not known beforehand), of this process."""


def score_conversations(
    model: Scorer,
    conversations: Iterable[Conversation],
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

    The score is the share of role `user`; an indicator's tokens do not count as the user's. A conversation
    longer than the window is truncated and flagged; one that cannot be rendered, or has no assistant turn,
    is left out. Both are counted in the result's `meta`; what was left out, and why, is in `skipped`
    there and in the run's `skipped.json`.

    Args:
        model: the seed model, fine-tuned without indicator.
        conversations: the data set, also as a stream; ids must be unique.
        layers: layers to score, or `"all"`; by default all up to the paper's relative depth, 15 of 22. The
            forward pass stops after the highest.
        out: a run folder. Finished shards are kept there, so that the same call goes on after a kill, and
            the result is written as `scores.parquet`.
        progress: called with conversations done and in all (0: not known).
        max_tokens: truncate to fewer tokens than the model's window.
        batch_tokens: padded tokens a forward pass; by default 1,024 on a CPU and 8,192 elsewhere.
        precision: the number format of the scores in the file.
        kinds: known kinds of turns, kept beside the scores in the column `kind`.

    Raises:
        InputError: no conversations, or none that can be scored; ids that are not unique; layers out of
            range; attention that is not a number (model and turn are named); a full disk.
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
    work = _Work(model, conversations, settings, progress)
    for _, part in work.parts():
        shards.append(work.score(part))
    work.check_not_empty()
    turns, meta = merge_in_memory(shards, _head(model, settings), work.describe())
    return Scores.from_turns(turns, settings.layers, meta)


def score_to_run(
    model: Scorer,
    conversations: Iterable[Conversation],
    settings: Settings,
    out: Run,
    *,
    progress: Progress | None = None,
    processes: Processes = ALONE,
    part: tuple[int, int] = (0, 1),
    notice: Callable[[str], None] = warnings.warn,
) -> Mapping[str, Any] | None:
    """Score a data set into a run folder, holding one shard of it at a time.

    Every process reads the whole data set and scores its shards: number k goes to process k modulo their
    number. The same call after a kill goes on with the shards that are not finished.

    Args:
        model: the seed model.
        conversations: the data set or a stream of it, the same for every process; ids must be unique.
        settings: how it is scored.
        out: the run folder, shared by all processes.
        progress: called with conversations done and in all, of this process.
        processes: those that wait for one another; the first merges.
        part: number of this job, from 0, and how many jobs there are, for jobs that do not wait for one
            another; the last step is then `merge_shards`.
        notice: told which damaged shard is scored again.

    Returns:
        The `meta` of the scores, which lie in `scores.parquet`; None for a part.

    Raises:
        InputError, RunExistsError: as `score_conversations`.
    """
    check_part(part)
    number, jobs = part
    share = (number * processes.count + processes.rank, jobs * processes.count)
    head = _head(model, settings)
    work = _Work(model, conversations, settings, progress, share)
    found = finished_scores(out, head["plan"], work.read_through)
    if found is None:
        store = ShardStore(out, head, notice)
        for index, conversations_in in work.parts():
            fingerprint = _fingerprint(conversations_in)
            if store.has(index, fingerprint):
                work.pass_over(conversations_in)
            else:
                store.save(index, work.score(conversations_in))
        work.check_not_empty()
        store.close(work.shards, work.describe())
    processes.wait()
    if jobs > 1:
        return found
    if found is None and processes.is_first:
        found = merge_shards(out)
    processes.wait()
    return merge_shards(out) if found is None else found


def check_part(part: tuple[int, int]) -> None:
    """Refuse a job's number that does not fit the number of jobs, with `InputError`."""
    number, jobs = part
    if jobs < 1:
        raise InputError(f"the number of parts must be at least 1, got {jobs}.")
    if not 0 <= number < jobs:
        raise InputError(f"the part must be from 0/{jobs} to {jobs - 1}/{jobs}, got {number}/{jobs}.")


class _Work:
    """One process's way through a data set: which shards are its own, and what it has seen of all."""

    def __init__(
        self,
        model: Scorer,
        conversations: Iterable[Conversation],
        settings: Settings,
        progress: Progress | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.model, self.conversations, self.settings = model, conversations, settings
        self.progress, self.share = progress, share
        self.size = SHARD_CONVERSATIONS
        self._begin()

    def _begin(self) -> None:
        self.shards = self.count = self.done = 0
        self.fingerprint = Fingerprint()

    def parts(self) -> Iterator[tuple[int, list[Conversation]]]:
        """Number and conversations of every shard that is this process's, while all are counted."""
        self._begin()
        rows = iter(_check_unique(self.conversations))
        while part := list(islice(rows, self.size)):
            index = self.shards
            self.shards += 1
            self.count += len(part)
            for conversation in part:
                self.fingerprint.add(conversation)
            if index % self.share[1] == self.share[0]:
                yield index, part

    def score(self, part: Sequence[Conversation]) -> Shard:
        """The scores of a shard."""
        shard = score_shard(self.model, part, self.settings, lambda done: self._tell(self.done + done))
        self.pass_over(part)
        return shard

    def pass_over(self, part: Sequence[Conversation]) -> None:
        """Count a shard as done."""
        self.done += len(part)
        self._tell(self.done)

    def read_through(self) -> str:
        """The fingerprint of all conversations, without scoring any."""
        for _ in self.parts():
            pass
        return str(self.fingerprint)

    def _tell(self, done: int) -> None:
        if self.progress is not None:
            self.progress(done, self._total())

    def _total(self) -> int:
        if not isinstance(self.conversations, Sized):
            return 0
        number, jobs = self.share
        starts = range(number * self.size, len(self.conversations), jobs * self.size)
        return sum(min(self.size, len(self.conversations) - start) for start in starts)

    def check_not_empty(self) -> None:
        """Refuse a data set without conversations, and say why it has none."""
        if self.count:
            return
        reasons = Counter(entry["reason"] for entry in self.describe()["unread"]).most_common(3)
        why = "; ".join(f"{count} rows: {reason}" for reason, count in reasons)
        raise InputError(
            "there are no conversations to score"
            + (f" ({why})." if why else "; give a data set with at least one.")
        )

    def describe(self) -> dict[str, Any]:
        """What has been seen of the data set."""
        data = self.conversations
        known = isinstance(data, ConversationSet | ConversationStream)
        unread = data.skipped if known else ()
        return {
            "conversations": self.count,
            "fingerprint": str(self.fingerprint),
            "reading": {
                "layout": data.layout if known else None,
                "rows_left_out": len(unread),
                "turns_dropped": dict(sorted(data.dropped.items())) if known else {},
            },
            "unread": [{"conversation": name, "reason": reason} for name, reason in unread],
        }


def _check_unique(conversations: Iterable[Conversation]) -> Iterable[Conversation]:
    """The conversations as they are; `InputError` at a repeated id, at once where all are at hand."""
    if isinstance(conversations, ConversationSet | ConversationStream):
        return conversations  # their ids are made unique
    checked = _refuse_repeated(conversations)
    return list(checked) if isinstance(conversations, Sequence) else checked


def _refuse_repeated(conversations: Iterable[Conversation]) -> Iterator[Conversation]:
    seen: set[str] = set()
    for conversation in conversations:
        if conversation.id in seen:
            raise InputError(f"conversation ids must be unique, but {conversation.id!r} occurs twice.")
        seen.add(conversation.id)
        yield conversation


def _fingerprint(part: Sequence[Conversation]) -> str:
    fingerprint = Fingerprint()
    for conversation in part:
        fingerprint.add(conversation)
    return str(fingerprint)


def _head(model: Scorer, settings: Settings) -> dict[str, Any]:
    """What all shards have in common, with a digest of what scores depend on but the conversations."""
    head = {
        "model": dict(model.identity),
        "layers": list(settings.layers),
        "n_layers": model.n_layers,
        "probe_layer": choose_layer(model.n_layers, rule="middle"),
        "max_tokens": settings.max_tokens,
        "precision": settings.precision,
    }
    depends = [head, SHARD_CONVERSATIONS]
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode())
    digest.update(repr(sorted((settings.kinds or {}).items())).encode())
    return {**head, "batch_tokens": settings.batch_tokens, "plan": digest.hexdigest()}


__all__ = ["SHARD_CONVERSATIONS", "Progress", "check_part", "score_conversations", "score_to_run"]
