"""Snapshots killed, cut, damaged, mixed up, out of room at random points; what comes back is what the oracle says.

Each point: files as a server could have left them, one thing that happened to them or to their writing, an engine that
went on, forgot, or began anew meanwhile, and a start over it all. 3,000 points in ordinary runs, 100,000 with
KVINDEX_SOAK=1 (`make soak`).
"""

import os
import random
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from event_encoding import Cleared, Event, Removed, Stored, as_map, batch
from oracle import ModelOracle, query_keys
from test_index_oracle import digest_of

from kvindex_server._core import Index, Stream, xxh3_64
from kvindex_server.ingest import Bounds, Ingest
from kvindex_server.keeper import Keeper
from kvindex_server.pods import PodSpec
from kvindex_server.snapshot import MAGIC, Directory, SavedStream, Writer
from kvindex_server.stream import Cause, StreamStatus, Trust

POINTS = 100_000 if os.environ.get("KVINDEX_SOAK") else 3_000
SHARDS = 4
POINTS_A_FLEET = 250
SIZE, SEED = 4, 1337
Held = frozenset[tuple[int, int, str]]


def spec_of(pod: str) -> PodSpec:
    return PodSpec(pod, "m", f"tcp://{pod}:1", f"tcp://{pod}:2")


class Engine:
    """One life of one pod: its messages, and what it held after each of them."""

    def __init__(self, pod: str, life: int, rng: random.Random, messages: int) -> None:
        self.spec = spec_of(pod)
        self.payloads: list[bytes] = []
        self.held: list[Held] = []
        """What one who followed it from the start knows to be held; what is held and cannot be placed is not in it."""
        self.announced: list[Held] = []
        """All that is held."""
        oracle = ModelOracle(SIZE, SEED).add_stream(pod, 0)
        chains: list[list[int]] = [[]]
        tokens = {0: [rng.randrange(500) for _ in range(64)]}
        for number in range(messages):
            events = [self._event(rng, chains, tokens) for _ in range(rng.randint(1, 3))]
            oracle.apply(events)
            # The time makes a message another one than any of another life.
            self.payloads.append(batch([as_map(each) for each in events], timestamp=1e9 + life * 1e5 + number))
            self.held.append(frozenset(oracle.holdings()))
            keys = {number: query_keys(each, SIZE, SEED) for number, each in tokens.items()}
            self.announced.append(
                frozenset(
                    (keys[name // 1000][name % 1000 - 1], group, tier)
                    for group, tier, name in oracle.counts
                    if isinstance(name, int)
                )
            )

    def _event(self, rng: random.Random, chains: list[list[int]], tokens: dict[int, list[int]]) -> Event:
        dice, tier = rng.random(), rng.choice(["GPU", "GPU", "CPU"])
        if dice < 0.02:
            for each in chains:
                each.clear()
            return Cleared()
        if dice < 0.35:
            names = [each for chain in chains for each in chain]
            return Removed([rng.choice(names)] if names else [1], tier)
        number = rng.randrange(len(chains))
        if rng.random() < 0.3 and len(chains) < 6:
            number = len(chains)
            chains.append([])
            tokens[number] = [rng.randrange(500) for _ in range(64)]
        chain = chains[number]
        begin = rng.randrange(len(chain) + 1) if chain else 0
        if begin >= 16:
            begin = 0
        end = min(16, begin + rng.randint(1, 4))
        while len(chain) < end:
            chain.append(1000 * number + len(chain) + 1)
        parent = chain[begin - 1] if begin else None
        return Stored(chain[begin:end], parent, tokens[number][begin * SIZE : end * SIZE], SIZE, tier)

    def saved(self, last: int) -> SavedStream:
        """As a server that followed it from the start would save it after a message."""
        stream = Index(SIZE).add_stream(self.spec.pod, 0)
        stream.apply(self.payloads[: last + 1])
        assert stream.digest == digest_of(set(self.held[last]))
        return SavedStream(
            model="m",
            pod=self.spec.pod,
            rank=0,
            endpoint=self.spec.endpoint,
            replay_endpoint=self.spec.replay_endpoint,
            incarnation="",
            epoch=0,
            last_sequence=last,
            digest=xxh3_64(self.payloads[last]),
            trust=Trust.EXACT,
            cause=Cause.IN_SEQUENCE,
            reason="",
            claims=stream.claims,
            state=stream.snapshot(),
        )


class Saving:
    """What a keeper sees of a fleet."""

    registered: tuple[PodSpec, ...] = ()

    def __init__(self, streams: list[SavedStream]) -> None:
        self._streams = streams

    def save(self) -> Iterator[SavedStream]:
        return iter(self._streams)


@dataclass
class Fleet:
    """Two pods, each in two lives, and the files of three moments of the first lives and one of the second."""

    engines: list[tuple[Engine, Engine]]
    moments: list[list[SavedStream]]
    files: list[bytes]
    foreign: bytes


def fleet_of(rng: random.Random, scratch: Path) -> Fleet:
    engines = [(Engine(pod, 1, rng, 60), Engine(pod, 2, rng, 40)) for pod in ("a", "b")]
    moments = [[first.saved(rng.randrange(low, low + 15)) for first, _ in engines] for low in (5, 20, 35)]
    moments.append([second.saved(rng.randrange(20)) for _, second in engines])
    other = replace(moments[0][0], model="other", pod="elsewhere")
    files = []
    for streams in (*moments, [other]):
        path = scratch / "file"
        writer = Writer(path)
        for each in streams:
            writer.stream(each)
        writer.close()
        files.append(path.read_bytes())
    return Fleet(engines, moments, files[:-1], files[-1])


class Limited:
    """No file of this process may grow beyond so many bytes; writing more is an error of the system call."""

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def __enter__(self) -> None:
        self._handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _, hard = self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._limit, hard))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)
        signal.signal(signal.SIGXFSZ, self._handler)


