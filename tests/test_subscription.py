"""The core's own subscription against a publisher made of a bare TCP socket, which can do what none would."""

import contextlib
import os
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgpack
import pytest
from publisher import free_port
from test_fleet import eventually

from kvindex_server import wire
from kvindex_server._core import Index, Order
from kvindex_server.subscription import Subscription, subscribe
from kvindex_server.wire import Connection

MADE, LOST, ENDED = Connection.MADE, Connection.LOST, Connection.ENDED
READY = b"\x04\x1a\x05READY\x0bSocket-Type\x00\x00\x00\x04XPUB"


def greeting(minor: int = 1) -> bytes:
    return (b"\xff" + bytes(7) + b"\x01\x7f" + bytes([3, minor]) + b"NULL").ljust(64, b"\0")


def frames(sequence: int, payload: bytes, topic: bytes = b"kv@") -> list[bytes]:
    return [topic, sequence.to_bytes(8, "big"), payload]


def message(parts: list[bytes]) -> bytes:
    out = b""
    for number, part in enumerate(parts):
        more = number + 1 < len(parts)
        out += struct.pack(">BQ", 2 | more, len(part)) if len(part) > 255 else bytes([more, len(part)])
        out += part
    return out


class Peer:
    """A publisher's end of one connection, byte by byte."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.settimeout(10)
        self.greeted = self.read(64)

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data))
            assert more, "closed by the subscriber"
            data += more
        return data

    def frame(self) -> tuple[int, bytes]:
        """(flags, body) of what the subscriber sends."""
        flags, size = self.read(2)
        return flags, self.read(size)

    def open(self, minor: int = 1) -> tuple[int, bytes]:
        """Handshake; what is subscribed to, as it was sent."""
        self.socket.sendall(greeting(minor) + READY)
        assert self.frame() == (4, b"\x05READY\x0bSocket-Type\x00\x00\x00\x03SUB")
        return self.frame()


@contextmanager
def listening(family: int = socket.AF_INET, topic: str = "") -> Iterator[tuple[socket.socket, Subscription]]:
    """(what accepts, a subscription to it)."""
    with socket.socket(family) as server:
        host = "127.0.0.1" if family == socket.AF_INET else "::1"
        server.bind((host, 0))
        server.listen()
        server.settimeout(10)
        port = server.getsockname()[1]
        shown = host if family == socket.AF_INET else f"[{host}]"
        events = subscribe(f"tcp://{shown}:{port}", topic, bind=False)
        try:
            yield server, events
        finally:
            events.close()


def accept(server: socket.socket, events: Subscription) -> Peer:
    """The next connection, which the subscriber has to be driven to make."""
    server.settimeout(0.02)
    found: list[socket.socket] = []

    def came() -> bool:
        events.receive()
        try:
            found.append(server.accept()[0])
        except TimeoutError:
            return False
        return True

    eventually(came)
    greeted = threading.Thread(target=lambda: eventually(lambda: events.receive() is not None or bool(peers)))
    peers: list[Peer] = []
    greeted.start()
    peers.append(Peer(found[0]))
    greeted.join()
    return peers[0]


class Driven:
    """Receives all there is, in a thread, with what is told in between."""

    def __init__(self, events: Subscription) -> None:
        self.events = events
        self.seen: list[list[bytes] | Connection] = []
        self._waiter = wire.Waiter()
        self._waiter.add(events)
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._halt.is_set():
            self._waiter.wait(20)
            self.seen += self.events.changes()
            while (parts := self.events.receive()) is not None:
                self.seen.append(parts)

    def sees(self, *expected: object) -> None:
        eventually(lambda: len(self.seen) >= len(expected))
        assert self.seen == list(expected)
        self.seen.clear()

    def stop(self) -> None:
        self._halt.set()
        self._thread.join(10)


@contextmanager
def driven(events: Subscription) -> Iterator[Driven]:
    made = Driven(events)
    try:
        yield made
    finally:
        made.stop()


@contextmanager
def following(minor: int = 1, topic: str = "kv@") -> Iterator[tuple[socket.socket, Peer, Driven]]:
    """(what accepts, the first connection with its handshake made, what the subscriber sees)."""
    with listening(topic=topic) as (server, events), driven(events) as seen:
        peer = Peer(server.accept()[0])
        peer.open(minor)
        seen.sees(MADE)
        yield server, peer, seen


def test_messages_of_any_size_in_any_pieces() -> None:
    """A message is never seen in part, however it comes and however large it is."""
    chance = random.Random(3)
    sizes = [0, 1, 255, 256, 4096, 65_536, 300_000, 5_000_000]
    sent = [frames(number, chance.randbytes(chance.choice(sizes[:6]))) for number in range(300)]
    sent += [frames(1000 + number, chance.randbytes(size)) for number, size in enumerate(sizes)] + sent[:5]
    data = b"".join(map(message, sent))
    with following() as (_, peer, seen):
        at = 0
        while at < len(data):
            size = chance.choice([1, 7, 100, 5000, 70_000, 1_000_000])
            peer.socket.sendall(data[at : at + size])
            at += size
        seen.sees(*sent)


def test_what_was_sent_before_the_end_comes_before_it() -> None:
    """A connection that is lost takes only the message with it that was not sent whole."""
    with following() as (server, peer, seen):
        sent = [frames(number, bytes([number]) * 50_000) for number in range(20)]
        peer.socket.sendall(b"".join(map(message, sent)) + message(frames(20, bytes(9)))[:-1])
        peer.socket.close()
        seen.sees(*sent, LOST)
        again = Peer(server.accept()[0])
        again.open()
        again.socket.sendall(message(frames(7, b"x")))
        seen.sees(MADE, frames(7, b"x"))


def test_messages_that_come_with_the_handshake() -> None:
    """They are not waited for a second time: nothing else may come for hours."""
    with listening(topic="kv@") as (server, events), driven(events) as seen:
        peer = Peer(server.accept()[0])
        peer.socket.sendall(greeting() + READY + message(frames(1, b"x")) + message(frames(2, b"y")))
        seen.sees(MADE, frames(1, b"x"), frames(2, b"y"))


def test_other_topics_are_left_out() -> None:
    """A publisher need not filter, and a topic is a prefix."""
    with following() as (_, peer, seen):
        for topic in (b"other", b"", b"kv", b"kv@pod", b"kv@"):
            peer.socket.sendall(message(frames(1, b"x", topic)))
        seen.sees(frames(1, b"x", b"kv@pod"), frames(1, b"x", b"kv@"))


@pytest.mark.parametrize(("minor", "subscribed"), [(0, (0, b"\x01kv@")), (1, (4, b"\x09SUBSCRIBEkv@"))])
def test_it_subscribes_as_the_peer_understands(minor: int, subscribed: tuple[int, bytes]) -> None:
    """A command since ZMTP 3.1, a message before."""
    with listening(topic="kv@") as (server, events), driven(events):
        peer = Peer(server.accept()[0])
        assert peer.greeted == greeting()
        assert peer.open(minor) == subscribed


def test_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks and it answers; a peer that is still there is not lost, one that says nothing is."""
    monkeypatch.setattr(wire, "HEARTBEAT_MS", 50)
    monkeypatch.setattr(wire, "HEARTBEAT_TIMEOUT_MS", 200)
    with following() as (_, peer, seen):
        peer.socket.sendall(b"\x04\x0b\x04PING\x00\x00ctxt")
        asked = 0
        answers = []
        while asked < 8:
            flags, body = peer.frame()
            assert flags == 4
            if body == b"\x04PING\x00\x00":
                asked += 1
                peer.socket.sendall(b"\x04\x05\x04PONG")
            else:
                answers.append(body)
        assert answers == [b"\x04PONGctxt"]
        assert not seen.seen
        seen.sees(LOST)


