"""Replicas as processes that compare what they hold: what differs is shown, and made equal by nobody's mere word."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import msgpack
import pytest
from publisher import free_port
from slow_proxy import SlowProxy
from test_processes import EngineProcess, ServerProcess, agrees, blocks, engine_of, eventually, running

from kvindex_server import siblings
from kvindex_server._core import Index
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc
from kvindex_server.peers import Peers, resolve
from kvindex_server.snapshot import File, Writer


class Replica(ServerProcess):
    """A server with peers, whose metrics can be read."""

    def __init__(
        self, listen: str, peers: list[str], pods: list[dict[str, object]], directory: Path | None = None
    ) -> None:
        env = {**os.environ, "KVINDEX_PODS": json.dumps(pods), "KVINDEX_SNAPSHOT__COMPARE_SECONDS": "0.2"}
        env |= {"KVINDEX_SNAPSHOT__PEERS": json.dumps(peers), "KVINDEX_STREAM__REARM_SECONDS": "0.1"}
        if directory is not None:
            env["KVINDEX_SNAPSHOT__DIRECTORY"] = str(directory)
        command = [sys.executable, "-m", "kvindex_server", "serve", "--listen", listen]
        self._popen = subprocess.Popen(
            [*command, "--metrics-listen", "127.0.0.1:0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        assert self._popen.stdout is not None
        found = re.search(r"grpc=(\S+) metrics=(\S+)", self._popen.stdout.readline())
        assert found is not None
        self._channel = grpc.insecure_channel(found[1])
        self._read, self._admin = rpc.KVIndexStub(self._channel), rpc.KVIndexAdminStub(self._channel)
        self._metrics = found[2]

    def metric(self, name: str) -> dict[str, float]:
        """By label."""
        with urllib.request.urlopen(f"http://{self._metrics}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = (re.fullmatch(rf'{name}{{\w+="([^"]+)"}} (\S+)', line) for line in lines)
        return {match[1]: float(match[2]) for match in found if match}

    def agrees_with(self, peer: str) -> bool:
        """The last comparison with it found no difference."""
        compared = self.metric("kvindex_replica_compared_streams").get(peer, 0)
        return compared > 0 and self.metric("kvindex_replica_divergence_blocks") == {peer: 0}


def test_a_late_comer_takes_over_what_it_missed(pod: dict[str, object]) -> None:
    """The engine has forgotten its first messages; the sibling has not, and the engine confirms its last one."""
    first_listen, second_listen = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    engine = EngineProcess(str(pod["endpoint"]), str(pod["replay_endpoint"]), 21, buffer_steps=300)
    with running(engine):
        first = Replica(first_listen, [second_listen], [])
        second = Replica(second_listen, [first_listen], [])
        with running(first), running(second):
            first.register(pod)
            engine.load(600)
            told = engine.tell("drain")
            eventually(lambda: agrees(first, told, set()))
            second.register(pod)  # what it pulled at its start was empty
            eventually(lambda: second.metric("kvindex_replica_repairs_total").get("adopt", 0) > 0)
            told = engine.load(int(str(told["published"])) + 300)
            told = engine.tell("drain")
            eventually(lambda: agrees(second, told, set()) and agrees(first, told, set()))
            eventually(lambda: first.agrees_with(second_listen) and second.agrees_with(first_listen))
            assert first.metric("kvindex_replica_repairs_total") == {"adopt": 0, "doubt": 0}


def spoilt(data: bytes, path: Path, directory: Path, keep: set[int]) -> int:
    """A snapshot as if blocks had got lost on the way, checksums and all; how many are missing."""
    path.write_bytes(data)
    file = File(path)
    (place,) = file.streams
    saved = file.read(place)
    stream = Index(0).add_stream("pod", 0)
    assert stream.restore(saved.state)
    stream.apply([msgpack.packb([0.0, [["BlockRemoved", sorted(keep), "GPU"]], 0])])
    missing = saved.claims - stream.claims
    directory.mkdir()
    writer = Writer(directory / "00000000000000000001.kvix")
    fields = {name: getattr(saved, name) for name in saved.__slots__}
    writer.stream(type(saved)(**{**fields, "state": stream.snapshot(), "claims": stream.claims}))
    writer.close()
    file.close()
    return missing


def test_two_that_are_sure_and_differ_ask_the_engine(pod: dict[str, object], tmp_path: Path) -> None:
    """A seeded loss that no check of one replica alone can find: shown, doubted by both, gone after a replay."""
    first_listen, second_listen = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    engine = engine_of(pod, seed=22)
    with running(engine):
        first = Replica(first_listen, [second_listen], [pod])  # nobody is there yet
        with running(first):
            engine.load(600)
            told = engine.tell("drain")
            eventually(lambda: agrees(first, told, set()))
            whole = first._admin.PullSnapshot(pb.PullSnapshotRequest(), timeout=10)
            data = b"".join(each.data for each in whole)
            lost = set(sorted(blocks(told, "resident"))[:5])
            missing = spoilt(data, tmp_path / "pulled", tmp_path / "kept", lost)
            assert missing == 5
            proxy = SlowProxy(int(first_listen.rpartition(":")[2]))
            proxy.held.set()  # so that the second one starts from its own directory
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("KVINDEX_SNAPSHOT__PEER_TIMEOUT_SECONDS", "1")
                second = Replica(second_listen, [proxy.address], [pod], tmp_path / "kept")
            with running(second):
                eventually(lambda: first.metric("kvindex_replica_repairs_total").get("doubt", 0) > 0)
                proxy.held.clear()
                eventually(lambda: second.metric("kvindex_replica_repairs_total").get("doubt", 0) > 0)
                eventually(lambda: agrees(second, told, set()) and agrees(first, told, set()))
                eventually(lambda: first.agrees_with(second_listen) and second.agrees_with(proxy.address))
            proxy.close()


def test_a_name_stands_for_all_its_addresses_and_the_replica_itself_is_left_out(pod: dict[str, object]) -> None:
    """As behind a headless Service: the other one is compared, the own address is not, whatever it is called."""
    port = free_port()
    listen, other_listen = f"127.0.0.1:{port}", f"127.0.0.2:{free_port('127.0.0.2')}"
    assert (listen, "localhost") in set(resolve(f"localhost:{port}"))
    engine = engine_of(pod, seed=23)
    with running(engine):
        other = Replica(other_listen, [], [pod])
        with running(other):
            one = Replica(listen, [f"localhost:{port}", other_listen], [pod])
            with running(one):
                engine.load(300)
                told = engine.tell("drain")
                eventually(lambda: agrees(one, told, set()) and agrees(other, told, set()))
                eventually(lambda: one.metric("kvindex_replica_compared_streams").get(other_listen, 0) == 1)
                assert listen not in one.metric("kvindex_replica_compared_streams")
                assert one.agrees_with(other_listen)


class Told:
    """A fleet of which nothing is known."""

    def sides(self) -> Iterator[object]:
        return iter(())


def test_a_peer_that_is_away_is_not_one_that_agrees() -> None:
    """It has no divergence, rather than none; a name without addresses is no peer."""

    def by_rule(address: str) -> list[tuple[str, str]]:
        if address.startswith("gone"):
            raise OSError("no such name")
        return [(address, "")]

    away = f"127.0.0.1:{free_port()}"
    peers = Peers([away, "gone:1"], timeout=1.0, resolve=by_rule)
    made = siblings.Siblings(Told(), peers, "me", 1.0)  # type: ignore[arg-type]
    made.compare_now()
    assert made.states == [siblings.PeerState(away, 0, None)]


def test_a_peer_that_tells_nothing_does_not_end_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer without a single message, as of another kind of server, is one peer's alone."""

    class Silent:
        def __init__(self, _channel: object) -> None: ...

        def PullDigests(self, *_: object, **__: object) -> Iterator[object]:
            return iter(())

    monkeypatch.setattr(siblings.rpc, "KVIndexAdminStub", Silent)
    addresses = [f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"]
    made = siblings.Siblings(Told(), Peers(addresses, timeout=1.0), "me", 1.0)  # type: ignore[arg-type]
    made.compare_now()
    assert made.states == [siblings.PeerState(each, 0, None) for each in addresses]
