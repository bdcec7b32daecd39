"""A new replica pulls from siblings by name and over connections that break, between real server processes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from cutting_proxy import CuttingProxy
from event_encoding import Removed, Stored, as_map, batch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from names import Names
from oracle import query_keys
from publisher import Publisher, free_port
from test_processes import eventually

from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc
from kvindex_server.peers import Peers

BLOCK = 4
CHAIN = 2048
CHAINS = 100
MIB = 1 << 20


class Replica:
    """A server process with its log."""

    def __init__(self, listen: str, *, env: dict[str, str], **settings: object) -> None:
        told = {f"KVINDEX_SNAPSHOT__{name.upper()}": value for name, value in settings.items()}
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "kvindex_server", "serve", "--listen", listen, "--metrics-listen", "127.0.0.1:0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **env, **{name: json.dumps(value).strip('"') for name, value in told.items()}},
        )
        assert self._popen.stdout is not None
        self.log: list[dict[str, object]] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        found = re.search(r"listening grpc=(\S+)", self._popen.stdout.readline())
        assert found is not None, self.log
        self.port = int(found[1].rpartition(":")[2])
        self._channel = grpc.insecure_channel(found[1], [("grpc.max_receive_message_length", 64 * MIB)])
        self.read, self.admin = rpc.KVIndexStub(self._channel), rpc.KVIndexAdminStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def _read_log(self) -> None:
        assert self._popen.stderr is not None
        for line in self._popen.stderr:
            self.log.append(json.loads(line) if line.startswith("{") else {"event": line})

    @property
    def is_ready(self) -> bool:
        status = self._health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=20).status
        return status == health_pb2.HealthCheckResponse.SERVING

    @property
    def memory(self) -> int:
        """Bytes that the process has in memory."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self._popen.pid}/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    def events(self, event: str) -> list[dict[str, object]]:
        return [each for each in self.log if each["event"] == event]

    def kill(self) -> None:
        self._channel.close()
        self._popen.send_signal(signal.SIGKILL)
        self._popen.wait()
        self._reader.join(10)


class Engine:
    """A rank that stored a lot, and whose last few messages are all it still replays."""

    def __init__(self) -> None:
        self.publisher = Publisher()
        self.rng = random.Random(1)
        self.held: dict[int, int] = {}
        """Engine hash -> our key of every block it holds; each is stored once, and not again."""
        self.history: list[tuple[int, bytes]] = []
        self._next = 1

    def say(self, event: Stored | Removed) -> None:
        payload = batch([as_map(event)])
        self.history.append((self.publisher.publish(payload), payload))

    def store(self, blocks: int = CHAIN) -> None:
        tokens = [self.rng.randrange(2**31) for _ in range(blocks * BLOCK)]
        hashes = list(range(self._next, self._next + blocks))
        self._next += blocks
        self.held |= dict(zip(hashes, query_keys(tokens, BLOCK), strict=True))
        self.say(Stored(hashes, None, tokens, BLOCK))

    def go_on(self) -> None:
        """Blocks come and go."""
        gone = self.rng.sample(sorted(self.held), 500)
        for each in gone:
            del self.held[each]
        self.say(Removed(gone))
        self.store(64)

    def register(self, replica: Replica) -> None:
        replica.admin.RegisterPod(
            pb.RegisterPodRequest(
                pod="pod",
                model="m",
                endpoint=self.publisher.endpoint,
                replay_endpoint=self.publisher.replay_endpoint,
                block_size=BLOCK,
            ),
            wait_for_ready=True,
            timeout=20,
        )

    def is_known_to(self, replica: Replica) -> bool:
        """EXACT up to the last message."""
        streams = replica.admin.ListPods(pb.ListPodsRequest(), wait_for_ready=True, timeout=20).streams
        found = [(each.trust, each.last_sequence) for each in streams]
        return found == [(pb.TRUST_EXACT, self.publisher.next_sequence - 1)]

    def agrees(self, replica: Replica) -> bool:
        """Of every block ever named it knows what the engine holds, and under the key that the oracle gives it."""
        for begin in range(1, self._next, 100_000):
            asked = range(begin, min(begin + 100_000, self._next))
            request = pb.GetPodsForBlocksRequest(model="m", engine_hashes=pb.EngineHashes(ints=asked))
            answer = replica.read.GetPodsForBlocks(request, wait_for_ready=True, timeout=60)
            held = {value: found.key for value, found in zip(asked, answer.blocks, strict=True) if found.holders}
            if held != {each: self.held[each] for each in asked if each in self.held}:
                return False
        return True


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine()
    for _ in range(CHAINS):
        made.store()
    with made.publisher:
        yield made