def test_a_peer_before_heartbeats_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It need not answer and need not say anything: TCP watches over its host."""
    monkeypatch.setattr(wire, "HEARTBEAT_MS", 20)
    monkeypatch.setattr(wire, "HEARTBEAT_TIMEOUT_MS", 100)
    with following(minor=0) as (_, peer, seen):
        peer.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):
            peer.socket.recv(1)
        peer.socket.sendall(message(frames(1, b"x")))
        seen.sees(frames(1, b"x"))
        assert keeps_alive(peer.socket.getpeername())


def keeps_alive(address: object) -> bool:
    """Whether TCP asks the other end of this process's connection from there."""
    for each in os.listdir("/proc/self/fd"):
        try:
            found = socket.socket(fileno=os.dup(int(each)))
        except OSError:
            continue
        with found:
            if found.family == socket.AF_INET and found.getsockname() == address:
                return bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
    raise AssertionError("not connected")


@contextmanager
def sending(peer: Peer, data: bytes, pause: float = 0) -> Iterator[None]:
    """The peer sends this again and again meanwhile, for ten seconds at most."""
    halt, ends = threading.Event(), time.monotonic() + 10

    def send() -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            while not halt.wait(pause) and time.monotonic() < ends:
                peer.socket.sendall(data)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield
    finally:
        halt.set()
        peer.socket.settimeout(0.1)
        thread.join(15)


