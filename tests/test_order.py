"""The native order of a stream against a plain model, and messages drained natively against Python's reading."""

import random
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import pytest
from subscribing import leave_to_library
from test_fleet import eventually

from kvindex_server import wire
from kvindex_server._core import Drained, Index, Order, Outcome, Stream, xxh3_64
from kvindex_server.subscription import Subscription, subscribe


class Model:
    """Everything that was applied, in a dictionary that forgets as the order's ring does."""

    def __init__(self) -> None:
        self.last: int | None = None
        self.digests: dict[int, int] = {}

    def remembers(self, sequence: int) -> bool:
        later = [each for each in self.digests if each % Order.REMEMBERED == sequence % Order.REMEMBERED]
        return bool(later) and later[-1] == sequence

    def judge(self, sequence: int, digest: int) -> Outcome:
        if self.last is None:
            return Outcome.FIRST
        if sequence > self.last:
            return Outcome.NEXT if sequence == self.last + 1 else Outcome.GAP
        same = self.remembers(sequence) and self.digests[sequence] == digest
        return Outcome.DUPLICATE if same else Outcome.RESTART

    def applied(self, sequence: int, digest: int) -> None:
        self.last = sequence
        self.digests.pop(sequence, None)
        self.digests[sequence] = digest


def test_order_judges_as_the_model() -> None:
    """Numbers near the last one, near the edge of what is remembered, far away, and at the ends of the range."""
    for seed in range(30):
        rng = random.Random(seed)
        order, model = Order(), Model()
        for _ in range(400):
            last = model.last or 0
            near = [last + 1, last + 1, last, last + 2, last - 1, last - Order.REMEMBERED, last + Order.REMEMBERED]
            sequence = max(0, min(2**64 - 1, rng.choice([*near, rng.randrange(2**64), 0])))
            digest = rng.choice([1, 2, 2**64 - 1])
            assert order.judge(sequence, digest) is model.judge(sequence, digest), seed
            assert order.remembers(sequence) == model.remembers(sequence)
            if rng.random() < 0.6 and sequence < 2**64 - 1:
                order.applied(sequence, digest)
                model.applied(sequence, digest)
            elif rng.random() < 0.02:
                order.restarted()
                model = Model()
            assert order.last == model.last


def payload(number: int, at: float = 1.0) -> bytes:
    return bytes(msgpack.packb([at, [["BlockStored", [number], None, [number] * 4, 4, None, "GPU"]], 0]))


def frames(sequence: int, body: bytes) -> list[bytes]:
    return [b"topic", sequence.to_bytes(8, "big"), body]


ODD = [
    [b"alone"],
    [b"a", b"b"],
    [b"a", b"short", payload(9)],
    [b"a", bytes(8), payload(9), b"more"],
    [b"a", bytes(8), payload(9), *[b"more"] * 50],
    [b"", b"", b""],
    frames(7, payload(9)),
    frames(0, payload(9)),
    frames(2**64 - 1, b""),
]


class Listener:
    """A subscription of which only the messages matter."""

    def __init__(self, events: Subscription) -> None:
        self._events = events
        self._waiter = wire.Waiter()
        self._waiter.add(events)

    def drain(self, stream: Stream, order: Order, limit: int, *waits: Any) -> Drained | None:
        """As `wire.drain`."""
        assert self._events.source is not None, "pyzmq's library must be found here"
        return wire.drain(self._events.source, stream, order, limit, *waits)

    def receive(self) -> list[bytes] | None:
        self._events.changes()
        return self._events.receive()

    def wait(self, timeout_ms: int) -> bool:
        return bool(self._waiter.wait(timeout_ms))


@contextmanager
def listening(endpoint: str) -> Iterator[Listener]:
    events = subscribe(endpoint, "", bind=False)
    try:
        yield Listener(events)
    finally:
        events.close()


