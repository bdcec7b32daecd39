"""Pods found by the topics of engines that dial into one endpoint."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import zmq
from publisher import Publisher, free_port
from test_fleet import eventually, free_ports, payload

from kvindex_server.config import ConfigError, DialInSettings, DiscoveryDefaults, Settings, load_settings
from kvindex_server.discovery import dial_in
from kvindex_server.discovery.dial_in import DialInSource
from kvindex_server.discovery.reconciler import Reconciler
from kvindex_server.discovery.source import Source
from kvindex_server.fleet import Fleet
from kvindex_server.ingest import Bounds
from kvindex_server.models import Models
from kvindex_server.server import Server
from kvindex_server.stream import StreamStatus, Trust


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    made = Fleet(Models([]), bounds=Bounds(replay_timeout=0.5, disconnect_grace=0.2), max_pods=8)
    yield made
    made.stop()


@contextmanager
def finding(
    fleet: Fleet, endpoint: str, forget_seconds: float = 60.0, **defaults: Any
) -> Iterator[tuple[Reconciler, Source]]:
    settings = DialInSettings(endpoint=endpoint, forget_seconds=forget_seconds)
    source = DialInSource(settings, DiscoveryDefaults(**defaults), fleet.is_connected)
    reconciler = Reconciler(fleet, [source])
    reconciler.start()
    try:
        yield reconciler, source
    finally:
        reconciler.stop()


def here() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


def engine(endpoint: str, pod: str, model: str = "m", **more: Any) -> Publisher:
    return Publisher(topic=f"kv@{pod}@{model}".encode(), connect=endpoint, **more)


def said(fleet: Fleet, what: Callable[[StreamStatus], object]) -> dict[tuple[str, str, int], object]:
    return {(each.model, each.pod, each.rank): what(each) for each in fleet.statuses()}


def blocks(fleet: Fleet) -> dict[tuple[str, str, int], object]:
    return said(fleet, lambda each: each.blocks if each.trust is Trust.EXACT else each.trust)


def test_engines_name_themselves(fleet: Fleet) -> None:
    """Pod and model come from the topic; an engine's first message is not lost."""
    endpoint = here()
    with (
        finding(fleet, endpoint, block_size=4),
        engine(endpoint, "10.0.0.1", "org/model@1", replay=False) as one,
        engine(endpoint, "10.0.0.2:8000", "other", replay=False) as other,
    ):
        for each, count in ((one, 3), (other, 5)):
            each.wait_subscriber()
            for block in range(count):
                each.publish(payload(block))
        eventually(lambda: blocks(fleet) == {("org/model@1", "10.0.0.1", 0): 3, ("other", "10.0.0.2:8000", 0): 5})
        assert [discovered for _, discovered in fleet.registrations()] == [True, True]


def test_an_engine_of_another_model_takes_no_pods_place(fleet: Fleet) -> None:
    """Under the same name, and the model's begins as the one before's: its blocks are not that one's."""
    endpoint = here()
    with finding(fleet, endpoint), engine(endpoint, "a", "m-large", replay=False) as large:
        with engine(endpoint, "a", "m", replay=False) as small:
            small.wait_subscriber()
            small.publish(payload(1))
            eventually(lambda: blocks(fleet) == {("m", "a", 0): 1})
        eventually(lambda: blocks(fleet) == {("m", "a", 0): Trust.STALE})
        large.wait_subscriber()
        for block in range(3):
            large.publish(payload(block))
        eventually(lambda: blocks(fleet) == {("m", "a", 0): Trust.STALE, ("m-large", "a", 0): 3})


