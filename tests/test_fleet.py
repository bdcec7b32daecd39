"""Pods over real ZeroMQ sockets: registration, both modes, ranks, bad frames, restart, removal."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import msgpack
import pytest

from kvindex_server import wire
from kvindex_server.errors import InvalidArgument, NotFound, ResourceExhausted
from kvindex_server.fleet import Fleet
from kvindex_server.ingest import Bounds
from kvindex_server.models import Models
from kvindex_server.pods import PodSpec
from kvindex_server.stream import Cause, StreamState, Trust
from kvindex_server.subscriber import Subscriber


def free_ports(count: int) -> int:
    """First of `count` neighbouring free ports."""
    for _ in range(100):
        sockets = []
        try:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                first = int(probe.getsockname()[1])
            for offset in range(count):
                each = socket.socket()
                sockets.append(each)
                each.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise AssertionError("no free ports")


def eventually(check: Callable[[], bool], seconds: float = 5.0) -> None:
    ends = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < ends, "did not come true in time"
        time.sleep(0.005)


def payload(number: int, rank: int = 0, tag: str = "BlockStored") -> bytes:
    if tag == "BlockStored":
        event: list[object] = [tag, [number], None, [number] * 4, 4, None, "GPU"]
    else:
        event = [tag, [number], "GPU"]
    return bytes(msgpack.packb([time.time(), [event], rank]))


def send(publisher: wire.Socket, sequence: int, body: bytes) -> None:
    publisher.send([b"topic", sequence.to_bytes(8, "big"), body])


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    made = Fleet(Models([]), bounds=Bounds(replay_timeout=0.3), max_pods=3)
    yield made
    made.stop()


def bound(fleet: Fleet, ranks: int = 1) -> list[wire.Socket]:
    """A pod in bind mode, and its engine's publishers that dial in."""
    port = free_ports(ranks)
    fleet.register(PodSpec("pod", "m", f"tcp://127.0.0.1:{port}", ranks=ranks, bind=True))
    return [wire.publisher(f"tcp://127.0.0.1:{port + rank}", bind=False) for rank in range(ranks)]


def settle(fleet: Fleet, publisher: wire.Socket, body: bytes, rank: int = 0) -> None:
    """Publish until the subscription has reached the publisher, which drops what comes before."""
    ends = time.monotonic() + 5
    while fleet.statuses()[rank].messages == 0:
        assert time.monotonic() < ends
        send(publisher, 0, body)
        time.sleep(0.02)


def answer(router: wire.Socket, past: list[bytes]) -> None:
    """The next question, answered with all that was published."""
    assert router.wait(5000)
    identity, _, start = router.receive() or []
    for sequence, body in enumerate(past):
        if sequence >= int.from_bytes(start, "big"):
            router.send([identity, b"", b"", sequence.to_bytes(8, "big"), body])
    router.send([identity, b"", b"", b"\xff" * 8, b""])


