"""The shared store in a cluster of three primaries: slots that move, streams that are taken out, a user's rights."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from event_encoding import Removed, as_map, batch

valkey_server = pytest.importorskip("valkey_server")
from test_store_failover import BLOCK, EXACT, STALE, TOKENS, Engine, eventually  # noqa: E402
from test_store_faults import documented_rights, matches, replica, settle, stored, tokens_of  # noqa: E402

from kvindex_server._core import block_keys  # noqa: E402
from kvindex_server.errors import Unavailable  # noqa: E402
from kvindex_server.store.client import StoreAway  # noqa: E402
from kvindex_server.store.index import StoreIndex  # noqa: E402

PROMPT = b"".join(each.to_bytes(4, "little") for each in TOKENS)


@pytest.fixture
def cluster(tmp_path: Path) -> "Iterator[valkey_server.Cluster]":
    made = valkey_server.Cluster(tmp_path)
    try:
        yield made
    finally:
        made.close()


def member(cluster: "valkey_server.Cluster", **more: object) -> StoreIndex:
    more = {"partitions": 4, "timeout_seconds": 1.0, "lease_seconds": 5, **more}
    return replica(cluster.addresses[0], mode="cluster", addresses=tuple(cluster.addresses), **more)


class Moving:
    """An engine whose blocks come and go, two replicas, and what they say of it."""

    def __init__(self, cluster: "valkey_server.Cluster") -> None:
        self.writer, self.reader = member(cluster), member(cluster)
        stream = self.writer.add_stream("pod", 0)
        self.reader.add_stream("pod", 0)
        assert self.writer.flush() and self.reader.flush()
        self.publish: Callable[[bytes], object] = lambda payload: stream.apply([payload])
        self.engine = Engine(self, random.Random(4))  # type: ignore[arg-type]
        self.exact = self.doubtful = self.refused = 0

    def ask(self, index: StoreIndex) -> None:
        began = time.monotonic()
        try:
            found = index.score_tokens(PROMPT, [], [1.0])
            trust = index.standing("pod", 0)[0]
        except Unavailable:
            self.refused += 1
            return
        self.doubtful += trust == STALE
        if trust != EXACT:
            return
        self.exact += 1
        held = self.engine.held_between(began - 1.0, time.monotonic())
        assert sum(each[2] for each in found) in held

    def go_on(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            self.engine.step()
            self.ask(self.reader)
            self.ask(self.writer)
            time.sleep(0.005)

    def until_exact(self) -> None:
        before = self.exact
        eventually(lambda: self.go_on(0.1) or self.exact > before + 20)


@pytest.mark.parametrize("at_once", [False, True])
def test_slots_move_under_load(cluster: "valkey_server.Cluster", at_once: bool) -> None:
    """Key by key, a key that is elsewhere must not be taken for none: no answer, or a right one, or a doubtful one."""
    moving = Moving(cluster)
    moving.engine.begin()
    moving.writer.start()
    moving.reader.start()
    try:
        moving.until_exact()
        for tag in moving.writer._tags[:2]:
            slot = cluster.primary.client().execute_command("CLUSTER", "KEYSLOT", f"{tag}q")
            if at_once:
                try:
                    cluster.move_at_once(slot)
                except valkey_server.redis.ResponseError:
                    pytest.skip("this server moves slots key by key only")
                moving.until_exact()
                continue
            refused = moving.refused
            source, target = cluster.begin_move(slot)
            moving.go_on(0.3)
            while keys := cluster.keys_left(slot, source, 5):
                cluster.move_keys(keys, source, target)
                moving.go_on(0.1)
            assert moving.refused > refused
            cluster.end_move(slot, target)
            moving.until_exact()
        assert moving.doubtful
        # And what is there now is what the engine holds, not only what it is said to hold.
        eventually(lambda: matches(moving.reader, block_keys(PROMPT, BLOCK)) == {"pod": moving.engine.held})
        assert moving.writer.counts["lives"] == 1
    finally:
        moving.writer.stop()
        moving.reader.stop()


@pytest.mark.parametrize("first", ["q", "qb", "qao", "qnov"])
def test_a_partition_of_which_a_part_has_moved_is_left_alone(cluster: "valkey_server.Cluster", first: str) -> None:
    """Whatever kinds of keys are there first: nothing is lost that another stream holds, and nothing answered."""
    index = member(cluster, partitions=1)
    tokens, keys = tokens_of(1, 4)
    one, other = index.add_stream("one", 0), index.add_stream("other", 0)
    for stream in (one, other):
        stream.apply([stored(tokens)])
    settle(index)
    assert matches(index, keys) == {"one": 4, "other": 4}
    (tag,) = index._tags
    slot = cluster.primary.client().execute_command("CLUSTER", "KEYSLOT", f"{tag}q")
    source, target = cluster.begin_move(slot)
    early = [key for key in cluster.keys_left(slot, source) if chr(key[len(tag)]) in first]
    assert early
    cluster.move_keys(early, source, target)
    one.apply([batch([as_map(Removed([4]))])])
    for step in (index.flush, index.renew, lambda: matches(index, keys), lambda: index.place("one", 0, keys, 1.0)):
        with pytest.raises(StoreAway):
            step()
    cluster.move_keys(cluster.keys_left(slot, source), source, target)
    with pytest.raises(StoreAway):
        matches(index, keys)
    cluster.end_move(slot, target)
    settle(index)
    assert matches(index, keys) == {"one": 3, "other": 4}
    index.renew()
    assert [index.standing(pod, 0)[0] for pod in ("one", "other")] == [EXACT, EXACT]


def test_a_stream_whose_replica_and_pod_are_gone_is_taken_out(cluster: "valkey_server.Cluster") -> None:
    """Of every partition, whichever primary has it."""
    dead, index = (member(cluster, partitions=8, lease_seconds=1) for _ in range(2))
    (tokens, keys), (other, held) = tokens_of(1, 64), tokens_of(2, 40)
    dead.add_stream("dead", 0).apply([stored(tokens)])
    settle(dead)
    index.add_stream("pod", 0).apply([stored(other, 500)])
    settle(index)
    index.renew()
    assert index.bury() == 0
    plain, leases_of = index._client._redis, f"{index._tags[0]}o"
    assert len({plain.get_node_from_key(f"{tag}q").port for tag in index._tags}) > 1
    for name in ("0 dead", "0 pod"):  # as if all this had been two minutes ago
        ends, rest = plain.hget(leases_of, name).split(b" ", 1)
        plain.hset(leases_of, name, b"%d %b" % (int(ends) - 120_000, rest))
    index.renew()  # the one that lives has its lease again
    assert index.bury() == 1
    swept = 0
    while more := index.sweep():
        swept += more
    assert swept == 64
    index.renew()
    assert matches(index, keys) == {}
    assert matches(index, held) == {"pod": 40}
    assert index.standing("dead", 0)[:2] == (1, "no replica follows it")
    assert index.bury() == 0
    assert sum(plain.scard(f"{tag}a") for tag in index._tags) == len(index._tags)
    assert sum(len(list(index._client.blocks(tag))) for tag in index._tags) == 40


def test_a_user_with_only_its_own_keys_is_enough(cluster: "valkey_server.Cluster", tmp_path: Path) -> None:
    """The rights that the documentation names suffice, also to find who took the place of a dead primary."""
    cluster.restrict(" ".join(documented_rights()))
    password = tmp_path / "password"
    password.write_text("secret\n")
    index = member(cluster, username="kvindex", password_file=str(password))
    tokens, keys = tokens_of(1, 64)
    stream = index.add_stream("pod", 0)
    stream.apply([stored(tokens)])
    settle(index)
    index.renew()
    assert index.place("pod", 0, tokens_of(2, 4)[1], 10.0) == ("recorded", 0, 0)
    stream.clear()
    settle(index)
    assert index.sweep() == 64
    stream.apply([stored(tokens)])
    settle(index)
    assert matches(index, keys) == {"pod": 64}
    cluster.primary.kill()
    stream.apply([batch([as_map(Removed([33]))])])

    def is_back() -> bool:
        try:
            index.flush()
            index.renew()
            return matches(index, keys) == {"pod": 32}
        except Unavailable:
            return False

    eventually(is_back)
