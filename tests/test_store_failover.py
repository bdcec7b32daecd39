"""A primary of the shared store killed with SIGKILL while sentinels watch: what got lost with it is never believed."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from event_encoding import Removed, Stored, as_map, batch
from publisher import Publisher
from test_server import Process

from kvindex_server.config import StoreSettings
from kvindex_server.errors import Unavailable
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc

valkey_server = pytest.importorskip("valkey_server")

from kvindex_server.store.client import Client  # noqa: E402
from kvindex_server.store.index import StoreIndex  # noqa: E402

BLOCK = 4
BLOCKS = 40
TOKENS = list(range(1, BLOCK * BLOCKS + 1))
EXACT, STALE = 3, 4


def eventually(holds: Callable[[], object], seconds: float = 40.0) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "did not come true in time"
        time.sleep(0.02)


@pytest.fixture
def ensemble(tmp_path: Path) -> "Iterator[valkey_server.Ensemble]":
    with valkey_server.ensemble(tmp_path) as made:
        yield made


def stored(first: int, last: int) -> Stored:
    """Blocks `first` to `last` of the prompt; the engine's names for them are 1, 2 and so on."""
    parent = first - 1 if first > 1 else None
    return Stored(list(range(first, last + 1)), parent, TOKENS[(first - 1) * BLOCK : last * BLOCK], BLOCK)


LONG_LEASE: dict[str, object] = {"lease_seconds": 60, "timeout_seconds": 0.5}
"""So that nothing comes from its ordinary renewal."""


@pytest.mark.parametrize("partitions", [1, 2])
@pytest.mark.parametrize("busy", [False, True])
def test_writes_lost_with_the_primary_are_not_believed(
    ensemble: "valkey_server.Ensemble", busy: bool, partitions: int
) -> None:
    """A removal that the new primary never got: its claims are STALE until they were sent again, whoever reads.

    `busy` has the engine go on meanwhile.
    """
    settings = StoreSettings.model_validate(
        {
            "addresses": tuple(ensemble.sentinels),
            "mode": "sentinel",
            "sentinel_service": ensemble.service,
            "partitions": partitions,
            **LONG_LEASE,
        }
    )
    lose_writes(ensemble, settings, busy, partitions)


@pytest.mark.parametrize("model", ["model", "a", "b"])
def test_a_cluster_that_lost_a_primary_with_writes_is_not_believed(tmp_path: Path, model: str) -> None:
    """The same where only some partitions are at the primary that dies, whichever of them that are."""
    cluster = valkey_server.Cluster(tmp_path)
    try:
        settings = StoreSettings.model_validate(
            {"addresses": tuple(cluster.addresses), "mode": "cluster", "partitions": 4, **LONG_LEASE}
        )
        lose_writes(cluster, settings, False, None, model)
    finally:
        cluster.close()


def lose_writes(
    store: "valkey_server.Ensemble | valkey_server.Cluster",
    settings: StoreSettings,
    busy: bool,
    eras: int | None,
    model: str = "model",
) -> None:
    """Two replicas over a store whose primary dies with its last writes."""
    writer, reader = (StoreIndex(Client(settings), settings, model, BLOCK) for _ in range(2))
    stream = writer.add_stream("pod", 0)
    idle = reader.add_stream("pod", 0)  # stands by

    def ask(index: StoreIndex) -> tuple[int, int]:
        """(blocks matched, trust), in the order in which a call gets them."""
        found = index.score_tokens(b"".join(each.to_bytes(4, "little") for each in TOKENS), [], [1.0])
        return sum(each[2] for each in found), index.standing("pod", 0)[0]

    seen: set[tuple[int, int]] = set()
    away = 0
    assert writer.flush() and reader.flush()  # the first one has the lease
    writer.start()
    reader.start()
    try:
        stream.apply([batch([as_map(stored(1, BLOCKS))])])
        eventually(lambda: ask(reader) == (BLOCKS, EXACT))
        assert idle.standby
        store.cut_replication()
        stream.apply([batch([as_map(Removed([30]))])])
        eventually(lambda: ask(reader) == (29, EXACT))
        # A batch that was not confirmed would be sent again, to the new primary: nothing were lost.
        eventually(writer.flush)
        store.primary.kill()
        held = 29
        ends = time.monotonic() + 40
        while True:
            assert time.monotonic() < ends, seen
            if busy and held > 9:
                held -= 1
                stream.apply([batch([as_map(Removed([held + 1]))])])
            try:
                answers = [ask(reader), ask(writer)]
            except Unavailable:
                away += 1
                continue
            seen |= set(answers)
            if answers == [(held, EXACT)] * 2 and held in ((9, 29) if not busy else (9,)):
                break
        # 40 blocks is what the new primary was left with; 29 is right until `busy` removes more.
        assert (BLOCKS, EXACT) not in seen
        assert away
        if eras is None:  # the removal may have been in a partition of another primary
            assert writer.counts["eras"] >= 1 and reader.counts["eras"] >= 1
        else:
            assert writer.counts["lives"] == 2
            assert writer.counts["eras"] == reader.counts["eras"] == eras
        assert reader.standing("pod", 0)[0] == EXACT
        assert idle.standby
    finally:
        writer.stop()
        reader.stop()