def opened(server: socket.socket, events: Subscription) -> Peer:
    """The next connection, with its handshake made and told."""
    peer = accept(server, events)
    threading.Thread(target=peer.open, daemon=True).start()
    eventually(lambda: events.receive() is not None or events.changes() == [MADE])
    return peer


@pytest.mark.parametrize(
    "noise", [b"\x00\x00" * 100_000, b"\x04\x05\x04PONG" * 50_000], ids=["other topics", "commands"]
)
def test_a_flood_of_something_else_keeps_no_thread(noise: bytes) -> None:
    """The thread has to look up from it, or it could never be stopped."""
    with listening(topic="kv@") as (server, events):
        peer = opened(server, events)
        with sending(peer, noise):
            begun = time.monotonic()
            for _ in range(20):
                assert events.receive() is None
            assert time.monotonic() - begun < 5 and not events.changes()


def test_what_is_no_message_does_not_prolong_a_wait() -> None:
    """A stream's deadlines are looked at by the clock, however often its engine asks whether we are there."""
    with listening() as (server, events):
        peer = opened(server, events)
        order = Order()
        order.applied(0, 0)
        assert events.source is not None
        with sending(peer, b"\x04\x07\x04PING\x00\x00", 0.05):
            begun = time.monotonic()
            drained = wire.drain(events.source, Index().add_stream("pod", 0), order, 100, (), 500, 500)
            assert 0.4 < time.monotonic() - begun < 5
        assert drained is not None and drained.empty


def test_an_answer_that_cannot_be_sent_loses_no_message() -> None:
    """What had come before the end is read, though nobody takes our signs of life."""
    with listening(topic="kv@") as (server, events):
        peer = opened(server, events)
        sent = [frames(number, b"x") for number in range(5)]
        ping = b"\x04\x07\x04PING\x00\x00"
        peer.socket.sendall(ping + b"".join(message(each) + ping for each in sent))
        time.sleep(0.05)  # all of it is here, and is read with the first one
        received = [events.receive()]
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.socket.close()
        time.sleep(0.05)
        while (parts := events.receive()) is not None:
            received.append(parts)
        assert received == sent
        eventually(lambda: events.receive() is not None or events.changes() == [LOST])


def test_messages_behind_the_news_are_not_forgotten() -> None:
    """Asked for before the news was looked at, they are still told of."""
    with listening(topic="kv@") as (server, events):
        peer = accept(server, events)
        peer.socket.sendall(greeting() + READY + message(frames(1, b"x")))
        eventually(lambda: events.receive() is not None or events.is_pending)
        assert events.receive() is None and events.receive() is None
        assert events.changes() == [MADE] and events.is_pending
        assert events.receive() == frames(1, b"x")


