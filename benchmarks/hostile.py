"""Memory and time of one stream whose engine sends what can never be used, or whose replay hangs."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from load import BLOCK_SIZE, batch, machine, stored
from memory import resident_bytes

from kvindex_server._core import Index
from kvindex_server.ingest import Bounds, Ingest
from kvindex_server.stream import StreamStatus

MILLION = 1_000_000


def orphans() -> Iterator[bytes]:
    """A million stored blocks, none of whose parents ever comes."""
    for first in range(0, MILLION, 1000):
        yield batch([stored([2 * n + 1], 2 * n, [n % 1000] * BLOCK_SIZE) for n in range(first, first + 1000)])


def orphan_chains() -> Iterator[bytes]:
    """The same as chains: each waits for the one before, the first for nobody."""
    for first in range(1, MILLION, 1000):
        yield batch([stored([n + 1], n, [n % 1000] * BLOCK_SIZE) for n in range(first, first + 1000)])


def removals() -> Iterator[bytes]:
    """A million removals of blocks nobody stored."""
    for first in range(0, MILLION, 1000):
        yield batch(
            [{"type": "BlockRemoved", "block_hashes": [n], "medium": "GPU"} for n in range(first, first + 1000)]
        )


def unmapped() -> Iterator[bytes]:
    """A million stored blocks without tokens, so that no key is known."""
    for first in range(0, MILLION + 100_000, 1000):
        yield batch([stored([n], None, []) for n in range(first, first + 1000)])


def stuck_replay() -> Iterator[bytes]:
    """A million live messages while a replay never ends."""
    for n in range(MILLION):
        yield batch([stored([n], None, [n % 1000] * BLOCK_SIZE)])


CASES: dict[str, Callable[[], Iterator[bytes]]] = {
    each.__name__: each for each in (orphans, orphan_chains, removals, unmapped, stuck_replay)
}


def measure(case: str) -> None:
    """One case in this process; its row of the table."""
    index = Index()
    stream = index.add_stream("pod", 0)
    stuck = case == "stuck_replay"
    ingest = Ingest(stream, StreamStatus("pod", 0, "m"), Bounds(seconds=86_400), (lambda _: None) if stuck else None)
    ingest.start()
    before, peak, spent = resident_bytes(), 0, 0.0
    for sequence, payload in enumerate(CASES[case]()):
        started = time.process_time()
        ingest.live([(sequence, payload)])
        spent += time.process_time() - started
        if sequence % 256 == 0:
            peak = max(peak, resident_bytes() - before)
    peak = max(peak, resident_bytes() - before)
    status = ingest.status()
    kept = f"{stream.claims} claims, {stream.orphans} orphans, {stream.unresolved} unresolved"
    counted = ", ".join(f"{reason} {times}" for reason, times in sorted(status.dropped.items())) or "-"
    print(f"| {case} | {kept} | {peak / 2**20:.0f} MiB | {spent:.1f} s | {counted} | {status.trust.name} |")


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    print(machine())
    print("| case | kept at the end | peak RSS growth | CPU | counted | trust |\n|---|---|---|---|---|---|", flush=True)
    for case in CASES:
        subprocess.run([sys.executable, __file__, case], check=True, timeout=600)


if __name__ == "__main__":
    main()
