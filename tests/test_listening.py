"""Several engines that dial into one endpoint, told apart by topic."""

import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
from publisher import Publisher, free_port
from test_fleet import eventually, free_ports, payload
from test_subscription import READY, Driven, Peer, driven, frames, greeting, message

from kvindex_server import listening
from kvindex_server.errors import InvalidArgument
from kvindex_server.fleet import Fleet
from kvindex_server.ingest import Bounds
from kvindex_server.models import Models
from kvindex_server.pods import PodSpec, bound_address
from kvindex_server.stream import StreamStatus, Trust
from kvindex_server.subscription import subscribe
from kvindex_server.wire import BindError, Connection

MADE, LOST, ENDED = Connection.MADE, Connection.LOST, Connection.ENDED


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    made = Fleet(Models([]), bounds=Bounds(replay_timeout=0.3, disconnect_grace=0.2))
    yield made
    made.stop()


@pytest.fixture
def endpoint() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


def spec(endpoint: str, pod: str, **more: object) -> PodSpec:
    made = PodSpec(pod, "m", endpoint, topic=f"kv@{pod}@m", bind=True)
    return replace(made, **more)  # type: ignore[arg-type]


def engine(endpoint: str, pod: str, **more: object) -> Publisher:
    return Publisher(topic=f"kv@{pod}@m".encode(), connect=endpoint, **more)  # type: ignore[arg-type]


def status(fleet: Fleet, pod: str) -> StreamStatus:
    return next(each for each in fleet.statuses() if each.pod == pod)


def is_exact(fleet: Fleet, pod: str, blocks: int) -> bool:
    found = status(fleet, pod)
    return found.trust is Trust.EXACT and found.blocks == blocks


def dial(endpoint: str, first: bytes = b"", minor: int = 1) -> Peer:
    """An engine's connection, byte by byte, with its handshake made and something sent right behind."""
    peer = Peer(socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2])), 10))
    peer.socket.sendall(greeting(minor) + READY + first)
    assert peer.frame() == (4, b"\x05READY\x0bSocket-Type\x00\x00\x00\x03SUB")
    # ZMTP 3.1 subscribes by a command, 3.0 by a message; to everything, as nobody knows yet who this is.
    assert peer.frame() == ((4, b"\x09SUBSCRIBE") if minor else (0, b"\1"))
    return peer


@contextmanager
def taking(endpoint: str, topic: str) -> Iterator[Driven]:
    events = subscribe(endpoint, topic, bind=True)
    try:
        with driven(events) as seen:
            yield seen
    finally:
        events.close()


def test_engines_at_one_endpoint_are_told_apart(fleet: Fleet, endpoint: str) -> None:
    """Each pod has what its own engine holds, and one engine's death is no other's."""
    pods = [f"pod-{number}" for number in range(5)]
    engines = {pod: engine(endpoint, pod) for pod in pods}
    try:
        for pod in pods:
            assert fleet.register(spec(endpoint, pod, replay_endpoint=engines[pod].replay_endpoint))
        for number, pod in enumerate(pods):
            engines[pod].wait_subscriber()
            for block in range(number + 1):
                engines[pod].publish(payload(100 * number + block))
        for number, pod in enumerate(pods):
            eventually(lambda pod=pod, number=number: is_exact(fleet, pod, number + 1))  # type: ignore[misc]
        engines["pod-1"].close()
        eventually(lambda: status(fleet, "pod-1").trust is not Trust.EXACT)
        engines["pod-2"].publish(payload(777))
        eventually(lambda: is_exact(fleet, "pod-2", 4))
        # Another life under the same topic; the dead one's blocks go.
        with engine(endpoint, "pod-1", replay_port=engines["pod-1"].replay_port) as again:
            again.wait_subscriber()
            again.publish(payload(5))
            eventually(lambda: is_exact(fleet, "pod-1", 1))
        assert [is_exact(fleet, "pod-3", 4), is_exact(fleet, "pod-4", 5)] == [True, True]
    finally:
        for each in engines.values():
            each.close()


def test_each_rank_has_a_port(fleet: Fleet) -> None:
    """Two pods of two ranks share two ports."""
    first = free_ports(2)
    endpoint = f"tcp://*:{first}"
    for pod in ("a", "b"):
        fleet.register(spec(endpoint, pod, ranks=2))
    engines = [engine(f"tcp://127.0.0.1:{first + rank}", pod, replay=False) for pod in ("a", "b") for rank in (0, 1)]
    try:
        for number, each in enumerate(engines):
            each.wait_subscriber()
            for block in range(number + 1):
                each.publish(payload(10 * number + block))
        eventually(lambda: [each.blocks for each in fleet.statuses()] == [1, 2, 3, 4])
    finally:
        for each in engines:
            each.close()