@contextmanager
def taken_port() -> Iterator[str]:
    """An endpoint that cannot be bound."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield f"tcp://127.0.0.1:{taken.getsockname()[1]}"


def test_bind_mode_with_ranks(fleet: Fleet) -> None:
    """The engine dials in; every rank has its own sequence and its own claims."""
    first, second = bound(fleet, ranks=2)
    settle(fleet, first, payload(1), 0)
    settle(fleet, second, payload(2, rank=1), 1)
    send(second, 1, payload(3, rank=1))
    eventually(lambda: [status.blocks for status in fleet.statuses()] == [1, 2])
    assert [status.trust for status in fleet.statuses()] == [Trust.EXACT, Trust.EXACT]
    assert [status.last_sequence for status in fleet.statuses()] == [0, 1]
    for each in (first, second):
        each.close()


def test_bad_messages_are_counted_and_the_stream_goes_on(fleet: Fleet) -> None:
    """Wrong frame counts, a bad sequence frame, garbage, nothing and 100 MB cost only themselves."""
    (publisher,) = bound(fleet)
    settle(fleet, publisher, payload(1))
    publisher.send([b"only one frame"])
    publisher.send([b"topic", b"short", payload(2)])
    publisher.send([b"a", b"b", b"c", b"d"])
    publisher.send([b"topic", b"\xff" * 8, b""])
    publisher.send([b"topic", b"\xff" * 7 + b"\xfe", payload(3)])
    send(publisher, 1, b"")
    send(publisher, 2, b"\xc1garbage")
    send(publisher, 3, payload(2)[:-9])
    publisher.send([b"topic", (4).to_bytes(8, "big"), bytes(100 * 1024 * 1024)])
    send(publisher, 4, payload(5, tag="BlockMoved"))
    send(publisher, 5, payload(6))
    expected = {
        "frame_count": 2,
        "sequence_frame": 2,
        "sequence_jump": 1,
        "oversized": 1,
        "bad_batch": 2,
        "truncated": 1,
        "unknown_event": 1,
    }
    eventually(lambda: fleet.statuses()[0].last_sequence == 5, 15)
    # The core tells a moment later what it met: it still waits for further messages.
    eventually(lambda: fleet.statuses()[0].decode_errors == expected)
    assert fleet.statuses()[0].blocks == 2
    publisher.close()


def test_connect_mode_replays_what_was_published_before(fleet: Fleet) -> None:
    """Registered late, the pod's past is fetched from its replay socket, in either layout."""
    port = free_ports(2)
    publisher = wire.publisher(f"tcp://127.0.0.1:{port}")
    router = wire.replay_server(f"tcp://127.0.0.1:{port + 1}")
    past = [payload(number) for number in range(5)]
    spec = PodSpec("pod", "m", f"tcp://127.0.0.1:{port}", replay_endpoint=f"tcp://127.0.0.1:{port + 1}")
    assert fleet.register(spec) is True
    assert fleet.register(spec) is False
    assert router.wait(5000)
    identity, empty, start = router.receive() or []
    assert (empty, start) == (b"", bytes(8))
    for sequence, body in enumerate(past):
        layout = [b""] if sequence % 2 else [b"", b"topic"]
        router.send([identity, *layout, sequence.to_bytes(8, "big"), body])
    router.send([identity, b"", b"", b"\xff" * 8, b""])
    eventually(lambda: fleet.statuses()[0].state is StreamState.LIVE)
    status = fleet.statuses()[0]
    assert (status.trust, status.blocks, status.last_sequence) == (Trust.EXACT, 5, 4)
    publisher.close()
    router.close()


def test_restart_is_fenced(fleet: Fleet) -> None:
    """A second life on the same socket: only its own blocks are held."""
    (publisher,) = bound(fleet)
    settle(fleet, publisher, payload(1))
    send(publisher, 1, payload(2))
    eventually(lambda: fleet.statuses()[0].blocks == 2)
    send(publisher, 0, payload(9))
    eventually(lambda: fleet.statuses()[0].restarts == 1)
    eventually(lambda: fleet.statuses()[0].blocks == 1)
    publisher.close()


def test_unregister_drops_claims_and_clear_forgets(fleet: Fleet) -> None:
    """Both tell how many claims went; an unknown pod or model is NOT_FOUND."""
    (publisher,) = bound(fleet)
    settle(fleet, publisher, payload(1))
    assert fleet.clear("pod", "m") == 1
    eventually(lambda: fleet.statuses()[0].trust is Trust.COLD)
    send(publisher, 0, payload(4))
    eventually(lambda: fleet.statuses()[0].blocks == 1)
    assert fleet.unregister("pod", "m") == 1
    assert fleet.statuses() == [] and fleet.pods("m") == []
    with pytest.raises(NotFound):
        fleet.unregister("pod", "m")
    with pytest.raises(NotFound):
        fleet.clear("pod", "other")
    publisher.close()


def test_other_values_replace_a_registration(fleet: Fleet) -> None:
    """The same pod at another endpoint starts anew."""
    first, second = free_ports(1), free_ports(1)
    assert fleet.register(PodSpec("pod", "m", f"tcp://127.0.0.1:{first}"))
    assert fleet.register(PodSpec("pod", "m", f"tcp://127.0.0.1:{second}"))
    assert [status.endpoint for status in fleet.statuses()] == [f"tcp://127.0.0.1:{second}"]