@pytest.fixture(params=["core", "library"])
def subscriber(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose subscription it is."""
    if request.param == "library":
        leave_to_library(monkeypatch)


@pytest.mark.usefixtures("subscriber")
@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_drain_stops_at_a_message_that_is_not_the_next(odd: list[bytes]) -> None:
    """What is in order is applied; the first other message is handed over whole, and nothing behind it is taken."""
    with (
        wire.publisher("tcp://127.0.0.1:*") as publisher,
        listening(publisher.endpoint) as events,
    ):
        index, order = Index(), Order()
        stream = index.add_stream("pod", 0)
        warm = frames(0, payload(1))

        def arrived() -> bool:
            publisher.send(warm)
            return events.receive() is not None

        eventually(arrived)
        while events.wait(50):
            events.receive()
        order.applied(0, 0)
        for each in (frames(1, payload(2)), frames(2, payload(3)), odd, frames(3, payload(4))):
            publisher.send(each)
        eventually(lambda: events.wait(100))
        applied, handed = 0, []
        for _ in range(100):
            events.wait(20)
            drained = events.drain(stream, order, 100)
            assert drained is not None, "pyzmq's library must be found here"
            applied += drained.messages
            if drained.odd:
                handed.append(drained.odd)
                assert (order.last, applied) == (2, 2), "nothing behind it was taken"
            if applied == 3:
                break
        assert handed == [odd] and order.last == 3
        hashes = struct.pack("<4Q", 1, 2, 3, 4)
        assert [bool(holders) for _, holders in index.holders_of_ints(hashes, [])] == [False, True, True, True]


@contextmanager
def connected() -> Iterator[tuple[wire.Socket, Listener]]:
    """(publisher, its subscriber), with nothing under way."""
    with wire.publisher("tcp://127.0.0.1:*") as publisher, listening(publisher.endpoint) as events:

        def arrived() -> bool:
            publisher.send(frames(0, b""))
            return events.receive() is not None

        eventually(arrived)
        while events.wait(50):
            events.receive()
        yield publisher, events


@pytest.mark.usefixtures("subscriber")
def test_drain_takes_no_more_than_its_limit() -> None:
    """One stream must not keep its thread from replays and deadlines."""
    with connected() as (publisher, events):
        index, order = Index(), Order()
        stream = index.add_stream("pod", 0)
        order.applied(0, 0)
        for sequence in range(1, 11):
            publisher.send(frames(sequence, payload(sequence)))
        eventually(lambda: events.wait(100))
        taken: list[int] = []
        for _ in range(100):
            events.wait(20)
            drained = events.drain(stream, order, 4)
            assert drained is not None and drained.messages <= 4
            if drained.messages:
                assert drained.first == sum(taken) + 1
                taken.append(drained.messages)
            if sum(taken) == 10:
                break
        assert index.claims == 10 and events.drain(stream, order, 4).empty  # type: ignore[union-attr]


@pytest.mark.usefixtures("subscriber")
def test_drain_waits_until_another_socket_has_a_message() -> None:
    """What comes is seen by readers at once, and the thread comes back only when it is needed elsewhere."""
    with connected() as (publisher, events):
        index, order = Index(), Order()
        stream = index.add_stream("pod", 0)
        order.applied(0, 0)
        waker = wire.Waker()
        answers: list[Drained | None] = []
        thread = threading.Thread(
            target=lambda: answers.append(events.drain(stream, order, 100, (waker,), 20_000, 20_000)), daemon=True
        )
        thread.start()
        for sequence in range(1, 4):
            publisher.send(frames(sequence, payload(sequence, time.time())))
            eventually(lambda number=sequence: (order.last, index.claims) == (number, number))  # type: ignore[misc]
        assert thread.is_alive()
        waker.wake()
        thread.join(10)
        assert not thread.is_alive()
        waker.close()
        drained = answers[0]
        assert drained is not None
        assert (drained.messages, drained.first, drained.others, drained.odd) == (3, 1, True, [])
        assert 1 <= len(drained.lags) <= 3 and all(0 <= each < 60 for each in drained.lags)


@pytest.mark.usefixtures("subscriber")
@pytest.mark.parametrize("event", [["BlockRemoved", 99, "GPU"], ["AllBlocksCleared"], ["Surprise"]])
def test_drain_comes_back_at_once_when_trust_may_change(event: list[object]) -> None:
    """Nobody may be told for longer than that all is well, nor see the message's number before that is settled."""
    with connected() as (publisher, events):
        order = Order()
        stream = Index().add_stream("pod", 0)
        order.applied(0, 0)
        message = bytes(msgpack.packb([time.time(), [event], 0]))
        publisher.send(frames(1, message))
        publisher.send(frames(2, payload(1)))
        begin = time.monotonic()
        drained = events.drain(stream, order, 100, (), 20_000, 20_000)
        assert time.monotonic() - begin < 15
        assert drained is not None and drained.messages == 1 and drained.withheld == (1, xxh3_64(message))
        assert order.last == 0
        order.applied(*drained.withheld)
        drained = events.drain(stream, order, 100, (), 20_000, 20)
        assert drained is not None and (drained.messages, drained.withheld, order.last) == (1, None, 2)


@pytest.mark.usefixtures("subscriber")
def test_drain_ends_when_nothing_comes() -> None:
    """A deadline elsewhere is kept."""
    with connected() as (publisher, events):
        order = Order()
        stream = Index().add_stream("pod", 0)
        order.applied(0, 0)
        drained = events.drain(stream, order, 100, (), 20, 20)
        assert drained is not None and drained.empty and not drained.messages and not drained.lags
        publisher.send(frames(1, payload(1)))
        drained = events.drain(stream, order, 100, (), 10_000, 20)
        assert drained is not None and drained.empty and drained.messages == 1
