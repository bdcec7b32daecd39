"""What is remembered of blocks that left: against an oracle, at the core and through Explain of a real server."""

import random
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import grpc
import pytest
from event_encoding import Cleared, Event, Removed, Stored, as_map, batch
from publisher import Publisher

from kvindex_server import _core
from kvindex_server._core import Index, Left
from kvindex_server.config import LimitSettings, ModelSettings, PodSettings, Settings
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc
from kvindex_server.removals import Departure, Memory, Moment, Reach, remembered, shown
from kvindex_server.server import Server
from kvindex_server.stream import Cause, StreamStatus, Trust

BLOCK = 4
CHAINS, DEPTH = 6, 5
MEDIA = ("GPU", "CPU")
TIERS = ("gpu", "cpu")


def tokens_of(chain: int) -> list[int]:
    return list(range(100 * chain, 100 * chain + DEPTH * BLOCK))


def packed(tokens: list[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}I", *tokens)


KEYS = {
    (chain, depth): key
    for chain in range(CHAINS)
    for depth, key in enumerate(memoryview(_core.block_keys(packed(tokens_of(chain)), BLOCK)).cast("Q"))
}
Place = tuple[int, int, int]
"""(chain, depth, tier bit)."""


@dataclass
class Oracle:
    """An engine's pool of counted blocks on two tiers, and a list of all that ever left it."""

    rng: random.Random
    copies: Counter[Place] = field(default_factory=Counter)
    gone: dict[Place, tuple[Left, int | None, float, int]] = field(default_factory=dict)
    """The last time: how, sequence, time, life."""
    stored: set[Place] = field(default_factory=set)
    """Since the life began, or since all was cleared."""
    life: int = 0

    def event(self) -> Event:
        tier = self.rng.randrange(2)
        chain = self.rng.randrange(CHAINS)
        held = [d for d in range(DEPTH) if self.copies[chain, d, tier]]
        if held and self.rng.random() < 0.5:
            return Removed([self._hash(chain, held[-1])], MEDIA[tier])
        # Deeper by one, or another copy of the last one.
        first = len(held) if len(held) < DEPTH and self.rng.random() < 0.8 else max(0, len(held) - 1)
        parent = self._hash(chain, first - 1) if first else None
        return Stored(
            [self._hash(chain, first)],
            parent,
            tokens_of(chain)[first * BLOCK : (first + 1) * BLOCK],
            BLOCK,
            MEDIA[tier],
        )

    def apply(self, event: Event, sequence: int, when: float) -> None:
        if isinstance(event, Cleared):
            self.drop(Left.CLEARED, sequence, when)
            return
        tier = MEDIA.index(event.medium or "GPU")
        for each in event.hashes:
            assert isinstance(each, int)
            place = (each // 100 - 1, each % 100, tier)
            if isinstance(event, Stored):
                self.copies[place] += 1
                self.stored.add(place)
            else:
                self.copies[place] -= 1
                if not self.copies[place]:
                    self.gone[place] = (Left.REMOVED, sequence, when, self.life)

    def drop(self, how: Left, sequence: int | None, when: float) -> None:
        for place, copies in self.copies.items():
            if copies:
                self.gone[place] = (how, sequence, when, self.life)
        self.copies.clear()
        self.stored.clear()

    @staticmethod
    def _hash(chain: int, depth: int) -> int:
        return 100 * (chain + 1) + depth


def payload(events: list[Event], when: float) -> bytes:
    return batch([as_map(each) for each in events], timestamp=when)


@pytest.mark.parametrize("capacity", [1, 16, 64, 16_384])
@pytest.mark.parametrize("seed", range(12))
def test_what_left_is_told_as_it_was(seed: int, capacity: int) -> None:
    """Nothing is told that was not so, and nothing is missing behind what memory says of itself."""
    rng = random.Random(seed)
    oracle = Oracle(rng)
    index = Index(BLOCK, max_removals=capacity)
    stream = index.add_stream("p", 0)
    sequence, told, forgotten = 0, 0, 0
    places = [(chain, depth) for chain in range(CHAINS) for depth in range(DEPTH)]
    keys = struct.pack(f"<{len(places)}Q", *(KEYS[each] for each in places))
    for step in range(400):
        chance = rng.random()
        if chance < 0.01:
            how = rng.choice([Left.RESTARTED, Left.REQUESTED, Left.REBUILT, Left.DOUBTED])
            stream.clear(how)
            oracle.drop(how, sequence - 1 if sequence else None, 0.0)
            if how is not Left.DOUBTED:
                oracle.life += 1
                sequence = 0
        else:
            when = 1000.0 + step
            events: list[Event] = []
            while not events or rng.random() < 0.5:
                events.append(Cleared() if rng.random() < 0.02 else oracle.event())
                oracle.apply(events[-1], sequence, when)
            stream.apply([payload(events, when)], sequence)
            sequence += 1
        (memory,) = remembered(index, "p", keys)
        for place, left in zip(places, memory.left, strict=True):
            found = {each.tier: each for each in left}
            assert len(found) == len(left)
            for tier, departure in found.items():
                how, at, time_of, life = oracle.gone[*place, tier]
                assert (departure.how, departure.at.sequence, departure.earlier) == (how, at, life < oracle.life)
                if how in (Left.REMOVED, Left.CLEARED):
                    assert departure.at.time == time_of
                else:
                    assert abs(departure.at.time - time.time()) < 3600
                told += 1
            for tier in range(2):
                known = oracle.gone.get((*place, tier))
                if known is None or tier in found:
                    continue
                forgotten += 1
                _, at, _, life = known
                if life == oracle.life:  # then memory has to say that it does not reach back so far
                    assert memory.reach is Reach.FULL
                    assert at is not None and memory.since.sequence is not None and at <= memory.since.sequence
    assert told > 100 or capacity == 1
    assert (forgotten > 0) == (capacity < 16_384)
    stream.close()


def test_nothing_is_remembered_when_it_is_off() -> None:
    index = Index(BLOCK, max_removals=0)
    stream = index.add_stream("p", 0)
    stored = Stored([100, 101], None, tokens_of(0)[: 2 * BLOCK], BLOCK)
    stream.apply([payload([stored], 1.0), payload([Removed([101])], 2.0)], 0)
    keys = struct.pack("<2Q", KEYS[0, 0], KEYS[0, 1])
    (memory,) = remembered(index, "p", keys)
    assert (memory.reach, memory.left) == (Reach.OFF, [[], []])
    assert memory.words() == "removals are not remembered (limits.remembered_removals is 0)"
    assert index.removals("nobody", keys) == []


def test_memory_is_counted_and_given_back() -> None:
    """As many bytes as the rings take, and none when the stream is closed."""
    index, off = Index(BLOCK, max_removals=4096), Index(BLOCK, max_removals=0)
    streams = [each.add_stream("p", 0) for each in (index, off)]
    count = 4096
    tokens = list(range(BLOCK * count))
    stored = Stored(list(range(1, count + 1)), None, tokens, BLOCK)
    for each in streams:
        each.apply([payload([stored], 1.0)], 0)
        # One removal a message: as many runs as there can be.
        each.apply([payload([Removed([number])], 2.0) for number in range(count, 0, -1)], 1)
    assert index.blocks == off.blocks == 0
    grown = index.bytes - off.bytes
    assert 4096 * 4 < grown <= 4096 * 12 + 8192
    for each in streams:
        each.close()
    assert abs(index.bytes - off.bytes) < 256


def test_a_removal_before_its_tokens_were_told_is_counted() -> None:
    """Its key is nobody's to know: the memory then never says that a block was never stored."""
    index = Index(BLOCK)
    stream = index.add_stream("p", 0)
    orphan = Stored([501], 500, tokens_of(1)[BLOCK : 2 * BLOCK], BLOCK)
    stream.apply([payload([orphan], 1.0), payload([Removed([501])], 2.0)], 0)
    (memory,) = remembered(index, "p", struct.pack("<Q", KEYS[1, 1]))
    assert (memory.unnamed, memory.left) == (1, [[]])
    assert memory.never_since(status()) == ""


def status(**other: object) -> StreamStatus:
    fields = {"trust": Trust.EXACT, "trust_cause": Cause.IN_SEQUENCE, **other}
    return StreamStatus("p", 0, "m", **fields)  # type: ignore[arg-type]


def test_never_is_said_only_of_a_whole_past() -> None:
    def memory(reach: Reach, since: int | None, cleared: int | None = None, unnamed: int = 0) -> Memory:
        at = None if cleared is None else Moment(cleared, 5.0)
        return Memory(0, reach, Moment(since, 4.0), at, unnamed, [])

    assert memory(Reach.START, 0).never_since(status()) == "since the engine's first event"
    cleared = "since all blocks were cleared by message 7 (1970-01-01 00:00:05Z)"
    assert memory(Reach.START, 3, 7).never_since(status(trust_cause=Cause.CLEARED)) == cleared
    assert memory(Reach.FULL, 7, 7).never_since(status(trust_cause=Cause.CLEARED)) == cleared
    for doubtful, stream in (
        (memory(Reach.START, 0), status(trust=Trust.PARTIAL)),
        (memory(Reach.START, 0), status(trust=Trust.STALE)),
        (memory(Reach.START, 0), status(unresolved=1)),
        (memory(Reach.START, 0), status(orphans=1)),
        (memory(Reach.START, 0, unnamed=1), status()),
        (memory(Reach.START, 1), status()),
        (memory(Reach.START, None), status()),
        (memory(Reach.RESTORED, 0), status()),
        (memory(Reach.FULL, 8, 7), status(trust_cause=Cause.CLEARED)),
        (memory(Reach.FULL, 8), status()),
        (memory(Reach.NOTHING, None), status()),
        (memory(Reach.OFF, None), status()),
        (memory(Reach.START, 0), status(trust_cause=Cause.DIVERGED)),
    ):
        assert doubtful.never_since(stream) == ""


def test_times_that_no_calendar_has() -> None:
    assert shown(1764000000.5) == "2025-11-24 16:00:00Z"
    for odd in (0.0, -1.0, float("nan"), float("inf"), 1e300):
        assert shown(odd) == "at an unknown time"
    index = Index(BLOCK)
    stream = index.add_stream("p", 0)
    for sequence, odd in enumerate((float("nan"), float("inf"), -5.0, 1e300)):
        stored = Stored([100], None, tokens_of(0)[:BLOCK], BLOCK)
        stream.apply([payload([stored, Removed([100])], odd)], sequence)
        (memory,) = remembered(index, "p", struct.pack("<Q", KEYS[0, 0]))
        assert memory.left[0][0].at == Moment(sequence, 0.0)


def test_every_way_of_leaving_has_words() -> None:
    for how in Left:
        assert "block 3 " in Departure(how, 1, 0, Moment(4, 1.0), earlier=True).words(3, "gpu")


def test_readers_beside_a_writer() -> None:
    """Run by the sanitizers too: what is read is of one moment."""
    index = Index(BLOCK, max_removals=32)
    stream = index.add_stream("p", 0)
    stop, failures = threading.Event(), []
    keys = struct.pack("<2Q", KEYS[0, 0], KEYS[0, 1])

    def read() -> None:
        while not stop.is_set():
            for memory in remembered(index, "p", keys):
                for left in memory.left:
                    for each in left:
                        # Every message removes what it stored, so its time is its number.
                        if each.how is Left.REMOVED and each.at.time != float(each.at.sequence or 0) + 1.0:
                            failures.append(each)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for each in threads:
        each.start()
    sequence = 0
    for number in range(3000):
        stored = Stored([100, 101], None, tokens_of(0)[: 2 * BLOCK], BLOCK)
        stream.apply([payload([stored, Removed([101]), Removed([100])], sequence + 1.0)], sequence)
        sequence += 1
        if number % 500 == 499:
            stream.clear(Left.RESTARTED)
            sequence = 0
    stop.set()
    for each in threads:
        each.join(10)
    assert failures == []


# --- through the door ---


class Site:
    """A server with one pod under the test's control."""

    def __init__(self, removals: int) -> None:
        self.engine = Publisher()
        self.server = Server(
            Settings(
                listen="127.0.0.1:0",
                metrics_listen="127.0.0.1:0",
                limits=LimitSettings(remembered_removals=removals),
                models=(ModelSettings(name="m", block_size=BLOCK),),
                pods=(self.pod(self.engine),),
            )
        )
        self.server.start()
        self.channel = grpc.insecure_channel(self.server.grpc_address)
        self.admin = rpc.KVIndexAdminStub(self.channel)
        self.engine.wait_subscriber()
        assert self.server.wait_ready(20)

    @staticmethod
    def pod(engine: Publisher) -> PodSettings:
        return PodSettings(pod="p", model="m", endpoint=engine.endpoint, replay_endpoint=engine.replay_endpoint)

    def publish(self, events: list[Event], when: float) -> int:
        """Sent, and applied when this returns; its sequence."""
        sequence = self.engine.publish(payload(events, when))
        self.until(lambda: self.stream().last_sequence == sequence and self.stream().state == pb.STREAM_STATE_LIVE)
        return sequence

    def stream(self) -> pb.StreamInfo:
        (stream,) = self.admin.ListPods(pb.ListPodsRequest(), timeout=5).streams
        return stream

    def until(self, true: Callable[[], bool]) -> None:
        ends = time.monotonic() + 10
        while not true():
            assert time.monotonic() < ends
            time.sleep(0.002)

    def explain(self, chain: int) -> pb.PodExplanation:
        asked = pb.ExplainRequest(model="m", tokens=pb.Tokens(ids=tokens_of(chain)))
        (pod,) = self.admin.Explain(asked, timeout=10).pods
        return pod

    def close(self) -> None:
        self.channel.close()
        self.server.stop(0.5)
        self.engine.close()


@pytest.fixture(params=[16_384])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    made = Site(request.param)
    try:
        yield made
    finally:
        made.close()


def end_of(pod: pb.PodExplanation) -> str:
    return pb.MatchEnd.Name(pod.end).removeprefix("MATCH_END_")


@pytest.mark.parametrize("site", [8, 16_384], indirect=True, ids=["little memory", "all of it"])
@pytest.mark.parametrize("seed", range(3))
def test_explain_agrees_with_an_oracle_under_random_events(site: Site, seed: int) -> None:
    """Over gRPC, after every message: the end of each match is what has become of that block, or says not to know."""
    rng = random.Random(seed)
    oracle = Oracle(rng)
    ends: Counter[str] = Counter()
    for step in range(60):
        when = 1_764_000_000.0 + step
        events: list[Event] = []
        sequence = site.engine.next_sequence
        while not events or rng.random() < 0.6:
            events.append(oracle.event() if rng.random() > 0.04 else Cleared())
            oracle.apply(events[-1], sequence, when)
        assert site.publish(events, when) == sequence
        for chain in range(CHAINS):
            pod = site.explain(chain)
            held = [any(oracle.copies[chain, d, tier] for tier in range(2)) for d in range(DEPTH)]
            at = held.index(False) if False in held else DEPTH
            assert (pod.score.matched_blocks, pod.score.trust) == (at, pb.TRUST_EXACT)
            end = end_of(pod)
            ends[end] += 1
            if at == DEPTH:
                assert end == "WHOLE_PROMPT"
                continue
            left = {TIERS.index(each.tier): each for each in pod.left}
            for tier, each in left.items():
                how, of, time_of, _ = oracle.gone[chain, at, tier]
                assert (each.how, each.sequence, each.time) == (how.value + 1, of, time_of)
            last = max(
                (oracle.gone.get((chain, at, tier), (None, -1, 0.0, 0)) for tier in range(2)), key=lambda g: g[1]
            )
            if end in ("REMOVED", "CLEARED") and left:
                assert last[0] is Left[end]
                assert pod.left[0].sequence == last[1]
                assert f"message {last[1]} (" in pod.why
            elif end == "REMOVED":
                assert any(held[at:]) and "when is not known" in pod.why
            elif end == "NEVER_STORED":
                assert not any((chain, at, tier) in oracle.stored for tier in range(2)), pod.why
            else:  # it was there, too long ago to be remembered, or it was not: not to know is allowed, to guess is not
                assert end == "UNKNOWN_KEY", pod.why
                assert pod.remembered.reach == pb.REMOVAL_REACH_FULL
                assert last[1] is not None and last[1] <= pod.remembered.sequence
    assert ends["NEVER_STORED"] and ends["REMOVED"], ends


def test_explain_tells_what_the_server_dropped(site: Site) -> None:
    """A request of a person and a restart of the engine, and the engine's own clear."""
    stored = Stored([100, 101], None, tokens_of(0)[: 2 * BLOCK], BLOCK)
    site.publish([stored], 1_764_000_000.0)
    site.publish([Removed([101])], 1_764_000_001.0)
    site.publish([Cleared()], 1_764_000_002.0)
    pod = site.explain(0)
    assert (end_of(pod), pod.left[0].how, pod.left[0].sequence) == ("CLEARED", pb.BLOCK_LEFT_CLEARED, 2)
    assert pod.why == (
        "block 0 left gpu when all blocks were cleared by message 2 (2025-11-24 16:00:02Z), by the engine's clock"
    )
    assert end_of(site.explain(1)) == "NEVER_STORED"
    site.publish([stored], 1_764_000_003.0)
    site.admin.ClearPod(pb.ClearPodRequest(pod="p", model="m"), timeout=5)
    # The replay brings all of it again, and with it what became of each block.
    site.until(lambda: site.stream().last_sequence == 3 and site.stream().trust == pb.TRUST_EXACT)
    assert site.explain(0).score.matched_blocks == 2
    old = site.engine
    old.close()
    port, replay_port = (int(each.rpartition(":")[2]) for each in (old.endpoint, old.replay_endpoint))
    site.engine = Publisher(port, replay_port)
    site.engine.wait_subscriber()
    site.publish([Stored([500], None, tokens_of(2)[:BLOCK], BLOCK)], 1_764_000_010.0)
    site.until(lambda: site.stream().restarts == 1)
    pod = site.explain(0)
    assert (end_of(pod), pod.left[0].how, pod.left[0].earlier_life) == ("DROPPED", pb.BLOCK_LEFT_RESTARTED, True)
    assert "when the engine was found to have restarted" in pod.why
    assert abs(pod.left[0].time - time.time()) < 600
    assert (pod.remembered.reach, pod.remembered.sequence) == (pb.REMOVAL_REACH_START, 0)


@pytest.mark.parametrize("site", [0], indirect=True)
def test_explain_without_a_memory_says_so(site: Site) -> None:
    stored = Stored([100, 101], None, tokens_of(0)[: 2 * BLOCK], BLOCK)
    site.publish([stored], 1_764_000_000.0)
    site.publish([Removed([101])], 1_764_000_001.0)
    pod = site.explain(0)
    assert (end_of(pod), list(pod.left)) == ("UNKNOWN_KEY", [])
    assert pod.remembered.reach == pb.REMOVAL_REACH_OFF
    assert pod.why.endswith("removals are not remembered (limits.remembered_removals is 0)")


def test_explain_tells_where_the_match_goes_down_a_tier(site: Site) -> None:
    tokens = tokens_of(0)
    site.publish([Stored([100, 101, 102], None, tokens[: 3 * BLOCK], BLOCK)], 1_764_000_000.0)
    site.publish([Stored([102], 101, tokens[2 * BLOCK : 3 * BLOCK], BLOCK, "CPU")], 1_764_000_001.0)
    site.publish([Removed([102])], 1_764_000_002.0)
    pod = site.explain(0)
    assert (end_of(pod), pod.score.matched_blocks) == ("NEVER_STORED", 3)
    assert (
        "from block 2 on the match lies on cpu: block 2 was removed from gpu by message 2 (2025-11-24 16:00:02Z)"
        in pod.why
    )


def test_explain_tells_since_when_a_stream_is_stale(site: Site) -> None:
    before = time.time()
    site.publish([Stored([100], None, tokens_of(0)[:BLOCK], BLOCK)], 1_764_000_000.0)
    assert not site.explain(0).HasField("stale_since")
    site.engine.publish(b"\xc1")
    site.until(lambda: site.stream().trust == pb.TRUST_STALE)
    pod = site.explain(0)
    assert before - 1 < pod.stale_since < time.time() + 1
    assert f"; the stream is STALE since {shown(pod.stale_since)}: could not be read" in pod.why


def test_rows_of_removals_that_change_what_they_are_of() -> None:
    """Equal events but for their hash are read together: of the tier they name, also where nothing is held there."""
    index = Index(block_size=BLOCK)
    stream = index.add_stream("pod", 0)
    for medium in ("GPU", "CPU"):
        for chain in range(CHAINS):
            stored = Stored([chain], None, tokens_of(chain)[:BLOCK], BLOCK, medium=medium)
            stream.apply([batch([as_map(stored)])])
    rows = [Removed([0], "GPU"), Removed([1], "DISK"), Removed([2], "DISK"), Removed([1], "GPU"), Removed([3], "CPU")]
    rows += [Removed([4], "CPU"), Removed([2], "GPU"), Removed([2], "GPU"), Removed([5], "DISK")]
    applied = stream.apply([batch([as_map(each) for each in rows])])
    assert (applied.blocks_removed, applied.reasons) == (5, {"unknown_removal": 4})
    assert stream.claims_by_tier[:3] == [CHAINS - 3, CHAINS - 2, 0]