@dataclass
class Engine:
    """One prompt's blocks come and go; how many it held without a hole, and since when."""

    publisher: Publisher
    rng: random.Random
    gone: set[int] = field(default_factory=set)
    was: list[tuple[float, int]] = field(default_factory=list)

    def begin(self) -> None:
        self.publisher.publish(batch([as_map(stored(1, BLOCKS))]))
        self.was.append((time.monotonic(), BLOCKS))

    def step(self) -> None:
        """A block is removed, or one comes back."""
        if self.gone and self.rng.random() < 0.5:
            block = self.rng.choice(sorted(self.gone))
            self.gone.remove(block)
            event: Stored | Removed = stored(block, block)
        else:
            block = self.rng.randint(2, BLOCKS)
            self.gone.add(block)
            event = Removed([block])
        self.publisher.publish(batch([as_map(event)]))
        self.was.append((time.monotonic(), self.held))

    @property
    def held(self) -> int:
        return min(self.gone, default=BLOCKS + 1) - 1

    def held_between(self, begin: float, end: float) -> set[int]:
        """Every number it held in that time."""
        before = [held for at, held in self.was if at <= begin][-1:]
        return {*before, *(held for at, held in self.was if begin <= at <= end)}


@dataclass(eq=False)
class Asker(threading.Thread):
    """Asks one replica all the time, and judges its answers."""

    address: str
    engine: Engine
    wrong: list[object] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    doubtful: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)

    LATE = 1.0
    """s that an answer may lie behind the engine: it says so itself, in `docs/store.md` (0.5 s), on a busy machine."""

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self.halt = threading.Event()

    def run(self) -> None:
        with grpc.insecure_channel(self.address) as channel:
            stub = rpc.KVIndexStub(channel)
            request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=TOKENS))
            while not self.halt.wait(0.01):
                began = time.monotonic()
                try:
                    (score,) = stub.Score(request, timeout=5).scores
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        self.wrong.append(error.code())
                    self.refused.append(began)
                    continue
                ended = time.monotonic()
                if score.trust != pb.TRUST_EXACT:
                    self.doubtful.append(began)
                    continue
                self.exact.append(began)
                held = self.engine.held_between(began - self.LATE, ended)
                if score.matched_blocks not in held:
                    self.wrong.append((began, score.matched_blocks, held))


def replica(ensemble: "valkey_server.Ensemble", publisher: Publisher) -> Process:
    pod = {"pod": "pod-a", "model": "m", "endpoint": publisher.endpoint, "replay_endpoint": publisher.replay_endpoint}
    return Process(
        env={
            "KVINDEX_STORE__ADDRESSES": json.dumps(ensemble.sentinels),
            "KVINDEX_STORE__MODE": "sentinel",
            "KVINDEX_STORE__SENTINEL_SERVICE": ensemble.service,
            "KVINDEX_STORE__LEASE_SECONDS": "2",
            "KVINDEX_PODS": json.dumps([pod]),
            "KVINDEX_MODELS": json.dumps([{"name": "m", "block_size": BLOCK}]),
        }
    )


def test_two_servers_go_on_with_the_new_primary(tmp_path: Path) -> None:
    """Two failovers under load, the second one without the last writes: degraded meanwhile, right afterwards."""
    with valkey_server.ensemble(tmp_path, down_after_ms=1500) as ensemble, Publisher() as publisher:
        engine = Engine(publisher, random.Random(4))
        engine.begin()
        servers = [replica(ensemble, publisher) for _ in range(2)]
        askers = [Asker(each.grpc, engine) for each in servers]
        try:
            for asker in askers:
                asker.start()

            def run_until(holds: Callable[[], bool]) -> None:
                ends = time.monotonic() + 60
                while not holds():
                    assert time.monotonic() < ends, "did not come true in time"
                    engine.step()
                    time.sleep(0.02)

            run_until(lambda: all(len(each.exact) > 50 for each in askers))
            for losing in (False, True):
                if losing:
                    ensemble.cut_replication()
                    now = time.monotonic()
                    run_until(lambda now=now: time.monotonic() > now + 0.3)  # type: ignore[misc]
                killed = time.monotonic()
                ensemble.primary.kill()
                run_until(lambda: all(each.scrape("/readyz")[0] == 503 for each in servers))
                ensemble.promoted()
                run_until(lambda: all(each.scrape("/readyz")[0] == 200 for each in servers))
                back = time.monotonic()
                run_until(lambda back=back: all(sum(at > back for at in each.exact) > 50 for each in askers))  # type: ignore[misc]
                for each in askers:
                    assert any(at > killed for at in each.refused)
                if not losing:
                    ensemble.swap()
            for asker in askers:
                assert asker.wrong == []
                assert asker.doubtful
        finally:
            for asker in askers:
                asker.halt.set()
            for asker in askers:
                asker.join(10)
            for server in servers:
                server.end()
