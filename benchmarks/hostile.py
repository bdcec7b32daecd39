"""Memory and time of one stream whose engine sends what can never be used, or whose replay hangs."""

import resource
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


def orphans_one_parent() -> Iterator[bytes]:
    """A million stored blocks behind one parent that never comes: a fleet's system prompt, after joining late."""
    for first in range(0, MILLION, 1000):
        yield batch([stored([n + 1], 0, [n % 1000] * BLOCK_SIZE) for n in range(first, first + 1000)])


def orphans_of_many_tokens() -> Iterator[bytes]:
    """Blocks of a million tokens each that wait for their parents: 200 MiB on the wire."""
    for n in range(200):
        yield batch([stored([2 * n + 1], 2 * n, [1] * 2**20) | {"block_size": 2**20}])


def long_names() -> Iterator[bytes]:
    """An adapter's name of 4 KB over 20,000 blocks of one token, and 40,000 that differ by a bare string each."""
    for n in range(10):
        many = {"token_ids": [n] * 20_000, "block_size": 1}
        yield batch([stored(list(range(20_000)), None, []) | many | {"lora_name": "x" * 4096}])
        many = {"token_ids": [n] * 40_000, "block_size": 1}
        yield batch([stored(list(range(40_000)), None, []) | many | {"extra_keys": [[f"i{k}"] for k in range(40_000)]}])


def topologies() -> Iterator[bytes]:
    """2,500 times one block and then the clearing of all, in one message."""
    yield batch([stored([1], None, [1] * BLOCK_SIZE), {"type": "AllBlocksCleared"}] * 2500)


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
    each.__name__: each
    for each in (
        orphans,
        orphan_chains,
        orphans_one_parent,
        orphans_of_many_tokens,
        long_names,
        topologies,
        removals,
        unmapped,
        stuck_replay,
    )
}


def measure(case: str) -> None:
    """One case in this process; its row of the table."""
    index = Index()
    others = [index.add_stream(f"pod-{n}", 0) for n in range(500 if case == "topologies" else 0)]
    for each in others:
        each.apply([batch([stored([1], None, [1] * BLOCK_SIZE)])])
    stream = index.add_stream("pod", 0)
    stuck = case == "stuck_replay"
    ingest = Ingest(stream, StreamStatus("pod", 0, "m"), Bounds(seconds=86_400), (lambda _: None) if stuck else None)
    ingest.start()
    # Messages are made outside the clock, but not outside the memory: they are small beside what is measured.
    before, spent = resident_bytes(), 0.0
    for sequence, payload in enumerate(CASES[case]()):
        started = time.process_time()
        ingest.live([(sequence, payload)])
        spent += time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    status = ingest.status()
    kept = f"{stream.claims} claims, {stream.orphans} orphans, {stream.unresolved} unresolved"
    reasons = status.dropped | status.decode_errors
    counted = ", ".join(f"{reason} {times}" for reason, times in sorted(reasons.items())) or "-"
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