def test_another_incarnation_drops_the_claims_of_the_one_before(fleet: Fleet) -> None:
    """A restart that whoever registers knows of is a fence, though the engine's numbers go on."""
    port = free_ports(1)
    spec = PodSpec("pod", "m", f"tcp://127.0.0.1:{port}", incarnation="container-1")
    with wire.publisher(f"tcp://127.0.0.1:{port}") as publisher:
        fleet.register(spec)
        settle(fleet, publisher, payload(1))
        eventually(lambda: fleet.statuses()[0].blocks == 1)
        assert not fleet.register(spec)
        assert fleet.register(replace(spec, incarnation="container-2"))
        assert fleet.statuses()[0].blocks == 0

        def followed() -> bool:
            send(publisher, 1, payload(2))
            return fleet.statuses()[0].blocks == 1

        eventually(followed)
        assert fleet.statuses()[0].trust is Trust.PARTIAL


def test_registration_errors_name_the_field(fleet: Fleet) -> None:
    """An address in use, a wrong block size and too many pods are refused; nothing is left behind."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InvalidArgument, match=r"^endpoint: "):
            fleet.register(PodSpec("pod", "m", endpoint, bind=True))
    assert fleet.statuses() == []
    fleet.register(PodSpec("a", "m", "tcp://127.0.0.1:1", block_size=16))
    with pytest.raises(InvalidArgument, match=r"^block_size: 24 is not the model's block size 16"):
        fleet.register(PodSpec("b", "m", "tcp://127.0.0.1:1", block_size=24))
    fleet.register(PodSpec("b", "m", "tcp://127.0.0.1:1"))
    fleet.register(PodSpec("c", "m", "tcp://127.0.0.1:1"))
    with pytest.raises(ResourceExhausted):
        fleet.register(PodSpec("d", "m", "tcp://127.0.0.1:1"))


def test_a_block_size_goes_with_the_models(fleet: Fleet) -> None:
    """Several of the model's blocks or a part of one will do; a size that nothing was claimed by yet may give way."""
    fleet.register(PodSpec("a", "m", "tcp://127.0.0.1:1", block_size=48))
    fleet.register(PodSpec("a", "m", "tcp://127.0.0.1:1", block_size=64))
    assert fleet._models.get("m").index.block_size == 64
    fleet.register(PodSpec("a", "m", "tcp://127.0.0.1:1", block_size=16))
    fleet.register(PodSpec("b", "m", "tcp://127.0.0.1:1", block_size=32))
    assert fleet._models.get("m").index.block_size == 16
    with pytest.raises(InvalidArgument, match=r"^block_size: 24 "):
        fleet.register(PodSpec("c", "m", "tcp://127.0.0.1:1", block_size=24))
    stream = fleet._models.get("m").index.add_stream("x", 0)
    stream.apply([payload(1)])
    fleet.register(PodSpec("c", "m", "tcp://127.0.0.1:1", block_size=8))
    assert fleet._models.get("m").index.block_size == 16


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"pod": ""}, "pod"),
        ({"model": ""}, "model"),
        ({"endpoint": "http://host:1"}, "endpoint"),
        ({"endpoint": "tcp://host"}, "endpoint"),
        ({"endpoint": "tcp://host:70000"}, "endpoint"),
        ({"endpoint": "tcp://*:5557"}, "endpoint"),
        ({"replay_endpoint": "x"}, "replay_endpoint"),
        ({"replay_endpoint": "tcp://*:5558"}, "replay_endpoint"),
        ({"ranks": 0}, "ranks"),
        ({"ranks": 2, "replay_endpoint": "tcp://host:2"}, "replay_endpoint"),
        ({"engine": "other"}, "engine"),
        ({"block_size": -1}, "block_size"),
        ({"pod": "a\n"}, "pod"),
        ({"topic": "x" * 1025}, "topic"),
        ({"endpoint": "tcp://a;b:1"}, "endpoint"),
    ],
)
def test_a_wrong_field_is_named(values: dict[str, object], field: str) -> None:
    """Every field of a registration is checked."""
    spec = {"pod": "pod", "model": "m", "endpoint": "tcp://host:1", **values}
    with pytest.raises(InvalidArgument) as error:
        PodSpec(**spec).validate()  # type: ignore[arg-type]
    assert error.value.field == field