def test_an_engine_waits_for_its_pod(fleet: Fleet, endpoint: str) -> None:
    """What it has published before its pod was registered is not lost, and nobody else gets it."""
    fleet.register(spec(endpoint, "early"))
    with engine(endpoint, "late", replay=False) as late:
        late.wait_subscriber()
        for block in range(3):
            late.publish(payload(block))
        eventually(lambda: listening.unclaimed() == {endpoint: ["kv@late@m"]})
        fleet.register(spec(endpoint, "late"))
        eventually(lambda: is_exact(fleet, "late", 3))
        assert listening.unclaimed() == {endpoint: []}
        assert status(fleet, "early").blocks == 0
        # Taken away, its engine waits again.
        fleet.unregister("late", "m")
        late.publish(payload(9))
        eventually(lambda: (late.publish(payload(9)), listening.unclaimed() == {endpoint: ["kv@late@m"]})[1])
    eventually(lambda: listening.unclaimed() == {endpoint: []})


def test_of_several_that_wait_the_latest_is_taken(endpoint: str) -> None:
    """The others may be dead ones, whatever numbers the system has given to their sockets."""
    with taking(endpoint, "kv@other"):
        first = dial(endpoint)
        old = dial(endpoint, message(frames(0, b"x", b"kv@a")))
        first.socket.close()  # its numbers are free, and below those of the second
        time.sleep(0.1)
        new = dial(endpoint, message(frames(0, b"y", b"kv@a")))
        eventually(lambda: listening.unclaimed() == {endpoint: ["kv@a"] * 2})
        with taking(endpoint, "kv@a") as seen:
            seen.sees(MADE, frames(0, b"y", b"kv@a"))
            assert old.socket.recv(64) == b""
            new.socket.close()


def test_who_shares_an_endpoint_needs_a_topic_of_its_own(fleet: Fleet, endpoint: str) -> None:
    """Refused by field and reason, and what stands is left alone."""
    fleet.register(spec(endpoint, "first"))
    for topic in ("kv@first@m", "kv@", "kv@first"):
        with pytest.raises(InvalidArgument, match=r"^topic: begins as that of pod 'first' at the same endpoint"):
            fleet.register(spec(endpoint, "second", topic=topic))
    with pytest.raises(InvalidArgument, match=r"^endpoint: is bound for pod 'first'; each pod needs its own"):
        fleet.register(spec(endpoint, "second", topic=""))
    assert fleet.pods("m") == ["first"]
    # One that names pod and model is no beginning of another that does.
    assert fleet.register(spec(endpoint, "first", model="m-large", topic="kv@first@m-large"))
    fleet.unregister("first", "m-large")
    # A pod's own topic may change.
    assert fleet.register(spec(endpoint, "first", topic="kv@"))
    assert fleet.register(spec(endpoint, "first"))


def test_topics_that_overlap_are_refused_below_too(endpoint: str) -> None:
    """Two registrations at the same moment do not see each other."""
    with taking(endpoint, "kv@a"):
        for topic in ("kv@a", "kv@", "kv@ab"):
            with pytest.raises(BindError, match="taken already"):
                subscribe(endpoint, topic, bind=True)
        subscribe(endpoint, "kv@b", bind=True).close()
    with taking(endpoint, "kv@a@m"):
        for topic in ("kv@a@m", "kv@a@", "kv@a"):
            with pytest.raises(BindError, match="taken already"):
                subscribe(endpoint, topic, bind=True)
        subscribe(endpoint, "kv@a@m2", bind=True).close()


def test_a_model_whose_name_begins_as_another_ones(endpoint: str) -> None:
    """`kv@POD@MODEL` is one engine's, and no prefix: another's blocks would be credited to this one."""
    with taking(endpoint, "kv@a@m") as seen:
        other = dial(endpoint, message(frames(0, b"x", b"kv@a@m-large")))
        eventually(lambda: listening.unclaimed() == {endpoint: ["kv@a@m-large"]})
        own = dial(endpoint, message(frames(0, b"y", b"kv@a@m")))
        seen.sees(MADE, frames(0, b"y", b"kv@a@m"))
        for each in (other, own):
            each.socket.close()


def test_an_endpoint_is_free_when_its_last_pod_has_gone(fleet: Fleet, endpoint: str) -> None:
    """And not before."""
    host, _, port = endpoint.removeprefix("tcp://").partition(":")

    def is_free() -> bool:
        with socket.socket() as probe, suppress(OSError):
            probe.bind((host, int(port)))
            return True
        return False

    for _ in range(5):
        fleet.register(spec(endpoint, "a"))
        fleet.register(spec(endpoint, "b"))
        fleet.unregister("a", "m")
        assert not is_free()
        fleet.unregister("b", "m")
        assert is_free()