@contextmanager
def started(listen: str, *, env: dict[str, str] | None = None, **settings: object) -> Iterator[Replica]:
    made = Replica(listen, env=env or {}, **settings)
    try:
        yield made
    finally:
        made.kill()


@contextmanager
def sibling(engine: Engine, listen: str = "127.0.0.1:0", **settings: object) -> Iterator[tuple[Replica, int]]:
    """A replica that knows everything, while the engine no longer does, and the port it is at."""
    if listen.endswith(":0"):
        listen = f"127.0.0.1:{free_port()}"
    engine.publisher.buffer[:] = engine.history
    with started(listen, **settings) as made:
        engine.register(made)
        eventually(lambda: engine.is_known_to(made))
        del engine.publisher.buffer[:-3]
        yield made, int(listen.rpartition(":")[2])


def is_right(engine: Engine, replica: Replica) -> None:
    """EXACT and equal to the oracle, now and after more has happened."""
    eventually(lambda: engine.is_known_to(replica) and replica.is_ready)
    assert engine.agrees(replica)
    engine.go_on()
    eventually(lambda: engine.is_known_to(replica))
    assert engine.agrees(replica)


def one(events: list[dict[str, object]]) -> dict[str, object]:
    (found,) = events
    return found


@pytest.mark.parametrize("silent", [False, True])
def test_a_cut_connection_is_taken_up_at_its_offset(engine: Engine, silent: bool) -> None:
    """TCP cut twice in the middle (or gone silent once): what was here is not sent again, and the state is right."""
    cuts = [MIB * 3 // 2] if silent else [MIB * 3 // 2, MIB * 5 // 4]
    with sibling(engine) as (_, port):
        proxy = CuttingProxy(port, cuts, silent=silent)
        try:
            with started("127.0.0.1:0", peers=[proxy.address]) as new:
                is_right(engine, new)
                pulled = one(new.events("snapshot pulled"))
                broken = [each["bytes"] for each in new.events("transfer of a snapshot broke")]
        finally:
            proxy.close()
    assert pulled["resumed"] == len(cuts)
    assert broken == [MIB, 2 * MIB][: len(cuts)]  # whole parts are kept
    assert proxy.passed[: len(cuts)] == cuts
    size = int(str(pulled["bytes"]))
    assert size > 3 * MIB
    assert size - len(cuts) * MIB <= proxy.passed[len(cuts)] < size - len(cuts) * MIB + 100_000


def test_a_snapshot_that_is_gone_meanwhile_is_not_spliced(engine: Engine, tmp_path: Path) -> None:
    """The sibling has written newer ones and keeps one: the transfer begins anew, with nothing of the old file."""
    with sibling(engine, directory=str(tmp_path), interval_seconds=3600, keep=1) as (old, port):

        def overtaken() -> None:
            engine.go_on()
            eventually(lambda: engine.is_known_to(old))
            call = old.admin.PullSnapshot(pb.PullSnapshotRequest(), timeout=30)
            assert next(call).id
            call.cancel()

        proxy = CuttingProxy(port, [MIB * 5 // 2], on_cut=overtaken)
        try:
            with started("127.0.0.1:0", peers=[proxy.address]) as new:
                is_right(engine, new)
                pulled = one(new.events("snapshot pulled"))
                assert [each["bytes"] for each in new.events("transfer of a snapshot broke")] == [2 * MIB]
        finally:
            proxy.close()
    assert len(proxy.passed) >= 3  # cut, told that it is gone, and again from the start
    assert proxy.passed[-1] >= int(str(pulled["bytes"])) > 3 * MIB


def test_a_name_stands_for_its_addresses_and_the_own_one_is_not_asked(engine: Engine, tmp_path: Path) -> None:
    """As behind a headless Service: the replica itself, one that is away, and one that has the state."""
    port = free_port("127.0.0.2", "127.0.0.3", "127.0.0.4")
    names = Names(tmp_path)
    names.set({"replicas.test": ["127.0.0.2", "127.0.0.3", "127.0.0.4"]})
    peers = [f"replicas.test:{port}"]
    with sibling(engine, f"127.0.0.4:{port}"), started(f"127.0.0.2:{port}", env=names.env, peers=peers) as new:
        is_right(engine, new)
        assert one(new.events("snapshot pulled"))["peer"] == f"127.0.0.4:{port}"
        # Asking its own port, which does not answer yet, would cost 2 s.
        assert [each["peer"] for each in new.events("peer gave no snapshot")] == [f"127.0.0.3:{port}"]
    assert names.asked >= 1


def test_a_name_is_resolved_anew_when_a_transfer_is_lost(engine: Engine, tmp_path: Path) -> None:
    """The sibling is replaced half way: its successor is at another address, and gives another file."""
    names = Names(tmp_path)
    with sibling(engine) as (_, port):

        def replaced() -> None:
            """The address is gone for good; the name has a new one."""
            names.set({"replicas.test": ["127.0.0.5"]})
            threading.Thread(target=first.close, daemon=True).start()

        at = free_port("127.0.0.5")
        first = CuttingProxy(port, [MIB * 5 // 2], listen=f"127.0.0.1:{at}", on_cut=replaced)
        names.set({"replicas.test": ["127.0.0.1"]})
        with forwarded(f"127.0.0.5:{at}", port):
            try:
                with started("127.0.0.1:0", env=names.env, peers=[f"replicas.test:{at}"]) as new:
                    is_right(engine, new)
                    pulled = one(new.events("snapshot pulled"))
            finally:
                first.close()
    assert pulled["peer"] == f"127.0.0.5:{at}"
    assert pulled["resumed"] == 0
    assert names.asked >= 2


@contextmanager
def forwarded(listen: str, port: int) -> Iterator[None]:
    """The same server at another address."""
    proxy = CuttingProxy(port, [], listen=listen)
    try:
        yield
    finally:
        proxy.close()


def test_a_slow_puller_costs_the_sibling_no_memory(tmp_path: Path) -> None:
    """Sent as fast as it is read: of a snapshot of 512 MiB nothing piles up while the other side stands still."""
    size = 512 * MIB
    with (tmp_path / f"{1:020d}.kvix").open("wb") as file:
        file.truncate(size)  # what is in it does not matter to who sends it
    with started(f"127.0.0.1:{free_port()}", directory=str(tmp_path), interval_seconds=3600) as replica:
        proxy = CuttingProxy(replica.port, [])
        channel = grpc.insecure_channel(proxy.address, [("grpc.max_receive_message_length", 4 * MIB)])
        try:
            before = replica.memory
            request = pb.PullSnapshotRequest(id=f"{1:020d}")
            call = rpc.KVIndexAdminStub(channel).PullSnapshot(request, timeout=60)
            assert next(call).total == size
            last, most = -1, 0
            while proxy.passed[0] != last:  # until nothing moves any more
                last = proxy.passed[0]
                time.sleep(1.0)
                most = max(most, replica.memory)
            assert last < 64 * MIB
            assert most - before < 64 * MIB
            assert sum(len(each.data) for each in call) == size  # and it goes on when it is read
        finally:
            channel.close()
            proxy.close()


def test_a_name_without_addresses_is_a_cold_start(tmp_path: Path) -> None:
    """The first replica of a headless Service: no records yet, nothing to wait for."""
    names = Names(tmp_path)
    names.set({"replicas.test": []})
    with started("127.0.0.1:0", env=names.env, peers=["replicas.test:50051"]) as new:
        eventually(lambda: bool(new.events("ready")))
        assert one(new.events("peers not found"))["peer"] == "replicas.test:50051"


@pytest.mark.parametrize(
    ("own", "address", "is_own"),
    [
        ("127.0.0.1:5", "127.0.0.1:5", True),
        ("127.0.0.1:5", "127.0.0.2:5", False),
        ("127.0.0.1:5", "127.0.0.1:6", False),
        ("0.0.0.0:5", "127.0.0.2:5", True),
        ("0.0.0.0:5", "192.0.2.1:5", False),
        ("[::]:5", "[::1]:5", True),
        ("[::]:5", "127.0.0.1:5", True),
        ("[::]:5", "[2001:db8::1]:5", False),
        ("unix:/a", "127.0.0.1:5", False),
        ("unix:/a", "unix:/a", True),
        ("", "127.0.0.1:5", False),
    ],
)
def test_own_addresses_are_known(own: str, address: str, is_own: bool) -> None:
    """By where this replica listens; everywhere means every address of the machine."""
    peers = Peers([address], 1.0, own=own, resolve=lambda each: [(each, "")])
    assert peers.found() == ([] if is_own else [(address, "")])
