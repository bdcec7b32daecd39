"""The simulated engines behave as vLLM does, and the index believes exactly what they hold."""

import random
import struct
import time
from collections import Counter
from collections.abc import Iterable, Iterator

import msgpack  # type: ignore[import-untyped]
import pytest

from kvindex_server import wire
from kvindex_server.engine_hashes import block_hash, none_hash, wire_hash
from kvindex_server.simulate.engine import Engine
from kvindex_server.simulate.events import Cleared, Encoding, Event, Removed, Stored, encode_batch
from kvindex_server.simulate.pod import SimulatedPod
from kvindex_server.simulate.publisher import Publisher
from kvindex_server.simulate.workload import Shape, Traffic, Workload, by_session

BLOCK = 16


def _claims(events: Iterable[Event]) -> Counter[int]:
    """Copies by hash that a listener counts up."""
    claims: Counter[int] = Counter()
    for event in events:
        match event:
            case Stored():
                claims.update(event.hashes)
            case Removed():
                claims[event.block] -= 1
                assert claims[event.block] >= 0
            case Cleared():
                claims.clear()
    return +claims


def _tokens(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def test_hashes_are_those_of_vllm() -> None:
    """Values got from vLLM itself, sha256_cbor and PYTHONHASHSEED=42."""
    root = none_hash("42")
    first = block_hash(root, _tokens(1, 16))
    assert root[:8].hex() == "9fa6eb003f14425e"
    assert wire_hash(first) == 16300212363532267629
    assert wire_hash(block_hash(first, _tokens(17, 16))) == 8671309795006503672


def test_one_event_a_block_while_decoding() -> None:
    """The prompt's full blocks come at once, then each as it fills; the last token has no place."""
    engine = Engine(32)
    request = engine.submit(_tokens(0, 40), 25)
    stored = [event for event in engine.run() if isinstance(event, Stored)]
    assert [len(event.hashes) for event in stored] == [2, 1, 1]
    assert stored[0].parent is None
    assert stored[1].parent == stored[0].hashes[-1]
    assert stored[1].tokens == tuple(request.tokens[32:48])
    assert len(request.tokens) == 65  # the 65th token was sampled, never computed

    engine.submit(_tokens(1000, 31), 1)
    assert [len(event.hashes) for event in engine.run() if isinstance(event, Stored)] == [1]


def test_aligned_repeat_recomputes_its_last_block() -> None:
    """A block-aligned prompt that is cached to its end leads to a second copy of its last block."""
    engine = Engine(32)
    engine.submit(_tokens(0, 48), 1)
    first = engine.run()
    again = engine.submit(_tokens(0, 48), 1)
    second = engine.run()
    assert again.cached_tokens == 32
    assert [len(event.hashes) for event in second if isinstance(event, Stored)] == [1]
    assert sorted(engine.resident().values()) == [1, 1, 2]
    assert _claims(first + second) == engine.resident()


def test_tail_is_evicted_first() -> None:
    """A finished chain loses its end before its beginning."""
    engine = Engine(6)
    engine.submit(_tokens(0, 64), 1)
    events = engine.run()
    chain = next(event for event in events if isinstance(event, Stored)).hashes
    engine.submit(_tokens(500, 60), 1)  # 4 blocks; 2 were never used
    removed = [event.block for event in engine.run() if isinstance(event, Removed)]
    # The request's first own block is not full and has no hash; then come the chain's last blocks.
    assert removed == list(reversed(chain))[: len(removed)]
    assert len(removed) >= 1


def test_reset_is_announced_late() -> None:
    """The cache is empty at once, the event is the first of the next request's."""
    engine = Engine(16)
    engine.submit(_tokens(0, 64), 1)
    engine.run()
    assert engine.reset()
    assert engine.resident() == {}
    engine.submit(_tokens(0, 32), 1)
    assert isinstance(engine.run()[0], Cleared)


def test_preemption_and_impossible_requests() -> None:
    """Two requests that outgrow the pool together both end; one larger than the pool is refused."""
    engine = Engine(8)
    requests = [engine.submit(_tokens(100 * i, 40), 60) for i in range(2)]
    events = engine.run()
    assert all(request.finished for request in requests)
    assert any(isinstance(event, Removed) for event in events)
    assert _claims(events) == engine.resident()
    with pytest.raises(ValueError, match="larger"):
        engine.submit(_tokens(0, 130), 1)
    with pytest.raises(ValueError, match="at least one"):
        engine.submit([], 1)


@pytest.mark.parametrize("seed", range(5))
def test_events_add_up_to_the_pool(seed: int) -> None:
    """Whatever is asked, counting the events gives what the pool holds."""
    events, engine = _random_life(seed)
    assert _claims(events) == engine.resident()
    assert max(engine.resident().values()) > 1
    assert any(isinstance(event, Removed) for event in events)


def _random_life(seed: int) -> tuple[list[Event], Engine]:
    rng = random.Random(seed)
    engine = Engine(48, seed=seed)
    prefixes = [_tokens(10_000 * i, 64) for i in range(3)]
    events: list[Event] = []
    for _ in range(60):
        prefix = rng.choice(prefixes)[: rng.choice((48, 64))]
        own = _tokens(rng.randrange(4) * 777, rng.choice((0, 16, 37)))
        engine.submit(prefix + own, rng.randint(1, 40))
        for _ in range(rng.randint(0, 30)):
            events += engine.step()[0]
        if rng.random() < 0.1 and not engine.busy:
            engine.reset()
    return events + engine.run(), engine


def test_encodings() -> None:
    """Positional events at full length, named ones without absent defaults, the rank last in the batch."""
    stored = Stored((1, 2**64 - 1), None, tuple(range(32)), BLOCK)
    events: list[Event] = [Cleared(), stored, Removed(1)]
    ts, arrays, rank = msgpack.unpackb(encode_batch(events, 1.5, 3, Encoding.ARRAY))
    assert (ts, rank) == (1.5, 3)
    assert arrays[0] == ["AllBlocksCleared"]
    assert len(arrays[1]) == 12
    assert arrays[1][:5] == ["BlockStored", [1, 2**64 - 1], None, list(range(32)), BLOCK]
    assert arrays[1][6:] == ["GPU", None, [None, None], 0, "full_attention", None]
    assert arrays[2] == ["BlockRemoved", [1], "GPU", 0]
    _, maps, _ = msgpack.unpackb(encode_batch(events, 1.5, 3, Encoding.MAP))
    assert maps[0] == {"type": "AllBlocksCleared"}
    assert maps[1]["block_hashes"] == [1, 2**64 - 1]
    assert "kv_cache_spec_sliding_window" not in maps[1]
    assert maps[2] == {"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU", "group_idx": 0}


# ---- on the wire -----------------------------------------------------------


def _receive(socket: wire.Socket) -> list[bytes]:
    assert socket.wait(5000)
    frames = socket.receive()
    assert frames is not None
    return frames


def _replay(endpoint: str, start: int, serve: "Publisher | None" = None) -> list[list[bytes]]:
    with wire.replay_client(endpoint) as client:
        wire.request_replay(client, start)
        if serve is not None:
            serve.serve_replay(5000)
        answers = [_receive(client)]
        while wire.read_replay(answers[-1])[0] != wire.END_SEQUENCE:
            answers.append(_receive(client))
        return answers


@pytest.mark.parametrize(("encoding", "width"), [(Encoding.ARRAY, 3), (Encoding.MAP, 4)])
def test_replay(encoding: Encoding, width: int) -> None:
    """Bounded, from the number asked for, in the release's layout, ended by the marker."""
    publisher = Publisher("kv@p@m", encoding=encoding, buffer_steps=4)
    try:
        publisher.publish([])
        for number in range(6):
            publisher.publish([Removed(number)])
        answers = _replay(publisher.replay_endpoint, 0, publisher)
        assert [len(frames) for frames in answers] == [width] * 5
        assert [wire.read_replay(frames)[0] for frames in answers] == [2, 3, 4, 5, wire.END_SEQUENCE]
        assert answers[-1] == [b"", wire.END_SEQUENCE.to_bytes(8, "big"), b""] or answers[-1] == [
            b"",
            b"",
            wire.END_SEQUENCE.to_bytes(8, "big"),
            b"",
        ]
        assert [wire.read_replay(a)[0] for a in _replay(publisher.replay_endpoint, 5, publisher)][:1] == [5]
        assert len(_replay(publisher.replay_endpoint, 99, publisher)) == 1
    finally:
        publisher.close()


@pytest.fixture(params=list(Encoding))
def pod(request: pytest.FixtureRequest) -> Iterator[SimulatedPod]:
    """A running pod."""
    pod = SimulatedPod("pod-0", "m", blocks=64, encoding=request.param)
    pod.start()
    yield pod
    pod.stop()
    assert not pod.is_alive()


def test_pod_publishes(pod: SimulatedPod) -> None:
    """Live messages carry topic and sequence; lost ones can be replayed; a restart begins at 0 in silence."""
    with wire.subscriber(pod.endpoint, "kv@pod-0@", bind=False) as socket:
        deadline = time.monotonic() + 10
        while not socket.wait(50):  # until the subscription has reached the pod
            pod.generate(_tokens(0, 64), 1).result(timeout=10)
            assert time.monotonic() < deadline
        frames = _receive(socket)
        assert frames[0] == b"kv@pod-0@m"
        last = wire.read_event(frames)[0]
        while socket.wait(50):
            last = wire.read_event(_receive(socket))[0]

        pod.lose(1)
        pod.generate(_tokens(1000, 64), 1).result(timeout=10)
        pod.generate(_tokens(2000, 64), 1).result(timeout=10)
        assert wire.read_event(_receive(socket))[0] == last + 2
        replayed = [wire.read_replay(a)[0] for a in _replay(pod.replay_endpoint, last + 1)]
        assert replayed == [last + 1, last + 2, wire.END_SEQUENCE]

        with pytest.raises(ValueError, match="larger"):
            pod.generate(_tokens(0, 64 * BLOCK), 1).result(timeout=10)

        pod.restart()
        assert (pod.resident(), pod.published()) == ({}, 0)
        assert len(_replay(pod.replay_endpoint, 0)) == 1
        pod.generate(_tokens(0, 64), 1).result(timeout=10)
        assert len(pod.resident()) == 4


def test_workload_is_seeded_and_grows() -> None:
    """The same seed asks the same; a chat's next prompt begins with all that was said."""
    one, two = Workload(7), Workload(7)
    for _ in range(50):
        turn = one.next_turn()
        assert turn is not None
        assert turn == two.next_turn()
        answered = (*turn.prompt, 1, 2, 3)
        one.finish(turn, answered)
        two.finish(turn, answered)

    lone = Workload(1, Shape(sessions=1, turns=(2, 2)))
    first = lone.next_turn()
    assert first is not None
    assert lone.next_turn() is None
    lone.finish(first, (*first.prompt, 9))
    second = lone.next_turn()
    assert second is not None
    assert second.session == first.session
    assert second.prompt[: len(first.prompt) + 1] == (*first.prompt, 9)
    lone.abandon(second)
    third = lone.next_turn()
    assert third is not None
    assert third.session != first.session


def test_traffic_finds_its_caches() -> None:
    """Chats that stay on their pod find most of their prompt cached."""
    pods = {name: SimulatedPod(name, "m", blocks=2048, seed=i) for i, name in enumerate(("a", "b"))}
    for pod in pods.values():
        pod.start()
    try:
        traffic = Traffic(Workload(3, Shape(sessions=6)), pods, by_session(list(pods)))
        deadline = time.monotonic() + 30
        while traffic.total.requests < 40:
            assert time.monotonic() < deadline
            traffic.send()
            traffic.collect()
            time.sleep(0.001)
        assert traffic.total.hit_ratio > 0.5
        assert traffic.total.requests == sum(tally.requests for tally in traffic.by_pod.values())
    finally:
        for pod in pods.values():
            pod.stop()


# ---- against the index -----------------------------------------------------


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("seed", range(3))
def test_index_holds_what_the_engine_holds(encoding: Encoding, seed: int) -> None:
    """After every event of a life with copies, evictions and resets, hash by hash."""
    core = pytest.importorskip("kvindex_server._core")
    index = core.Index(0)
    stream = index.add_stream("pod-0", 0)
    events, engine = _random_life(seed)
    seen: set[int] = set()
    for start in range(0, len(events), 3):
        applied = stream.apply([encode_batch(events[start : start + 3], 1.0, 0, encoding)])
        assert applied.reasons == {}
    for event in events:
        if isinstance(event, Stored):
            seen.update(event.hashes)
    resident = engine.resident()
    hashes = sorted(seen)
    answers = index.holders_of_ints(struct.pack(f"<{len(hashes)}Q", *hashes), [])
    held = {block for block, (_, holders) in zip(hashes, answers, strict=True) if holders}
    assert held == set(resident)
    assert stream.claims == len(resident)
    assert (stream.orphans, stream.unresolved, index.block_size) == (0, 0, BLOCK)
