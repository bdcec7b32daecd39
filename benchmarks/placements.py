"""What placements cost: to record, to ask with, while events are applied, to sweep, and in memory."""

import itertools
import random
import resource
import statistics
import time
from collections.abc import Callable

from load import BLOCK_SIZE, Chains, machine, pack

from kvindex_server._core import Index, block_keys

WEIGHTS = [1.0, 0.8, 0.5]
PODS = 64
ROUNDS = 7


def median_us(call: Callable[[], object], times: int) -> float:
    samples = []
    for _ in range(times):
        begin = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - begin) / 1000)
    return statistics.median(samples)


def apply_rate(placed: bool) -> float:
    """Blocks stored per second, in millions; `placed`: each of them confirms a placement."""
    index, chains = Index(BLOCK_SIZE, max_placements=1 << 24), Chains(5)
    stream = index.add_stream("pod", 0)
    work = [chains.payloads(2048, 128) for _ in range(50)]
    if placed:
        for _, _, tokens in work:
            index.place("pod", 0, block_keys(pack(tokens), BLOCK_SIZE), 3600)
    begin = time.process_time()
    for messages, _, _ in work:
        stream.apply(messages)
    spent = time.process_time() - begin
    assert index.placements["confirmed"] == (index.claims if placed else 0)
    return index.claims / spent / 1e6


def resident() -> int:
    """Bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    print(machine())
    rng = random.Random(1)
    chains, index = Chains(3), Index(BLOCK_SIZE, max_placements=1 << 24)
    streams = [index.add_stream(f"pod-{number}", 0) for number in range(PODS)]
    shared, _, shared_tokens = chains.payloads(8192, 128)
    for stream in streams:
        stream.apply(shared[:2])  # 256 blocks
    keys = block_keys(pack(shared_tokens), BLOCK_SIZE)
    pods = itertools.cycle(f"pod-{number}" for number in range(PODS))

    rows: list[tuple[str, float]] = []

    def ask() -> object:
        return index.score(keys[: 512 * 8], [], WEIGHTS)

    rows.append(("score 512 blocks, 64 pods hold 256, nothing placed", median_us(ask, 2000)))
    index.place("pod-0", 0, keys[: 512 * 8], 3600)
    rows.append(("the same, and one pod placed for the other 256", median_us(ask, 2000)))
    for _ in range(PODS):
        index.place(next(pods), 0, rng.randbytes(8 * 256), 3600)
    rows.append(("the same, and all pods placed for other prompts", median_us(ask, 2000)))
    for number in range(PODS):
        index.place(f"pod-{number}", 0, keys[: 512 * 8], 3600)
    rows.append(("the same, and all pods placed for the other 256", median_us(ask, 2000)))
    fresh = [rng.randbytes(8 * 512) for _ in range(300)]
    rows.append(
        ("record 512 blocks of a new prompt", median_us(lambda: index.place(next(pods), 0, fresh.pop(), 3600), 300))
    )
    again = keys[: 512 * 8]
    rows.append(
        ("record 512 blocks, placed already or held", median_us(lambda: index.place("pod-1", 0, again, 60), 300))
    )
    long = [rng.randbytes(8 * 8192) for _ in range(60)]
    rows.append(
        ("record 8,192 blocks of a new prompt", median_us(lambda: index.place(next(pods), 0, long.pop(), 3600), 60))
    )
    before, known = resident(), index.placements["blocks"]
    for _ in range(128):
        index.place(next(pods), 0, rng.randbytes(8 * 8192), 3600)
    added = index.placements["blocks"] - known
    grown = resident() - before
    index.advance_clock(7200)
    begin = time.perf_counter()
    swept = index.placements["blocks"]
    index.sweep_placements()
    rows.append((f"sweep {swept:,} expired blocks", (time.perf_counter() - begin) * 1e6))
    print("| case | p50 µs |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value:,.1f} |")
    print(f"\nbytes per placed block by RSS: {grown / added:.0f}\n")
    for placed in (False, True):
        rates = sorted(apply_rate(placed) for _ in range(ROUNDS))
        print(
            f"apply, {'each block confirms a placement' if placed else 'nothing placed'}: {rates[ROUNDS // 2]:.2f} M/s"
        )


if __name__ == "__main__":
    main()