def put(directory: Path, number: int, data: bytes) -> None:
    (directory / f"{number:020d}.kvix").write_bytes(data)


def put_streams(directory: Path, number: int, streams: list[SavedStream]) -> None:
    writer = Writer(directory / f"{number:020d}.kvix")
    for each in streams:
        writer.stream(each)
    writer.close()


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bits turned, bytes replaced, or a page lost."""
    out = bytearray(data)
    if rng.random() < 0.3:
        begin = rng.randrange(len(out))
        end = min(len(out), begin + rng.choice([16, 512, 4096]))
        out[begin:end] = bytes(end - begin)
    for _ in range(rng.randint(0, 3)):
        at = rng.randrange(len(out))
        out[at] = rng.choice([0, 255, out[at] ^ 1 << rng.randrange(8)])
    return bytes(out)


def spliced(rng: random.Random, one: bytes, other: bytes) -> bytes:
    """The beginning of one file and the end of another."""
    cut = rng.randrange(len(one))
    return one[:cut] + other[min(cut, len(other)) :]


FAULTS = (
    "none",
    "killed",
    "full",
    "cut",
    "damaged",
    "spliced",
    "longer",
    "foreign",
    "empty",
    "lost",
    "mixed",
    "swapped",
)


def prepare(rng: random.Random, fleet: Fleet, directory: Path, fault: str) -> None:
    """Files as they could have been left; `fault` is about the newest one."""
    older, newest = rng.sample(range(len(fleet.files)), 2)
    put(directory, 1, fleet.files[older])
    data = fleet.files[newest]
    match fault:
        case "none":
            put(directory, 2, data)
        case "killed":  # what a kill -9 leaves of a file that has not got its name yet
            (directory / ".x.part").write_bytes(data[: rng.randrange(len(data))])
        case "full":
            keeper = Keeper(directory, keep=2, interval=1.0, max_age=1e9)
            with Limited(rng.randrange(len(data))):
                assert keeper.write(Saving(fleet.moments[newest])) is None  # type: ignore[arg-type]
            assert keeper.stats.failed == 1 and len(list(directory.iterdir())) == 1
        case "cut":
            put(directory, 2, data[: rng.randrange(len(data))])
        case "damaged":
            put(directory, 2, damaged(rng, data))
        case "spliced":
            put(directory, 2, spliced(rng, data, fleet.files[older]))
        case "longer":
            put(directory, 2, data + rng.randbytes(rng.randint(1, 64)))
        case "foreign":
            put(directory, 2, rng.choice([fleet.foreign, MAGIC, rng.randbytes(200), MAGIC + rng.randbytes(200)]))
        case "empty":
            put(directory, 2, b"")
        case "lost":  # between two snapshots, everything
            (directory / f"{1:020d}.kvix").unlink()
        case "mixed":  # sound records of different moments in one file
            path = directory / f"{2:020d}.kvix"
            writer = Writer(path)
            for moments in zip(*fleet.moments, strict=True):
                writer.stream(rng.choice(moments))
            writer.close()
        case "swapped":  # one pod's state under the other's name
            writer = Writer(directory / f"{2:020d}.kvix")
            one, other = fleet.moments[newest]
            for each, of in ((one, other), (other, one)):
                fields = {"state": of.state, "last_sequence": of.last_sequence, "digest": of.digest}
                writer.stream(replace(each, **fields))  # type: ignore[arg-type]
            writer.close()


def begin(keeper: Keeper, engine: Engine, asked: list[int], clock: Callable[[], float]) -> tuple[Stream, Ingest, bool]:
    """One stream of a new process over what was saved."""
    stream = Index(SIZE).add_stream(engine.spec.pod, 0)
    ingest = Ingest(stream, StreamStatus(engine.spec.pod, 0, "m"), Bounds(), asked.append, clock=clock)
    saved = keeper.saved(engine.spec, 0)
    if saved is not None:
        ingest.resume(saved)
        if not stream.restore(saved.state):
            ingest.resync()
    ingest.start()
    return stream, ingest, saved is not None


def interrupted(rng: random.Random, keeper: Keeper, engine: Engine, end: int, oldest: int) -> SavedStream | None:
    """What a process saves that is killed soon, perhaps before its engine has said whether it is the same."""
    asked: list[int] = []
    now = 0.0
    stream, ingest, _ = begin(keeper, engine, asked, lambda: now)
    for sequence in range(rng.randint(oldest, end), end + 1):
        if rng.random() < 0.3:
            answer(ingest, asked, engine, sequence, oldest)
        ingest.live([(sequence, engine.payloads[sequence])])
        if rng.random() < 0.2:
            now += 400.0
            ingest.tick()
        if rng.random() < 0.2:
            break
    known, claims, state = ingest.save(), stream.claims, stream.snapshot()
    stream.close()
    if known is None:
        return None
    return replace(engine.saved(0), claims=claims, state=state, **known)


def start(rng: random.Random, keeper: Keeper, engine: Engine, end: int, oldest: int) -> tuple[Stream, Ingest, bool]:
    """The same: verified and followed up to message `end`."""
    asked: list[int] = []
    now = 0.0
    stream, ingest, was_saved = begin(keeper, engine, asked, lambda: now)
    live = rng.randint(oldest, end)  # so far the engine has come when it is asked
    for sequence in range(live, end + 1):
        if rng.random() < 0.5:
            answer(ingest, asked, engine, sequence, oldest)
        ingest.live([(sequence, engine.payloads[sequence])])
    answer(ingest, asked, engine, end, oldest)
    for _ in range(20):  # what is tried again later
        now += 400.0
        ingest.tick()
        answer(ingest, asked, engine, end, oldest)
    return stream, ingest, was_saved


def answer(ingest: Ingest, asked: list[int], engine: Engine, last: int, oldest: int) -> None:
    """The engine replays what it still has, up to `last`."""
    while asked:
        begin = max(asked.pop(), oldest)
        asked.clear()
        ingest.replayed([(each, engine.payloads[each]) for each in range(begin, last + 1)], ended=True)


def holdings(stream: Stream) -> Held:
    """What it holds, as it would tell a store."""
    stream.follow_changes(1 << 20)
    _, _, rows, _ = stream.take_changes(1)
    names = {0: "gpu", 1: "cpu"}
    return frozenset(
        (int.from_bytes(rows[0][at : at + 8], "little"), 0, names[bit])
        for at in range(0, len(rows[0]), 11)
        for bit in names
        if rows[0][at + 9] >> bit & 1
    )


@pytest.mark.soak
@pytest.mark.timeout(3600 if POINTS > 10_000 else 300)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_nothing_wrong_is_believed_whatever_happened_to_the_files(tmp_path: Path, shard: int) -> None:
    """EXACT is exactly the engine's blocks, PARTIAL some of them; a doubtful stream says so."""
    rng = random.Random(shard)
    seen: Counter[tuple[str, str]] = Counter()
    restored = saved_again = 0
    for point in range(POINTS // SHARDS):
        if point % POINTS_A_FLEET == 0:
            fleet = fleet_of(rng, tmp_path)
        directory = tmp_path / "snapshots"
        directory.mkdir()
        fault = FAULTS[point % len(FAULTS)]
        prepare(rng, fleet, directory, fault)
        keeper = Keeper(directory, keep=2, interval=1.0, max_age=1e9)
        keeper.load()
        first_lives = [rng.random() < 0.25 for _ in fleet.engines]  # an engine may have begun anew meanwhile
        come: list[int] = [0] * len(fleet.engines)
        if rng.random() < 0.3:
            again = []
            for number, (lives, second) in enumerate(zip(fleet.engines, first_lives, strict=True)):
                come[number] = end = rng.randrange(len(lives[second].payloads))
                again.append(interrupted(rng, keeper, lives[second], end, rng.randrange(end + 1)))
            keeper.stop()
            saved_again += sum(each is not None for each in again)
            put_streams(directory, 3, [each for each in again if each is not None])
            keeper = Keeper(directory, keep=2, interval=1.0, max_age=1e9)
            keeper.load()
        for lives, second, least in zip(fleet.engines, first_lives, come, strict=True):
            now_second = second or rng.random() < 0.25  # or after that
            engine = lives[now_second]
            end = rng.randrange(least if second == now_second else 0, len(engine.payloads))
            oldest = 0 if rng.random() < 0.5 else rng.randrange(end + 1)
            stream, ingest, was_saved = start(rng, keeper, engine, end, oldest)
            trust, where = ingest.status().trust, (point, fault, engine.spec.pod, end, oldest)
            restored += was_saved
            seen[fault, trust.name] += 1
            if trust is Trust.EXACT:
                assert stream.digest == digest_of(set(engine.held[end])), where
            elif trust is Trust.PARTIAL:
                assert holdings(stream) <= engine.announced[end], where
            assert trust is not Trust.COLD, where
            stream.close()
        keeper.stop()
        shutil.rmtree(directory)
    print(f"{POINTS // SHARDS} points, {restored} streams restored, {saved_again} of a second start: {dict(seen)}")
    assert restored > POINTS / SHARDS / 2
    assert all(seen[fault, "EXACT"] for fault in FAULTS)


def test_the_harness_finds_a_wrong_claim(tmp_path: Path) -> None:
    """A state that no check can tell from a true one is found by the comparison with the oracle."""
    rng = random.Random(5)
    engine = Engine("a", 1, rng, 30)
    saved = replace(engine.saved(20), state=engine.saved(5).state)
    directory = Directory(tmp_path, 2)
    directory.write(lambda writer: writer.stream(saved))
    keeper = Keeper(tmp_path, keep=2, interval=1.0, max_age=1e9)
    keeper.load()
    stream, ingest, _ = start(rng, keeper, engine, 29, 20)
    assert ingest.status().trust is Trust.EXACT
    assert stream.digest != digest_of(set(engine.held[29]))
    assert holdings(stream) != engine.held[29]
    keeper.stop()