@pytest.mark.parametrize("limit", ["MOST_KNOWN", "MOST_MODELS"])
def test_who_names_pods_without_end_is_bounded(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """They are not remembered, only counted."""
    monkeypatch.setattr(dial_in, limit, 2)
    endpoint = here()
    with finding(fleet, endpoint) as (reconciler, source):
        engines = [engine(endpoint, f"pod-{number}", f"m-{number}", replay=False) for number in range(5)]
        try:
            for each in engines:
                each.wait_subscriber()
                each.publish(payload(1))
            eventually(lambda: reconciler.statuses()[0].refused == {"limit": 3})
            assert len(source.look().found) == 2
        finally:
            for each in engines:
                each.close()


def test_one_bad_look_does_not_end_it(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is counted, and the next one finds the engine."""
    endpoint = here()
    faults = [ZeroDivisionError("one"), ZeroDivisionError("two")]

    def host(address: str) -> str:
        if faults:
            raise faults.pop()
        return address

    monkeypatch.setattr(dial_in, "host", host)
    with finding(fleet, endpoint, replay_port=free_port()) as (reconciler, _), engine(endpoint, "a") as each:
        each.wait_subscriber()
        each.publish(payload(1))
        eventually(lambda: said(fleet, lambda status: status.blocks) == {("m", "a", 0): 1})
        assert reconciler.statuses()[0].errors == {"internal": 2}


def test_what_was_bound_is_free_when_a_rank_cannot_be(fleet: Fleet) -> None:
    """All ranks' endpoints or none."""
    first = free_ports(2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 1))
        with pytest.raises(ConfigError, match=r"in use"), finding(fleet, f"tcp://127.0.0.1:{first}", ranks=2):
            pass
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", first))


def test_replays_are_asked_for_where_the_connection_came_from(fleet: Fleet) -> None:
    """An engine that has published before is EXACT, and so is its next life at another address."""
    endpoint = here()
    with engine(endpoint, "a") as first:
        for block in range(4):
            first.publish(payload(block), lose=True)
        with finding(fleet, endpoint, replay_port=first.replay_port):
            first.wait_subscriber()
            first.publish(payload(4))
            eventually(lambda: blocks(fleet) == {("m", "a", 0): 5})
            with zmq.Context() as context, context.socket(zmq.PUB) as elsewhere:
                elsewhere.connect(endpoint.replace("tcp://", "tcp://127.0.0.9:0;"))
                topic, sequence = b"kv@a@m", 0

                def moved() -> bool:
                    nonlocal sequence
                    elsewhere.send_multipart([topic, sequence.to_bytes(8, "big"), payload(100 + sequence)])
                    sequence += 1
                    return [each.replay_endpoint for each in fleet.statuses()] == [
                        f"tcp://127.0.0.9:{first.replay_port}"
                    ]

                eventually(moved)


def test_ranks_have_ports_of_their_own(fleet: Fleet) -> None:
    """A pod is known by the first of its ranks."""
    first = free_ports(2)
    with finding(fleet, f"tcp://127.0.0.1:{first}", ranks=2), engine(f"tcp://127.0.0.1:{first + 1}", "a") as second:
        second.wait_subscriber()
        second.publish(payload(1))
        eventually(lambda: said(fleet, lambda each: each.blocks) == {("m", "a", 0): 0, ("m", "a", 1): 1})


def test_an_engine_that_stays_away_is_forgotten(fleet: Fleet) -> None:
    """Not before its time, and it is found again when it comes back."""
    endpoint = here()
    with finding(fleet, endpoint, forget_seconds=1.0) as (reconciler, _):
        for _ in range(2):
            with engine(endpoint, "a", replay=False) as each:
                each.wait_subscriber()
                each.publish(payload(1))
                eventually(lambda: blocks(fleet) == {("m", "a", 0): 1})
            eventually(lambda: blocks(fleet) == {("m", "a", 0): Trust.STALE})
            assert reconciler.statuses()[0].pods == 1
            eventually(lambda: fleet.statuses() == [])


def test_topics_that_name_nobody_are_refused_and_counted(fleet: Fleet) -> None:
    """A bad topic is no pod, and others are found beside it."""
    endpoint = here()
    topics = [b"", b"kv@pod", b"other@pod@m", b"kv@\xff@m", b"kv@@m", b"kv@p\n@m"]
    with finding(fleet, endpoint) as (reconciler, _), engine(endpoint, "a", replay=False) as good:
        engines = [Publisher(topic=topic, connect=endpoint, replay=False) for topic in topics]
        try:
            for each in (*engines, good):
                each.wait_subscriber()
                each.publish(payload(1))
            eventually(lambda: reconciler.statuses()[0].refused == {"topic": len(topics)})
            eventually(lambda: blocks(fleet) == {("m", "a", 0): 1})
        finally:
            for each in engines:
                each.close()


def test_a_server_that_engines_dial_into() -> None:
    """From the configuration on, and free again at its end; what it cannot bind it says by its key."""
    endpoint = here()
    quiet = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0"}
    settings = Settings.model_validate({**quiet, "discovery": {"dial_in": {"endpoint": endpoint}}})
    server = Server(settings)
    server.start()
    try:
        with engine(endpoint, "a", replay=False) as each:
            each.wait_subscriber()
            each.publish(payload(1))
            eventually(lambda: blocks(server.fleet) == {("m", "a", 0): 1})
    finally:
        server.stop()

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(endpoint.rpartition(":")[2])))
        server = Server(settings)
        try:
            with pytest.raises(ConfigError, match=r"^discovery\.dial_in\.endpoint: .*in use"):
                server.start()
        finally:
            server.stop()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"endpoint": "ipc:///tmp/x"}, "discovery.dial_in.endpoint: must have the form"),
        ({"endpoint": "tcp://localhost:5557"}, r"discovery.dial_in.endpoint: must have \* or an IP address"),
        ({"endpoint": "tcp://*:65535"}, "discovery.dial_in.endpoint: port"),
        ({"endpoint": "tcp://*:5557", "curve": "x"}, "discovery.dial_in.endpoint: does not go with"),
    ],
)
def test_wrong_settings_are_told_by_their_key(settings: dict[str, str], key: str) -> None:
    """Before anything is bound."""
    curve = settings.pop("curve", "")
    given = {"discovery": {"dial_in": settings, "defaults": {"ranks": 2}}, "stream": {"curve_keys_file": curve}}
    with pytest.raises(ConfigError, match=key):
        load_settings(given, {}, None)
