"""The explorer's workers: nothing is computed twice, nobody is mixed up, everything can be stopped."""

import threading
import time

import pytest

from ctxlens.errors import InputError
from ctxlens.explore.work import Cache, Worker


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)


@pytest.fixture
def worker():
    return Worker(Cache(10_000))


class Slow:
    """A computation that goes on until it is let go, and says what happened to it."""

    def __init__(self, value="found"):
        self.value, self.began, self.go, self.runs, self.ended = (
            value,
            threading.Event(),
            threading.Event(),
            0,
            "",
        )

    def __call__(self, ticket):
        self.runs += 1
        self.began.set()
        try:
            step = 0
            while not self.go.is_set():
                ticket.progress(step, 1000)
                ticket.show(f"part {step}")
                step += 1
                time.sleep(0.002)
        except BaseException as error:
            self.ended = type(error).__name__
            raise
        return self.value


def size(value):
    return 10


def test_equal_questions_of_two_people_are_computed_once(worker):
    slow = Slow()
    worker.submit("key", slow, size, page="one", slot="answer")
    slow.began.wait(5)
    worker.submit("key", slow, size, page="two", slot="answer")
    assert worker.look("key").state == "running"
    wait_for(lambda: str(worker.look("key").partial).startswith("part "))
    slow.go.set()
    wait_for(lambda: worker.look("key").state == "done")
    assert (slow.runs, worker.cache.get("key")) == (1, "found")
    worker.submit("key", slow, size, page="three", slot="answer")
    assert slow.runs == 1


def test_a_new_question_stops_the_old_one_of_the_same_slot_only(worker):
    old, other, new = Slow("old"), Slow("other"), Slow("new")
    worker.submit("old", old, size, page="one", slot="answer")
    old.began.wait(5)
    worker.submit("other", other, size, page="one", slot="reading")
    assert worker.look("other").ahead == 1
    worker.submit("new", new, size, page="one", slot="answer")
    wait_for(lambda: old.ended == "Stopped")
    other.go.set()
    new.go.set()
    wait_for(lambda: worker.look("new").state == "done")
    assert worker.look("old").state == "unknown"
    assert worker.cache.get("other") == "other"


def test_stopping_for_one_person_leaves_it_to_the_other(worker):
    slow = Slow()
    worker.submit("key", slow, size, page="one", slot="answer")
    worker.submit("key", slow, size, page="two", slot="answer")
    slow.began.wait(5)
    worker.stop("one")
    time.sleep(0.05)
    assert worker.look("key").state == "running"
    worker.stop("two")
    wait_for(lambda: slow.ended == "Stopped")
    assert worker.look("key").state == "unknown"


def test_what_waits_is_taken_from_the_queue(worker):
    first, second = Slow(), Slow()
    worker.submit("first", first, size, page="one", slot="a")
    first.began.wait(5)
    worker.submit("second", second, size, page="one", slot="b")
    worker.stop("one", "b")
    assert worker.look("second").state == "unknown"
    first.go.set()
    wait_for(lambda: worker.look("first").state == "done")
    assert second.runs == 0


def test_it_can_be_asked_again_while_the_stopped_one_still_runs(worker):
    slow = Slow()
    worker.submit("key", slow, size, page="one", slot="a")
    slow.began.wait(5)
    worker.stop("one")
    worker.submit("key", slow, size, page="one", slot="a")
    slow.go.set()
    wait_for(lambda: worker.look("key").state == "done")


def test_failures_are_one_sentence_and_the_thread_lives_on(worker, caplog):
    def refuse(ticket):
        raise InputError("the conversation is too long.")

    def break_down(ticket):
        raise ZeroDivisionError("division by zero")

    worker.submit("refused", refuse, size, page="one", slot="a")
    wait_for(lambda: worker.look("refused").state == "failed")
    assert worker.look("refused").error == "the conversation is too long."
    worker.submit("broken", break_down, size, page="one", slot="b")
    wait_for(lambda: worker.look("broken").state == "failed")
    assert worker.look("broken").error == "this could not be computed (ZeroDivisionError: division by zero)."
    worker.submit("large", lambda ticket: 1, lambda value: 10**6, page="one", slot="c")
    wait_for(lambda: worker.look("large").state == "failed")
    assert "the cache holds" in worker.look("large").error
    worker.submit("fine", lambda ticket: 1, size, page="one", slot="d")
    wait_for(lambda: worker.look("fine").state == "done")


def test_the_queue_is_bounded(worker):
    slow = Slow()
    worker.submit("first", slow, size, page="one", slot="a")
    slow.began.wait(5)
    for i in range(64):
        worker.submit(str(i), lambda ticket: 1, size, page=f"page {i}", slot="a")
    with pytest.raises(InputError, match="too many computations are waiting"):
        worker.submit("last", lambda ticket: 1, size, page="last", slot="a")
    slow.go.set()
