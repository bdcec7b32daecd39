"""A shared store that takes longer than the engine: said, bounded, and no reason to lose the stream."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from event_encoding import Removed, as_map, batch

valkey_server = pytest.importorskip("valkey_server")
from slow_proxy import SlowProxy  # noqa: E402
from test_store_faults import matches, replica, settle, stored, tokens_of  # noqa: E402

from kvindex_server.store.client import StoreAway  # noqa: E402
from kvindex_server.store.index import ROUND  # noqa: E402

EXACT, STALE = 3, 4


@pytest.fixture
def server(tmp_path: Path) -> "Iterator[valkey_server.Valkey]":
    with valkey_server.valkey(tmp_path) as started:
        yield started


def eventually(holds: Callable[[], object], seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "did not come true in time"
        time.sleep(0.02)


def test_changes_that_wait_are_said_and_the_lease_is_kept(server: "valkey_server.Valkey") -> None:
    """Every answer comes in time, and yet a removal gets there only after seconds: EXACT is not said till then."""
    proxy = SlowProxy(server.port)
    more: dict[str, object] = {"lease_seconds": 4, "timeout_seconds": 2.0, "batch_blocks": 64}
    writer, reader = replica(proxy.address, **more), replica(server.address, **more)
    tokens, keys = tokens_of(1, 20)
    stream, idle = writer.add_stream("pod", 0), reader.add_stream("pod", 0)
    stream.apply([stored(tokens)])
    settle(writer)
    reader.flush()
    writer.start()
    reader.start()

    def seen() -> tuple[int, int]:
        return matches(reader, keys).get("pod", 0), reader.standing("pod", 0)[0]

    try:
        eventually(lambda: seen() == (20, EXACT))
        proxy.delay = 0.1
        stream.apply([stored(tokens_of(2, 64 * 80)[0], 1000)])
        time.sleep(0.3)  # the turn is under way
        stream.apply([batch([as_map(Removed([5]))])])
        eventually(lambda: seen() == (20, STALE), 3.5)  # before its lease would end
        assert reader.standing("pod", 0)[1] == "its changes wait for the shared store"
        while (now := seen()) != (4, EXACT):
            assert now in ((20, STALE), (4, STALE)), now
            time.sleep(0.02)
        assert writer.counts["lives"] == 1 and idle.standby
    finally:
        proxy.delay = 0
        writer.stop()
        reader.stop()
        proxy.close()


def test_what_waits_for_a_store_that_is_away_is_bounded(server: "valkey_server.Valkey") -> None:
    """Also what was lined up already: beyond the bound all that is held by then is sent anew."""
    index = replica(server.address, max_changes=1024, timeout_seconds=0.05)
    stream = index.add_stream("pod", 0)
    settle(index)
    server.pause()
    for number in range(12):
        first = 1000 * number + 1
        stream.apply([stored(tokens_of(number, 500)[0], first)])
        stream.apply([batch([as_map(Removed(list(range(first, first + 500))))])])
        with pytest.raises(StoreAway):
            index.flush()
    assert sum(len(rows) for of_partition in stream._waiting for _, rows in of_partition) // 11 <= 1024 + 500
    tokens, keys = tokens_of(99, 8)
    stream.apply([stored(tokens, 99_000)])
    server.go_on()
    settle(index)
    assert index.counts["lives"] == 2
    assert matches(index, keys) == {"pod": 8}


def test_in_short_turns_no_stream_is_left_behind(server: "valkey_server.Valkey") -> None:
    """What a turn had no time for goes first in the next one, however much others have to send by then."""
    index = replica(server.address, batch_blocks=4)
    streams = [index.add_stream("pod", rank) for rank in range(ROUND + 8)]
    settle(index)
    before = [stream.numbers[0] for stream in streams]
    for number in range(4):
        for stream in streams:
            stream.apply([stored(tokens_of(number, 8)[0], 100 * number + 1)])
        assert not index.flush(0.0)
    assert all(stream.numbers[0] > was for stream, was in zip(streams, before, strict=True))
    settle(index)


def test_a_stream_that_cannot_begin_holds_up_no_other(server: "valkey_server.Valkey") -> None:
    """One whose second partition says that it has had a later life, as after a failover to a clock that is behind."""
    index = replica(server.address, partitions=2)
    tokens, keys = tokens_of(1, 8)
    blocked, also, other, third = (index.add_stream(pod, 0) for pod in ("blocked", "also", "other", "third"))
    for stream in (blocked, also):
        server.client().hset(f"{index._tags[1]}q", stream.name, f"{1 << 47}:0")
    with pytest.raises(StoreAway):
        index.flush()
    for stream in (blocked, other, third):
        stream.apply([stored(tokens)])
    for _ in range(6):
        with pytest.raises(StoreAway):
            index.flush()
    assert matches(index, keys) == {"other": 8, "third": 8}
    other.apply([batch([as_map(Removed([5]))])])
    with pytest.raises(StoreAway):
        index.flush()
    assert matches(index, keys) == {"other": 4, "third": 8}
    index.renew()
    assert [index.standing(pod, 0)[0] for pod in ("blocked", "other", "third")] == [1, EXACT, EXACT]


def test_changes_that_nobody_takes_are_said(server: "valkey_server.Valkey") -> None:
    """Whatever keeps the writer from its work while leases are renewed."""
    now = [1000.0]
    index = replica(server.address, clock=lambda: now[0])
    tokens, keys = tokens_of(1, 8)
    stream = index.add_stream("pod", 0)
    stream.apply([stored(tokens)])
    settle(index)
    now[0] += 5
    index.renew()
    assert index.standing("pod", 0)[0] == EXACT
    stream.apply([batch([as_map(Removed([5]))])])
    now[0] += 1.1
    index.renew(everything=False)
    assert matches(index, keys) == {"pod": 8}
    assert index.standing("pod", 0)[:2] == (STALE, "its changes wait for the shared store")
    settle(index)
    index.renew(everything=False)
    assert index.standing("pod", 0)[0] == EXACT
