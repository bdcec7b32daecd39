"""Readers and writers at once: answers stay sound, and the end is that of the same events one by one."""

import random
import struct
import threading
from collections.abc import Callable

from event_encoding import Cleared, Event, Removed, Stored, maps
from oracle import ModelOracle, query_keys

from kvindex_server._core import Index, Stream

BLOCK = 4
WRITERS = 6
ROUNDS = 250
BLOCKS = 24
TOKENS = list(range(1, BLOCKS * BLOCK + 1))
KEYS = struct.pack(f"<{BLOCKS}Q", *query_keys(TOKENS, BLOCK))
ASK = struct.pack(f"<{len(TOKENS)}I", *TOKENS)


def stored(start: int, end: int, medium: str = "GPU") -> Stored:
    return Stored(list(range(start + 1, end + 1)), start or None, TOKENS[start * BLOCK : end * BLOCK], BLOCK, medium)


def script(seed: int) -> list[list[Event]]:
    """What one engine announces; everybody writes the same keys."""
    rng = random.Random(seed)
    out: list[list[Event]] = []
    for _ in range(ROUNDS):
        choice = rng.random()
        if choice < 0.02:
            out.append([Cleared()])
        elif choice < 0.55:
            start = rng.randrange(BLOCKS)
            out.append([stored(start, rng.randint(start + 1, BLOCKS), rng.choice(("GPU", "CPU")))])
        else:
            hashes = [rng.randint(1, BLOCKS) for _ in range(4)]
            out.append([Removed(hashes, rng.choice(("GPU", "CPU")))])
    return out


def run(jobs: list[Callable[[], None]]) -> None:
    """All at once; the first failure is raised."""
    failures: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def test_a_stable_pod_is_never_lost_from_sight() -> None:
    """While others write the same keys, a pod that does not change always has its whole match."""
    index, model = Index(BLOCK), ModelOracle(BLOCK)
    stable = index.add_stream("stable", 0)
    stable.apply([maps(stored(0, BLOCKS))])
    model.add_stream("stable", 0).apply([stored(0, BLOCKS)])
    writers = []
    for number in range(WRITERS):
        pod, rank = f"w{number // 2}", number % 2
        writers.append((index.add_stream(pod, rank), model.add_stream(pod, rank), script(number)))
    done = threading.Event()
    asked = [0] * 3

    def write(stream: Stream, events: list[list[Event]], rank: int) -> Callable[[], None]:
        def job() -> None:
            for few in events:
                stream.apply([maps(*few, rank=rank)])

        return job

    def read(number: int) -> Callable[[], None]:
        def job() -> None:
            while not done.is_set() or not asked[number]:
                for answer in (index.score(KEYS, [], [1.0, 0.5]), index.score_tokens(ASK, [], [1.0, 0.5])):
                    found = {pod: (blocks, score, sum(bits)) for pod, _, blocks, score, bits, _ in answer}
                    assert found.pop("stable") == (BLOCKS, float(BLOCKS), BLOCKS)
                    for blocks, score, counted in found.values():
                        assert 0 < blocks == counted <= BLOCKS
                        assert blocks / 2 <= score <= blocks
                for holders in index.holders(KEYS, []):
                    assert ("stable", 0, 0, 0, False) in holders
                hashes = struct.pack("<2Q", 1, BLOCKS)
                assert all(("stable", 0, 0, 0, False) in holders for _, holders in index.holders_of_ints(hashes, []))
                asked[number] += 1

        return job

    failures: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as failure:
            failures.append(failure)

    readers = [threading.Thread(target=guarded, args=(read(number),), daemon=True) for number in range(3)]
    for reader in readers:
        reader.start()
    try:
        run([write(stream, events, oracle.rank) for stream, oracle, events in writers])
    finally:
        done.set()
        for reader in readers:
            reader.join(30)
    assert not failures, failures[0]
    assert all(asked)
    for stream, oracle, events in writers:
        for few in events:
            oracle.apply(few)
        assert stream.claims == len(oracle.counts)
        assert stream.unresolved == oracle.unresolved
    tiers = index.tiers
    holders = model.holders()
    assert index.blocks == len(holders)
    keys = query_keys(TOKENS, BLOCK)
    for key, found in zip(keys, index.holders(KEYS, []), strict=True):
        assert {(pod, rank, tiers[bit], *rest) for pod, rank, bit, *rest in found} == holders[key]
    weights = {"gpu": 1.0, "cpu": 0.5, "disk": 0.5}
    expected = model.matches(keys, weights)
    answer = index.score(KEYS, [], [1.0, 0.5])
    assert {pod for pod, *_ in answer} == set(expected)
    for pod, rank, blocks, score, *_ in answer:
        assert (blocks, score) == (expected[pod][rank].blocks, expected[pod][rank].score)


def test_streams_come_and_go_under_readers() -> None:
    """Opening, fencing and closing streams never disturbs a reader or leaks a claim."""
    index = Index(BLOCK)
    stable = index.add_stream("stable", 0)
    stable.apply([maps(stored(0, BLOCKS))])
    done = threading.Event()

    def churn(number: int) -> Callable[[], None]:
        def job() -> None:
            for turn in range(150):
                stream = index.add_stream(f"pod-{number}", turn % 3)
                stream.apply([maps(stored(0, BLOCKS), rank=None), maps(stored(3, BLOCKS, "disk"), rank=None)])
                assert stream.claims == BLOCKS + BLOCKS - 3
                if turn % 2:
                    assert stream.clear() == BLOCKS + BLOCKS - 3
                    stream.apply([maps(stored(0, 5), rank=None)])
                stream.close()

        return job

    def read() -> None:
        while not done.is_set():
            found = {answer[0]: answer[2] for answer in index.score(KEYS, [], [1.0])}
            assert found["stable"] == BLOCKS
            assert [answer[0] for answer in index.score(KEYS, ["stable", "absent"], [1.0])] == ["stable"]

    def churn_all() -> None:
        try:
            run([churn(number) for number in range(4)])
        finally:
            done.set()

    run([churn_all, read, read])
    assert index.claims == stable.claims == BLOCKS
    assert index.blocks == BLOCKS
    assert [answer[:3] for answer in index.score(KEYS, [], [1.0])] == [("stable", 0, BLOCKS)]


def test_a_fenced_stream_is_not_scored() -> None:
    """Once clear has returned, no reader finds the dead engine's blocks."""
    index = Index(BLOCK)
    stream = index.add_stream("p", 0)
    turn = [0]  # odd while the engine is dead
    answered = threading.Event()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            before = turn[0]
            found = index.score(KEYS, [], [1.0])
            if before % 2 and turn[0] == before:
                assert found == []
                answered.set()

    def write() -> None:
        try:
            for _ in range(100):
                stream.apply([maps(stored(0, BLOCKS))])
                stream.clear()
                answered.clear()
                turn[0] += 1
                assert answered.wait(5)
                turn[0] += 1
        finally:
            stop.set()

    run([write, read])
