"""The threads and permits of one kind of RPC."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from kvindex_server.lanes import Lane


class Call:
    """As much of gRPC's event as a lane sees: the call, and that it is one."""

    call_details = object()

    def __init__(self) -> None:
        self.call = self
        self.cancelled: list[tuple[int, str]] = []

    def cancel(self, code: int, message: str) -> None:
        self.cancelled.append((code, message))


@pytest.fixture
def lane() -> Iterator[Lane]:
    made = Lane("test", threads=4, workers=1, permits=2, message_seconds=0.05)
    yield made
    made.close()


def test_a_permit_is_held_until_the_call_is_over(lane: Lane) -> None:
    """Also by a call that waits, and by one that fails."""
    release = threading.Event()
    first = lane.submit(release.wait)
    assert (lane.in_flight, lane.full) == (1, False)
    second = lane.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        second.result(5)
    eventually(lane, 1)
    lane.submit(release.wait)
    assert lane.full
    release.set()
    first.result(5)
    eventually(lane, 0)


def test_as_many_work_at_once_as_there_are_workers(lane: Lane) -> None:
    """Threads beyond that wait for their turn."""
    at_once, most = 0, 0

    def work() -> None:
        nonlocal at_once, most
        with lane.turn():
            at_once += 1
            most = max(most, at_once)
            time.sleep(0.01)
            at_once -= 1

    for each in [lane.submit(work) for _ in range(6)]:
        each.result(5)
    assert most == 1


def test_a_call_without_a_message_is_ended_and_one_with_it_is_not(lane: Lane) -> None:
    silent, heard = Call(), Call()
    given_up: list[int] = []
    lane._gave_up = lambda: given_up.append(1)
    release = threading.Event()

    def with_message(_: Call) -> None:
        lane.heard()
        release.wait(10)

    lane.submit(lambda _: release.wait(10), silent)
    lane.submit(with_message, heard)
    ends = time.monotonic() + 5
    while not given_up:
        assert time.monotonic() < ends
        time.sleep(0.02)
    release.set()
    assert silent.cancelled == [(4, "the request's message did not come in time")]
    assert given_up == [1]
    assert heard.cancelled == []


def test_a_call_that_waits_for_its_next_message_is_given_as_long_again(lane: Lane) -> None:
    waiting, release = Call(), threading.Event()

    def stream(_: Call) -> None:
        lane.heard()
        lane.waits()
        release.wait(10)

    lane.submit(stream, waiting)
    ends = time.monotonic() + 5
    while not waiting.cancelled:
        assert time.monotonic() < ends
        time.sleep(0.02)
    release.set()
    eventually(lane, 0)
    assert not lane._silent  # nothing is kept of a call that is over


def test_calls_after_the_end_are_refused_and_give_their_permit_back(lane: Lane) -> None:
    lane.close()
    with pytest.raises((RuntimeError, CancelledError)):
        lane.submit(lambda: None)
    assert lane.in_flight == 0


def eventually(lane: Lane, count: int) -> None:
    """Callbacks of a future run just after its result is there."""
    ends = time.monotonic() + 5
    while lane.in_flight != count:
        assert time.monotonic() < ends
        time.sleep(0.005)
