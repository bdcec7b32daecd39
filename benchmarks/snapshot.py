"""What a snapshot costs: writing it beside queries, its size, and the way back to a first answer."""

import argparse
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from load import Chains, machine
from memory import resident_bytes

from kvindex_server._core import Index, Stream, block_keys
from kvindex_server.snapshot import File, SavedStream, Writer
from kvindex_server.stream import Cause, Trust

PODS = 64
CHAIN = 2048


def filled(claims: int) -> tuple[Index, list[Stream], bytes]:
    """An index of so many claims over 64 pods, and the keys of one prompt in it."""
    index, chains = Index(), Chains(3)
    streams = [index.add_stream(f"pod-{number}", 0) for number in range(PODS)]
    tokens: list[int] = []
    while index.claims < claims:
        messages, _, tokens = chains.payloads(CHAIN, 128)
        streams[index.claims // CHAIN % PODS].apply(messages)
    packed = b"".join(token.to_bytes(4, "little") for token in tokens[: 512 * 16])
    return index, streams, block_keys(packed, 16)


def write(path: Path, streams: list[Stream]) -> int:
    writer = Writer(path)
    for number, stream in enumerate(streams):
        writer.stream(
            SavedStream(
                model="m",
                pod=f"pod-{number}",
                rank=0,
                endpoint="tcp://127.0.0.1:1",
                replay_endpoint="",
                incarnation="",
                epoch=0,
                last_sequence=1,
                digest=1,
                trust=Trust.EXACT,
                cause=Cause.IN_SEQUENCE,
                reason="",
                claims=stream.claims,
                state=stream.snapshot(),
            )
        )
    return writer.close()


def match_times(index: Index, keys: bytes, until: threading.Event, at_least: int) -> list[float]:
    """Microseconds of matches of 512 blocks, one every millisecond."""
    times = []
    while not until.is_set() or len(times) < at_least:
        begin = time.perf_counter()
        index.score(keys, [], [1.0])
        times.append((time.perf_counter() - begin) * 1e6)
        time.sleep(0.001)
    return times


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def load(path: Path, keys: bytes) -> tuple[float, int]:
    """Seconds from opening the file to a first right answer, and the claims that are back."""
    begin = time.perf_counter()
    file, index = File(path), Index()
    streams = [index.add_stream(place.saved.pod, 0) for place in file.streams]
    with ThreadPoolExecutor(2) as pool:
        restored = pool.map(
            lambda pair: pair[0].restore(file.read(pair[1]).state), zip(streams, file.streams, strict=True)
        )
        assert all(restored)
    assert index.score(keys, [], [1.0])[0][2] == 512
    file.close()
    return time.perf_counter() - begin, index.claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--claims", type=int, default=10_000_000)
    claims = parser.parse_args().claims
    print(machine())
    before = resident_bytes()
    index, streams, keys = filled(claims)
    grown = resident_bytes() - before
    done = threading.Event()
    done.set()
    idle = match_times(index, keys, done, 2000)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.kvix"
        writes, busy, size = [], [], 0
        for _ in range(3):
            done = threading.Event()
            with ThreadPoolExecutor(1) as pool:
                asking = pool.submit(match_times, index, keys, done, 0)
                begin = time.perf_counter()
                size = write(path, streams)
                writes.append(time.perf_counter() - begin)
                done.set()
                busy += asking.result()
        loads = [load(path, keys) for _ in range(3)]
    assert {each for _, each in loads} == {index.claims}
    print("| measure | value |\n|---|---|")
    print(f"| claims, RSS of the index | {index.claims / 1e6:.1f} M, {grown / 2**20:.0f} MiB |")
    print(f"| write (median of 3) | {statistics.median(writes):.2f} s |")
    print(f"| file | {size / 2**20:.0f} MiB, {size / index.claims:.1f} bytes a claim |")
    print(f"| match of 512 blocks, idle: p50, p99 | {percentile(idle, 0.5):.1f}, {percentile(idle, 0.99):.1f} µs |")
    print(f"| the same while writing | {percentile(busy, 0.5):.1f}, {percentile(busy, 0.99):.1f} µs |")
    print(
        f"| open, check, restore, first answer (median of 3) | {statistics.median(each for each, _ in loads):.2f} s |"
    )


if __name__ == "__main__":
    main()