def test_a_replacement_that_fails_leaves_the_standing_registration(fleet: Fleet) -> None:
    """An address in use costs the pod that stands neither its claims nor its place."""
    with wire.publisher(f"tcp://127.0.0.1:{free_ports(1)}") as publisher, taken_port() as taken:
        standing = PodSpec("pod", "m", publisher.endpoint)
        fleet.register(standing, discovered=True)
        settle(fleet, publisher, payload(1))
        with pytest.raises(InvalidArgument, match=r"^endpoint: "):
            fleet.register(PodSpec("pod", "m", taken, bind=True))
        with pytest.raises(InvalidArgument, match=r"^block_size: "):
            fleet.register(replace(standing, block_size=6))
        assert [status.blocks for status in fleet.statuses()] == [1]
        assert fleet.registrations() == [(standing, True)]


def test_a_bound_pod_comes_back_when_its_replacement_fails(fleet: Fleet) -> None:
    """Both want the same port, so the standing one has to go first; the engine finds it again."""
    port = free_ports(2)
    standing = PodSpec("pod", "m", f"tcp://127.0.0.1:{port}", bind=True)
    fleet.register(standing)
    with wire.publisher(standing.endpoint, bind=False) as publisher, socket.socket() as taken:
        settle(fleet, publisher, payload(1))
        taken.bind(("127.0.0.1", port + 1))
        taken.listen()
        with pytest.raises(InvalidArgument, match=r"^endpoint: "):
            fleet.register(replace(standing, ranks=2))
        assert fleet.registrations() == [(standing, False)]
        settle(fleet, publisher, payload(1))
        eventually(lambda: [status.blocks for status in fleet.statuses()] == [1])


def test_a_bound_pod_is_registered_anew_at_its_own_endpoint(fleet: Fleet) -> None:
    """The last registration's socket is closed before the next one is opened, every time."""
    spec = PodSpec("pod", "m", f"tcp://127.0.0.1:{free_ports(2)}", bind=True, ranks=2)
    for number in range(30):
        assert fleet.register(replace(spec, topic=f"t{number}"))
    for _ in range(30):
        fleet.unregister("pod", "m")
        assert fleet.register(spec)


def test_a_bound_endpoint_without_topics_is_one_pods(fleet: Fleet) -> None:
    """Nothing would tell their engines apart: the second one is refused and told why, with a topic or without."""
    spec = PodSpec("first", "m", f"tcp://127.0.0.1:{free_ports(1)}", bind=True)
    fleet.register(spec)
    for topic in ("", "kv@second@m"):
        with pytest.raises(InvalidArgument, match=r"^endpoint: is bound for pod 'first'"):
            fleet.register(replace(spec, pod="second", topic=topic))
    assert fleet.pods("m") == ["first"]


def test_a_registration_that_fails_makes_no_model(fleet: Fleet) -> None:
    """A model that was mistyped with a port in use is not known, nor is its block size."""
    with taken_port() as taken, pytest.raises(InvalidArgument, match=r"^endpoint: "):
        fleet.register(PodSpec("pod", "typo", taken, bind=True, block_size=128))
    with pytest.raises(NotFound):
        fleet.statuses("typo")
    assert fleet.register(PodSpec("pod", "typo", "tcp://127.0.0.1:1", block_size=16))