@pytest.mark.parametrize("minor", [0, 1])
def test_an_engine_that_comes_again_stands_for_the_one_before(endpoint: str, minor: int) -> None:
    """All that came over the old connection is read first, though nobody has ended that."""
    with taking(endpoint, "kv@a") as seen:
        old = dial(endpoint, message(frames(0, b"x", b"kv@a")), minor)
        seen.sees(MADE, frames(0, b"x", b"kv@a"))
        old.socket.sendall(message(frames(1, bytes(100_000), b"kv@a")))
        seen.sees(frames(1, bytes(100_000), b"kv@a"))
        new = dial(endpoint, message(frames(0, b"y", b"kv@a")), minor)
        seen.sees(LOST, MADE, frames(0, b"y", b"kv@a"))
        assert old.socket.recv(64) == b""
        new.socket.close()
        seen.sees(LOST)


def test_after_many_that_came_at_once_there_is_rest(endpoint: str) -> None:
    """What tells of a connection that is taken already would keep the stream's thread from ever sleeping again."""
    first = greeting() + READY + message(frames(0, b"x", b"kv@a"))

    def many() -> None:
        for _ in range(30):
            with socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2])), 10) as peer:
                peer.sendall(first)
                peer.recv(1)

    with taking(endpoint, "kv@a") as seen:
        for _ in range(30):
            crowd = [threading.Thread(target=many, daemon=True) for _ in range(3)]
            for each in crowd:
                each.start()
            for each in crowd:
                each.join(20)
            last = dial(endpoint, message(frames(1, b"y", b"kv@a")))
            eventually(lambda: frames(1, b"y", b"kv@a") in seen.seen)
            waits = seen.events.pollables[0]
            eventually(lambda waits=waits: not select.select([waits], [], [], 0)[0])  # type: ignore[misc]
            last.socket.close()
            seen.seen.clear()


def test_a_first_message_in_any_pieces(endpoint: str) -> None:
    """It is told by its topic as soon as that is there, and read whole by whoever takes it."""
    large = message(frames(0, bytes(3_000_000), b"kv@a"))
    for cut in (1, 2, 7, 14, 15, 1000, 100_000):
        with taking(endpoint, "kv@a") as seen:
            peer = dial(endpoint, large[:cut])
            time.sleep(0.02)
            peer.socket.sendall(large[cut:] + message(frames(1, b"z", b"kv@a")))
            seen.sees(MADE, frames(0, bytes(3_000_000), b"kv@a"), frames(1, b"z", b"kv@a"))
            peer.socket.close()


def test_an_engine_that_waits_for_nothing(endpoint: str) -> None:
    """Its handshake and its first message may be there when its connection is accepted."""
    for _ in range(20):
        with taking(endpoint, "kv@a") as seen, socket.socket() as eager:
            eager.connect(("127.0.0.1", int(endpoint.rpartition(":")[2])))
            eager.sendall(greeting() + READY + message(frames(0, b"x", b"kv@a")))
            seen.sees(MADE, frames(0, b"x", b"kv@a"))


def test_signs_of_life_before_the_first_message(endpoint: str) -> None:
    """An engine that is idle may ask whether we are there."""
    ping = b"\x04\x0a\x04PING\x00\x00abc"
    with taking(endpoint, "kv@a") as seen:
        peer = dial(endpoint)
        for _ in range(3):
            peer.socket.sendall(ping)
            assert peer.frame() == (4, b"\x04PONGabc")
        peer.socket.sendall(ping + message(frames(0, b"x", b"kv@a"))[:-1])
        seen.sees(MADE)
        peer.socket.sendall(b"x")
        seen.sees(frames(0, b"x", b"kv@a"))


def test_a_connection_is_one_engines(endpoint: str) -> None:
    """What forwards several engines over one connection cannot be followed, and is not followed in part unseen."""
    with taking(endpoint, "kv@a") as one, taking(endpoint, "kv@b") as other:
        peer = dial(endpoint, message(frames(0, b"x", b"kv@a")) + message(frames(0, b"y", b"kv@b")))
        one.sees(MADE, frames(0, b"x", b"kv@a"), LOST, ENDED)
        assert peer.socket.recv(64) == b""
        assert other.seen == []


def test_a_connection_is_one_engines_also_where_the_topic_is_a_beginning(endpoint: str) -> None:
    """Both could be meant; their numbers would be one stream's."""
    with taking(endpoint, "kv@") as seen:
        peer = dial(endpoint, message(frames(0, b"x", b"kv@a")) + message(frames(1, b"y", b"kv@ab")))
        seen.sees(MADE, frames(0, b"x", b"kv@a"), LOST, ENDED)
        assert peer.socket.recv(64) == b""