@pytest.mark.parametrize(
    "said",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", greeting()[:12] + b"CURVE".ljust(52, b"\0"), greeting() + b"\x00\x01x"],
    ids=["http", "curve", "no-handshake"],
)
def test_who_is_no_publisher_is_tried_again_in_a_while(said: bytes) -> None:
    """It is told, and not at once tried again: whoever is there will say the same."""
    with listening() as (server, events), driven(events) as seen:
        Peer(server.accept()[0]).socket.sendall(said)
        seen.sees(ENDED)
        begun = time.monotonic()
        peer = Peer(server.accept()[0])
        assert time.monotonic() - begun > 0.9
        peer.open()
        seen.sees(MADE)


def test_who_closes_before_the_handshake_is_tried_again() -> None:
    """As a proxy does whose engine is not up yet: nothing was made, so nothing is lost."""
    with listening() as (server, events), driven(events) as seen:
        for _ in range(3):
            server.accept()[0].close()
        peer = Peer(server.accept()[0])
        peer.open()
        seen.sees(MADE)


def test_an_address_of_the_sixth_version() -> None:
    """In brackets, as everywhere."""
    with listening(socket.AF_INET6) as (server, events), driven(events) as seen:
        peer = Peer(server.accept()[0])
        peer.open()
        peer.socket.sendall(message(frames(1, b"x")))
        seen.sees(MADE, frames(1, b"x"))


def test_a_wait_in_the_core_ends_with_the_connection() -> None:
    """What was applied counts, and the thread comes back for the news."""
    with listening() as (server, events):
        peer = opened(server, events)
        index, order = Index(), Order()
        stream = index.add_stream("pod", 0)
        order.applied(0, 0)
        event = ["BlockStored", [7], None, list(range(16)), 16, None]
        data = message(frames(1, msgpack.packb([time.time(), [event], 0])))

        def end_soon() -> None:
            peer.socket.sendall(data)
            eventually(lambda: index.claims == 1)
            peer.socket.close()

        thread = threading.Thread(target=end_soon, daemon=True)
        thread.start()
        begun = time.monotonic()
        assert events.source is not None
        drained = wire.drain(events.source, stream, order, 100, (), 20_000, 20_000)
        assert time.monotonic() - begun < 15
        thread.join(10)
        assert drained is not None and (drained.messages, drained.others, order.last) == (1, True, 1)
        assert events.is_pending and events.changes() == [LOST] and not events.is_pending


def test_closing_closes() -> None:
    """The engine sees the end, and nothing is held."""
    before = len(os.listdir("/proc/self/fd"))
    with following() as (_, peer, seen):
        seen.stop()
        seen.events.close()
        assert seen.events.receive() is None and seen.events.changes() == []
        assert peer.socket.recv(1) == b""
        peer.socket.close()
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_without_descriptors_it_is_refused() -> None:
    """As whoever registers a pod is told."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    subscribe(endpoint, "", bind=False).close()
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while len(taken) <= highest:
                taken.append(os.dup(0))
        with pytest.raises(wire.BindError, match="Too many open files"):
            subscribe(endpoint, "", bind=False)
    finally:
        for each in taken:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.1", "127.0.0.01", "2130706433", "0"])
def test_hosts_as_the_system_reads_them(host: str) -> None:
    """What ZeroMQ's library would connect to."""
    port = free_port()
    with wire.publisher(f"tcp://127.0.0.1:{port}"):
        events = subscribe(f"tcp://{host}:{port}", "", bind=False)
        told: list[Connection] = []

        def made() -> bool:
            events.receive()
            told.extend(events.changes())
            return bool(told)

        eventually(made)
        assert told == [MADE]
        events.close()


@pytest.mark.parametrize("endpoint", ["tcp://[::1::2]:5557", "tcp://999.1.1.1:5557"])
def test_what_is_no_address_is_refused(endpoint: str) -> None:
    """It is not looked up as a name would be."""
    with pytest.raises(wire.BindError):
        subscribe(endpoint, "", bind=False)