def test_a_pod_that_is_slow_to_go_holds_up_no_other(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of one pod are one after the other, those of others go on."""
    entered, goes = threading.Event(), threading.Event()
    stop = Subscriber.stop

    def slow(subscriber: Subscriber) -> int:
        if subscriber.spec.pod == "slow":
            entered.set()
            assert goes.wait(5)
        return stop(subscriber)

    monkeypatch.setattr(Subscriber, "stop", slow)
    fleet.register(PodSpec("slow", "m", "tcp://127.0.0.1:1"))
    calls = [
        threading.Thread(target=fleet.register, args=(PodSpec("slow", "m", f"tcp://127.0.0.1:{n}"),)) for n in (2, 3)
    ]
    for each in calls:
        each.start()
    assert entered.wait(5)
    fleet.register(PodSpec("other", "m", "tcp://127.0.0.1:1"))
    assert "other" in fleet.pods("m")
    goes.set()
    for each in calls:
        each.join(5)
    assert sorted(fleet.pods("m")) == ["other", "slow"]


def test_a_probe_at_a_bound_endpoint_changes_nothing(fleet: Fleet) -> None:
    """A kubelet that looks whether the port is open is no engine that came and went."""
    (publisher,) = bound(fleet)
    settle(fleet, publisher, payload(1))
    port = int(fleet.statuses()[0].endpoint.rpartition(":")[2])
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port)) as probe:
            probe.shutdown(socket.SHUT_WR)
            assert probe.recv(64) is not None
    send(publisher, 1, payload(2))
    eventually(lambda: fleet.statuses()[0].blocks == 2)
    status = fleet.statuses()[0]
    assert (status.trust, status.state) == (Trust.EXACT, StreamState.LIVE)
    publisher.close()


def test_an_event_port_where_nobody_listens_is_not_exact(fleet: Fleet) -> None:
    """The replay port answers, but what is published from now on is not heard."""
    port, past = free_ports(2), [payload(1)]
    with wire.replay_server(f"tcp://127.0.0.1:{port + 1}") as router:
        fleet.register(PodSpec("pod", "m", f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port + 1}"))
        answer(router, past)
        eventually(lambda: fleet.statuses()[0].blocks == 1)
        eventually(lambda: fleet.statuses()[0].state is StreamState.CONNECTING)
        status = fleet.statuses()[0]
        assert (status.trust, status.trust_cause) == (Trust.STALE, Cause.CONNECTION_LOST)
        with wire.publisher(f"tcp://127.0.0.1:{port}"):
            answer(router, past)
            eventually(lambda: fleet.statuses()[0].trust is Trust.EXACT)


def test_a_replay_socket_that_cannot_be_opened_ends_no_stream(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few descriptors at the start: counted, given up in time, and what is published is followed."""

    def refused(_endpoint: str) -> wire.Socket:
        raise wire.BindError("Too many open files")

    monkeypatch.setattr(wire, "replay_client", refused)
    with wire.publisher(f"tcp://127.0.0.1:{free_ports(1)}") as publisher:
        fleet.register(PodSpec("pod", "m", publisher.endpoint, "tcp://127.0.0.1:1"))
        settle(fleet, publisher, payload(1))
        eventually(lambda: fleet.statuses()[0].blocks == 1)
        assert fleet.statuses()[0].decode_errors["internal"] >= 1


def test_a_saved_state_that_cannot_be_read_ends_no_stream() -> None:
    """Whatever is wrong with it, the stream begins without."""

    def broken(_spec: PodSpec, _rank: int) -> None:
        raise OSError("disk")

    fleet = Fleet(Models([]), saved=broken)
    with wire.publisher(f"tcp://127.0.0.1:{free_ports(1)}") as publisher:
        fleet.register(PodSpec("pod", "m", publisher.endpoint))
        settle(fleet, publisher, payload(1))
        assert fleet.statuses()[0].decode_errors == {"internal": 1}
        assert fleet.statuses()[0].trust is Trust.EXACT
    fleet.stop()


def test_several_hundred_streams_at_once() -> None:
    """A fleet is not ended by a library's default number of sockets."""
    fleet = Fleet(Models([]))
    try:
        for number in range(3):
            first = 20000 + number * 100
            fleet.register(PodSpec(f"pod-{number}", "m", f"tcp://127.0.0.1:{first}", ranks=100))
        assert len(fleet.statuses()) == 300
    finally:
        fleet.stop()


def test_a_registration_that_fails_leaves_the_block_size(fleet: Fleet) -> None:
    """It is settled when the pod can be listened to, not before."""
    fleet.register(PodSpec("a", "m", "tcp://127.0.0.1:1", block_size=64))
    with taken_port() as taken, pytest.raises(InvalidArgument, match=r"^endpoint: "):
        fleet.register(PodSpec("b", "m", taken, bind=True, block_size=16))
    assert fleet._models.get("m").index.block_size == 64