def test_what_came_just_before_the_next_connection_is_read(endpoint: str) -> None:
    """Also behind what was read in one go with the message before."""
    events = subscribe(endpoint, "kv@a", bind=True)
    received: list[list[bytes] | None] = []

    def receives() -> bool:
        received.append(events.receive())
        return received[-1] is not None

    try:
        old = dial(endpoint, message(frames(0, b"x", b"kv@a")))
        eventually(receives if events.changes() else lambda: receives() or bool(events.changes()))
        old.socket.sendall(message(frames(1, b"x", b"kv@a")))
        eventually(lambda: receives() and received[-1] == frames(1, b"x", b"kv@a"))
        old.socket.sendall(message(frames(2, b"x", b"kv@a")))
        new = dial(endpoint, message(frames(3, b"y", b"kv@a")))
        time.sleep(0.2)
        assert events.receive() == frames(2, b"x", b"kv@a")
        eventually(lambda: events.receive() is None and events.changes() == [LOST, MADE])
        assert events.receive() == frames(3, b"y", b"kv@a")
        for each in (old, new):
            each.socket.close()
    finally:
        events.close()


def test_who_is_no_engine_is_sent_away(endpoint: str) -> None:
    """Probes, scans, and what never says who it is, do not keep engines out."""
    port = int(endpoint.rpartition(":")[2])
    with taking(endpoint, "kv@a") as seen:
        for nonsense in (b"GET / HTTP/1.1\r\n\r\n", bytes(64), greeting() + b"\x04\x05\x04HEYA", b"\xff" * 64):
            with socket.create_connection(("127.0.0.1", port), 10) as prober:
                prober.sendall(nonsense)
                with suppress(ConnectionResetError):
                    while prober.recv(4096):
                        pass
        endless = dial(endpoint)
        endless.socket.sendall(b"\x03" + (1 << 20).to_bytes(8, "big"))  # a topic of 1 MiB
        with suppress(OSError):
            for _ in range(200):
                endless.socket.sendall(bytes(10_000))
                time.sleep(0.001)
            raise AssertionError("a topic without end was read")
        crowd = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(1_100)]
        peer = dial(endpoint, message(frames(0, b"x", b"kv@a")))
        seen.sees(MADE, frames(0, b"x", b"kv@a"))
        for each in [*crowd, peer.socket]:
            each.close()
        seen.sees(LOST)


def test_one_clients_connections_keep_no_engine_out(endpoint: str) -> None:
    """Even when each of them makes its handshake; others that are idle stay."""
    port = int(endpoint.rpartition(":")[2])
    with taking(endpoint, "kv@a") as seen, taking(endpoint, "kv@idle") as other, socket.socket() as idle:
        idle.bind(("127.0.0.7", 0))
        idle.connect(("127.0.0.1", port))
        idle.sendall(greeting() + READY)
        crowd = [dial(endpoint) for _ in range(1_100)]
        peer = dial(endpoint, message(frames(0, b"x", b"kv@a")))
        seen.sees(MADE, frames(0, b"x", b"kv@a"))
        idle.sendall(message(frames(0, b"x", b"kv@idle")))
        other.sees(MADE, frames(0, b"x", b"kv@idle"))
        for each in (*crowd, peer):
            each.socket.close()


def test_asking_who_waits_is_in_nobodys_way(endpoint: str) -> None:
    """A scrape at the moment when a pod is registered anew must not hold its address."""
    halt, interval = threading.Event(), sys.getswitchinterval()

    def ask() -> None:
        while not halt.is_set():
            listening.unclaimed()

    askers = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    sys.setswitchinterval(1e-6)
    try:
        for each in askers:
            each.start()
        for _ in range(2_000):
            subscribe(endpoint, "kv@a", bind=True).close()
    finally:
        sys.setswitchinterval(interval)
        halt.set()
        for each in askers:
            each.join(10)


def test_a_connection_that_says_nothing_goes(endpoint: str) -> None:
    """One without a handshake after ten seconds; one with it may be an idle engine, and stays."""
    with taking(endpoint, "kv@a") as seen:
        idle = dial(endpoint)
        with socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2])), 20) as silent:
            began = time.monotonic()
            assert len(silent.recv(64)) == 64
            assert silent.recv(64) == b""
            assert 8 < time.monotonic() - began < 15
        idle.socket.sendall(message(frames(0, b"x", b"kv@a")))
        seen.sees(MADE, frames(0, b"x", b"kv@a"))


def test_addresses_of_endpoints() -> None:
    """A name, or a network's interface, is bound by ZeroMQ, for one pod alone."""
    hosts = {"*": "0.0.0.0", "127.0.0.1": "127.0.0.1", "[::1]": "::1", "eth0": None, "localhost": None}
    assert {host: bound_address(host) for host in hosts} == hosts
