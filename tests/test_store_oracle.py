"""The contract of the native index, kept by the index in a shared store with a real Valkey behind it."""

import random
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from event_encoding import Removed, Stored, as_map, batch
from oracle import ModelOracle, normal
from test_index_oracle import BLOCK, Fleet, token_bytes, words
from test_placements import PlacingFleet

from kvindex_server.config import StoreSettings

valkey_server = pytest.importorskip("valkey_server")

from kvindex_server.store.client import Client  # noqa: E402
from kvindex_server.store.index import StoreIndex  # noqa: E402


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[valkey_server.Valkey]":
    with valkey_server.valkey(tmp_path_factory.mktemp("valkey")) as started:
        yield started


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[valkey_server.Valkey]":
    directory: Path = tmp_path_factory.mktemp("cluster")
    with valkey_server.valkey(directory, "--cluster-enabled", "yes") as started:
        client = started.client()
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO"):
            pass
        yield started


class SharedIndex(StoreIndex):
    """Asked only when everything is in the store."""

    def _read(self, keys: bytes, *, prefix: bool, everywhere: bool = False):  # type: ignore[no-untyped-def]
        assert self.flush()
        return super()._read(keys, prefix=prefix, everywhere=everywhere)

    def advance_clock(self, seconds: float) -> None:
        """Every placement ends so much earlier: as if that time had passed in the store."""
        passed = int(seconds * 1000)
        store = self._client._redis
        for tag in self._tags:
            begin = tag.encode()
            for name in store.scan_iter(match=begin.replace(b"{", b"\\{") + b"[pw]*"):
                value = store.get(name)
                left = store.pttl(name) - passed
                if left <= 0:
                    store.delete(name)
                elif name == begin + b"w":
                    store.set(name, int(value) - passed, px=left)
                else:
                    entries = [struct.unpack("<6s6sB", value[at : at + 13]) for at in range(0, len(value), 13)]
                    earlier = [
                        struct.pack(
                            "<6s6sB", life, (int.from_bytes(end, "little") - passed).to_bytes(6, "little"), guess
                        )
                        for life, end, guess in entries
                    ]
                    store.set(name, b"".join(earlier), px=left)
            for second, blocks in store.hgetall(tag + "c").items():
                store.hdel(tag + "c", second)
                store.hincrby(tag + "c", int(second) - passed // 1000, int(blocks))


class SharedFleet(Fleet):
    """The same random operations over a shared store, read by another replica than the one that writes."""

    def __init__(self, seed: int, settings: StoreSettings, model: str) -> None:
        super().__init__(seed)
        size = 0 if seed % 2 else BLOCK
        self.index = SharedIndex(Client(settings), settings, model, size, self.hash_seed)  # type: ignore[assignment]
        self.oracle = ModelOracle(size, self.hash_seed)
        self.engines = [self.engine(pod, rank) for pod, rank in (("a:1", 0), ("a:1", 1), ("b:1", 0), ("c", 0))]
        self.reader = StoreIndex(Client(settings), settings, model, size, self.hash_seed)

    def read_elsewhere(self) -> None:
        """A replica that writes nothing says the same."""
        assert self.index.flush()  # type: ignore[attr-defined]
        keys = words(sorted(self.oracle.holders()))
        got = self.reader.holders(keys, [])
        own = self.index.holders(keys, [])
        name, other = self.reader.tiers, self.index.tiers
        assert [{(p, r, name[t], g, s) for p, r, t, g, s in each} for each in got] == [
            {(p, r, other[t], g, s) for p, r, t, g, s in each} for each in own
        ]
        assert self.reader.block_size in (0, self.index.block_size)
        self.ask_by_hashes()

    def ask_by_hashes(self) -> None:
        """By the engines' own names for the blocks, asked elsewhere: each replica answers for what it writes."""
        named = {normal(value) for engine in self.engines for _, _, value in engine.oracle.counts}
        numbers = [12345, *(each for each in named if isinstance(each, int))]
        names = [b"unknown", *(each for each in named if isinstance(each, bytes))]
        ends = threading.Event()

        def look() -> None:
            while not ends.wait(0.01):
                self.index.renew()  # type: ignore[attr-defined]

        looking = threading.Thread(target=look)
        looking.start()
        try:
            got = self.reader.holders_of_ints(words(numbers), []) + self.reader.holders_of_bytes(names, [])
            of_one = self.reader.holders_of_ints(words(numbers), ["a:1"])
        finally:
            ends.set()
            looking.join()
        own = self.index.holders_of_ints(words(numbers), []) + self.index.holders_of_bytes(names, [])
        assert [key for key, _ in got] == [key for key, _ in own]
        tiers = self.reader.tiers
        for value, (_, holders) in zip((*numbers, *names), got, strict=True):
            told = {(pod, rank, tiers[bit], group, speculative) for pod, rank, bit, group, speculative in holders}
            assert told == self.oracle.holders_of_hash(value)
        for (_, holders), (_, of_pod) in zip(got, of_one, strict=False):
            assert of_pod == [each for each in holders if each[0] == "a:1"]


class SharedPlacingFleet(PlacingFleet, SharedFleet):
    """And a router that records where it sends its prompts."""

    def audit(self) -> None:
        """What this replica knows of the counts; nobody counts what a store forgets."""
        super(PlacingFleet, self).audit()
        counts = self.index.placements
        assert set(counts) == {"recorded", "renewed", "confirmed", "refused"}
        for what, blocks in counts.items():
            assert blocks == self.oracle.counts[what], what


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("seed", range(12))
def test_random_placements_agree_with_the_oracle(server: "valkey_server.Valkey", seed: int, partitions: int) -> None:
    """What routers record counts for every replica, until the engine's events or its time end it."""
    settings = StoreSettings(addresses=(server.address,), partitions=partitions, batch_blocks=7)
    fleet = SharedPlacingFleet(seed, settings, f"placed-{seed}-{partitions}")
    for step in range(80):
        fleet.step()
        fleet.audit()
        if step % 6 == 0:
            fleet.read_elsewhere()


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("seed", range(12))
def test_random_operations_agree_with_the_oracle(server: "valkey_server.Valkey", seed: int, partitions: int) -> None:
    """Whatever engines announce, answers out of the store are those of the slow model, for every replica."""
    settings = StoreSettings(addresses=(server.address,), partitions=partitions, batch_blocks=7)
    fleet = SharedFleet(seed, settings, f"model-{seed}-{partitions}")
    for step in range(60):
        fleet.step()
        fleet.audit()
        if step % 6 == 0:
            fleet.read_elsewhere()
    for engine in fleet.engines:
        assert engine.native.close() == len(engine.oracle.counts)
    fleet.index.flush()  # type: ignore[attr-defined]
    while fleet.index.sweep():  # type: ignore[attr-defined]
        pass
    left = [key for tag in fleet.index._tags for key in fleet.index._client.blocks(tag)]  # type: ignore[attr-defined]
    assert left == []


def test_a_cluster_says_the_same(cluster: "valkey_server.Valkey") -> None:
    """Partitions lie in slots of their own, and one question asks all of them."""
    settings = StoreSettings(addresses=(cluster.address,), mode="cluster", partitions=4)
    fleet = SharedFleet(3, settings, "model")
    for _ in range(40):
        fleet.step()
        fleet.audit()
    fleet.read_elsewhere()


def test_a_hole_ends_a_reading_but_not_a_sliding_window(server: "valkey_server.Valkey") -> None:
    """Groups of sliding windows need only the end of a prompt: a hole before it must not hide it."""
    settings = StoreSettings(addresses=(server.address,))
    index = SharedIndex(Client(settings), settings, "windows", BLOCK)
    simple, windowed = index.add_stream("simple", 0), index.add_stream("windowed", 0)
    tokens = list(range(1, BLOCK * 6 + 1))
    hashes = [1, 2, 3, 4, 5, 6]
    simple.apply([batch([as_map(Stored(hashes, None, tokens, BLOCK)), as_map(Removed([2]))])])
    assert [found[:3] for found in index.score_tokens(token_bytes(tokens), [], [1.0])] == [("simple", 0, 1)]
    stored = Stored(hashes, None, tokens, BLOCK, group=0, kind="sliding_window", window=BLOCK + 1)
    windowed.apply([batch([as_map(stored), as_map(Removed([1, 2, 3, 4, 5], None, 0))])])
    found = {pod: blocks for pod, _, blocks, *_ in index.score_tokens(token_bytes(tokens), [], [1.0])}
    assert found == {"simple": 1, "windowed": 6}


def test_changes_that_nobody_took_are_sent_anew(server: "valkey_server.Valkey") -> None:
    """A stream that changed too much while the store was away begins again with all it holds."""
    settings = StoreSettings(addresses=(server.address,), max_changes=1024)
    index = SharedIndex(Client(settings), settings, "lost", BLOCK)
    stream = index.add_stream("p", 0)
    assert index.flush()
    rng = random.Random(1)
    tokens = [rng.randrange(2**32) for _ in range(BLOCK * 1500)]
    stream.apply([batch([as_map(Stored(list(range(1, 1501)), None, tokens, BLOCK))])])
    while not index.flush():
        pass
    assert index.counts["lives"] == 2
    assert [found[2] for found in index.score_tokens(token_bytes(tokens), [], [1.0])] == [1500]
