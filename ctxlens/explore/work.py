"""One worker thread per model, with a queue, and a cache with a bound in bytes.

A page never waits for a model: it asks for a result by its key, and looks again until the result is there.
Equal questions of several people are computed once. A page asks in *slots* (its reading, its answer, ...); a
new question in a slot replaces the old one, which is stopped if nobody else waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ctxlens.errors import CtxlensError, InputError, first_line

_MOST_WAITING = 64
_REMEMBERED = 64
_REST, _MOST_REST = 0.1, 0.3
"""After a computation, a worker leaves the processor to the pages, which show its result: for this part
of the time that it took, and for at most so many seconds."""
_LOG = logging.getLogger(__name__)


class Stopped(Exception):
    """Raised inside a computation that nobody waits for any more."""


class Cache:
    """Results by key; the least recently used ones are dropped when the bound in bytes is reached."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.nbytes = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def get(self, key: str) -> Any:
        """A result, or None."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: str, value: Any, nbytes: int) -> None:
        """Keep a result.

        Raises:
            InputError: it is larger than the whole cache.
        """
        if nbytes > self.most_bytes:
            raise InputError(
                f"this result takes {_mebibytes(nbytes)}, but the cache holds {_mebibytes(self.most_bytes)}; "
                "shorten the conversation, or start the explorer with a larger --cache."
            )
        with self._lock:
            if key in self._kept:
                self.nbytes -= self._kept.pop(key)[1]
            self._kept[key] = (value, nbytes)
            self.nbytes += nbytes
            while self.nbytes > self.most_bytes:
                _, (_, freed) = self._kept.popitem(last=False)
                self.nbytes -= freed


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB" if nbytes >= 2**20 else f"{nbytes:,} bytes"


@dataclass(frozen=True)
class Status:
    """How far a computation is.

    Attributes:
        state: `unknown` means that it was never asked for, or was stopped or dropped.
        done, total: the finished amount, where the computation tells it.
        partial: what there is to show already, such as the beginning of an answer.
        error: one sentence, where it failed.
        ahead: how many computations come before it.
    """

    state: Literal["unknown", "waiting", "running", "done", "failed"]
    done: int = 0
    total: int = 0
    partial: Any = None
    error: str | None = None
    ahead: int = 0


@dataclass(eq=False)
class Ticket:
    """What a computation gets: a way to tell how far it is, which also ends it when nobody waits for it."""

    key: str
    run: Callable[[Ticket], Any]
    size: Callable[[Any], int]
    waiting: set[tuple[str, str]] = field(default_factory=set)
    done: int = 0
    total: int = 0
    partial: Any = None
    is_stopped: bool = False

    def progress(self, done: int, total: int) -> None:
        """Tell how far the computation is.

        Raises:
            Stopped: nobody waits for it any more.
        """
        self.done, self.total = done, total
        self.check()

    def show(self, partial: Any) -> None:
        """Show a part of the result; raises `Stopped` as `progress` does."""
        self.partial = partial
        self.check()

    def check(self) -> None:
        """Raise `Stopped` if nobody waits for this computation any more."""
        if self.is_stopped:
            raise Stopped


class Worker:
    """Computes what is asked for, one after the other, in a thread of its own."""

    def __init__(self, cache: Cache, name: str = "model") -> None:
        self.cache = cache
        self._name = name
        self._changed = threading.Condition()
        self._queue: OrderedDict[str, Ticket] = OrderedDict()
        self._running: Ticket | None = None
        self._failed: OrderedDict[str, str] = OrderedDict()
        self._thread: threading.Thread | None = None

    # long: the three places where a question may be known already
    def submit(
        self, key: str, run: Callable[[Ticket], Any], size: Callable[[Any], int], *, page: str, slot: str
    ) -> None:
        """Ask for a result.

        Args:
            key: what distinguishes this result from all others.
            run: computes it; gets a ticket.
            size: the bytes that a result takes in the cache.
            page: the page that asks.
            slot: for what; an earlier question of this page for the same purpose is given up.

        Raises:
            InputError: too many people are waiting.
        """
        with self._changed:
            self._give_up(page, slot, but=key)
            if self.cache.get(key) is not None:
                return
            self._failed.pop(key, None)
            running = self._running
            if running is not None and running.key == key and not running.is_stopped:
                running.waiting.add((page, slot))
                return
            if key not in self._queue:
                if len(self._queue) >= _MOST_WAITING:
                    raise InputError("too many computations are waiting; try again in a moment.")
                self._queue[key] = Ticket(key, run, size)
            self._queue[key].waiting.add((page, slot))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"explore-{self._name}", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def look(self, key: str) -> Status:
        """How far the computation of a result is."""
        with self._changed:
            if self.cache.get(key) is not None:
                return Status("done")
            running = self._running
            if running is not None and running.key == key and not running.is_stopped:
                return Status("running", running.done, running.total, running.partial)
            if key in self._queue:
                ahead = list(self._queue).index(key) + (running is not None)
                return Status("waiting", ahead=ahead)
            if key in self._failed:
                return Status("failed", error=self._failed[key])
            return Status("unknown")

    def stop(self, page: str, slot: str | None = None) -> None:
        """Give up what a page waits for, in one slot or in all of them."""
        with self._changed:
            self._give_up(page, slot)

    def _give_up(self, page: str, slot: str | None, but: str | None = None) -> None:
        everything = [*self._queue.values(), *([self._running] if self._running else [])]
        for ticket in everything:
            if ticket.key == but:
                continue
            gone = {(p, s) for p, s in ticket.waiting if p == page and slot in (None, s)}
            ticket.waiting -= gone
            if gone and not ticket.waiting:
                ticket.is_stopped = True
                self._queue.pop(ticket.key, None)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                while not self._queue:
                    self._changed.wait()
                _, self._running = self._queue.popitem(last=False)
                ticket = self._running
            start = time.monotonic()
            problem = self._compute(ticket)
            with self._changed:
                self._running = None
                is_awaited = bool(self._queue)
                if problem is not None:
                    self._failed[ticket.key] = problem
                    while len(self._failed) > _REMEMBERED:
                        self._failed.popitem(last=False)
            if is_awaited:
                time.sleep(min(_MOST_REST, _REST * (time.monotonic() - start)))

    def _compute(self, ticket: Ticket) -> str | None:
        """Compute one result; the sentence to show if that fails."""
        try:
            result = ticket.run(ticket)
            self.cache.put(ticket.key, result, ticket.size(result))
        except Stopped:
            return None
        except CtxlensError as error:
            return str(error)
        except Exception as error:
            _LOG.exception("a computation of the explorer failed")
            return f"this could not be computed ({type(error).__name__}: {first_line(error)})."
        return None


__all__ = ["Cache", "Status", "Stopped", "Ticket", "Worker"]
