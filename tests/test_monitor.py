"""Connections of event sockets: who counts as an engine, what ends a connection, and that options act at all."""

import socket
import time
from collections.abc import Callable, Iterator

import pytest
from publisher import free_port
from slow_proxy import SlowProxy
from subscribing import leave_to_library
from test_fleet import eventually

from kvindex_server import wire
from kvindex_server.subscription import subscribe
from kvindex_server.wire import Connection

MADE, LOST, LEFT, ENDED = Connection.MADE, Connection.LOST, Connection.LEFT, Connection.ENDED


class Watched:
    """A watched subscription and all that was told of its connections."""

    def __init__(self, endpoint: str, *, bind: bool) -> None:
        self.endpoint = endpoint
        self.events = subscribe(endpoint, "", bind=bind)
        self.told: list[Connection] = []

    def look(self) -> int:
        """How much was told since the last `tells`; drops messages."""
        self.events.receive()
        self.told += self.events.changes()
        return len(self.told)

    def tells(self, *expected: Connection) -> None:
        """Exactly this comes, in this order, since the last call."""
        eventually(lambda: self.look() >= len(expected))
        assert tuple(self.told) == expected
        self.told.clear()

    def close(self) -> None:
        self.events.close()


@pytest.fixture
def bound() -> Iterator[Watched]:
    made = Watched(f"tcp://127.0.0.1:{free_port()}", bind=True)
    yield made
    made.close()


def visit(watched: Watched, data: bytes) -> None:
    """As a probe or a port scan does: connect, say something or nothing, and close; returns when that is known."""
    monitor = watched.events.monitor  # type: ignore[attr-defined]
    gone, told = [], monitor._gone
    monitor._gone = lambda peer: gone.append(peer) or told(peer)  # type: ignore[func-returns-value]
    port = int(watched.endpoint.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(data)

    def known() -> bool:
        watched.told += watched.events.changes()
        return bool(gone)

    eventually(known)
    monitor._gone = told


STRANGERS = [b"", b"GET /healthz HTTP/1.1\r\n\r\n", b"\xff" * 200, bytes(100), b"\x16\x03\x01" + b"q" * 200]


def test_strangers_at_a_bound_endpoint_are_no_engines(bound: Watched) -> None:
    """A kubelet's probe, a port scan or a browser neither makes a connection nor ends the engine's."""
    for data in STRANGERS:
        visit(bound, data)
    with wire.publisher(bound.endpoint, bind=False):
        bound.tells(MADE)
        for data in STRANGERS:
            visit(bound, data)
    bound.tells(LOST)


def test_an_engine_that_leaves_after_the_next_one_came_is_told(bound: Watched) -> None:
    """The stream goes on, but whose claims these are has to be asked."""
    first = wire.publisher(bound.endpoint, bind=False)
    bound.tells(MADE)
    with wire.publisher(bound.endpoint, bind=False):
        bound.tells(MADE)
        first.close()
        bound.tells(LEFT)
    bound.tells(LOST)


def test_an_endpoint_is_free_when_its_socket_is_closed() -> None:
    """ZeroMQ closes on a thread of its own; the next registration must not meet the last one's socket."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    for _ in range(40):
        Watched(endpoint, bind=True).close()


@pytest.fixture(params=["address", "name", "library"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a subscription by the core, to an address or a name, or by ZeroMQ's library."""
    if request.param == "library":
        leave_to_library(monkeypatch)
    return "localhost" if request.param == "name" else "127.0.0.1"


def test_a_connection_that_comes_back(host: str) -> None:
    """Connecting, every loss and every return is told."""
    port = free_port()
    publisher = wire.publisher(f"tcp://127.0.0.1:{port}")
    watched = Watched(f"tcp://{host}:{port}", bind=False)
    watched.tells(MADE)
    publisher.close()
    watched.tells(LOST)
    with again(lambda: wire.publisher(f"tcp://127.0.0.1:{port}")):
        watched.tells(MADE)
    watched.close()


def again(made: Callable[[], wire.Socket]) -> wire.Socket:
    ends = time.monotonic() + 5
    while True:
        try:
            return made()
        except wire.BindError:
            assert time.monotonic() < ends
            time.sleep(0.01)


@pytest.mark.parametrize("bind", [True, False], ids=["bound", "connected"])
def test_a_frame_above_the_limit_ends_the_connection_which_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, host: str, bind: bool
) -> None:
    """It is never held in memory; ZeroMQ would not come back by itself where it connected."""
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 1000)
    monkeypatch.setattr(wire, "_ABANDONED_SECONDS", 0.05)
    port = free_port()
    endpoint = f"tcp://127.0.0.1:{port}"
    watched = None if not bind else Watched(endpoint, bind=True)
    with wire.publisher(endpoint, bind=not bind) as publisher:
        watched = watched or Watched(f"tcp://{host}:{port}", bind=False)
        watched.tells(MADE)

        def arrives(size: int, arrived: Callable[[], bool]) -> None:
            def sent() -> bool:  # again and again: the subscription reaches the publisher when it does
                publisher.send([b"", bytes(8), bytes(size)])
                return arrived()

            eventually(sent)

        arrives(10, lambda: watched.events.receive() is not None)
        while watched.events.receive() is not None:
            pass
        publisher.send([b"", bytes(8), bytes(4001)])
        eventually(lambda: watched.look() > 0)
        watched.tells(*([LOST, MADE] if bind else [LOST, ENDED, MADE]))
        arrives(10, lambda: [len(each) for each in watched.events.receive() or ()] == [0, 8, 10])
    watched.close()


def test_a_replayed_frame_above_the_limit_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of the socket that asks."""
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 1000)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    with wire.replay_server(endpoint) as router, wire.replay_client(endpoint) as client:
        for size, taken in ((4000, True), (4001, False)):
            wire.request_replay(client, 0)
            assert router.wait(5000)
            (identity, *_), begun = router.receive() or [b""], time.monotonic()
            router.send([identity, b"", bytes(8), bytes(size)])
            assert client.wait(5000 if taken else 200) is taken, time.monotonic() - begun
            client.receive()


def test_a_peer_that_falls_silent_without_closing_is_lost(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """A host that lost its power or its network sends no FIN: heartbeats tell."""
    monkeypatch.setattr(wire, "HEARTBEAT_MS", 50)
    monkeypatch.setattr(wire, "HEARTBEAT_TIMEOUT_MS", 100)
    port = free_port()
    with wire.publisher(f"tcp://127.0.0.1:{port}"):
        proxy = SlowProxy(port)
        watched = Watched(f"tcp://{host}:{proxy.port}", bind=False)
        watched.tells(MADE)
        proxy.held.set()
        watched.tells(LOST)
        proxy.close()
        watched.close()
