"""How long matching takes: keys, hash and match, many holders, and a divergence after one block."""

import itertools
import statistics
import time
from collections.abc import Callable

from load import BLOCK_SIZE, Chains, machine, pack

from kvindex_server._core import Index, block_keys

WEIGHTS = [1.0, 0.8, 0.5]


def median_us(call: Callable[[], object], times: int) -> float:
    samples = []
    for _ in range(times):
        begin = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - begin) / 1000)
    return statistics.median(samples)


def main() -> None:
    print(machine())
    chains, index = Chains(3), Index()
    work = [chains.payloads(2048, 128) for _ in range(500)]
    streams = [index.add_stream(f"pod-{number}", 0) for number in range(64)]
    for number, (messages, _, _) in enumerate(work):
        streams[number % 64].apply(messages)
    shared, _, shared_tokens = chains.payloads(8192, 128)
    for stream in streams:
        stream.apply(shared[:4])
    streams[0].apply(shared[4:])
    print(f"index: {index.claims} claims, {index.blocks} blocks\n")
    single = [block_keys(pack(tokens), BLOCK_SIZE)[: 512 * 8] for _, _, tokens in work[:200]]
    many = block_keys(pack(shared_tokens), BLOCK_SIZE)[: 512 * 8]
    diverging = [keys[:8] + b"\1" * 8 * 511 for keys in single]
    tokens = pack(shared_tokens)
    turn = itertools.count()
    cases: list[tuple[str, Callable[[], object], int]] = [
        ("512 blocks, one holder", lambda: index.score(single[next(turn) % 200], [], WEIGHTS), 2000),
        ("512 blocks, 64 holders", lambda: index.score(many, [], WEIGHTS), 2000),
        ("hash + match 131,072 tokens", lambda: index.score_tokens(tokens, [], WEIGHTS), 300),
        ("divergence after 1 of 512 blocks", lambda: index.score(diverging[next(turn) % 200], [], WEIGHTS), 5000),
    ]
    print("| case | p50 µs |\n|---|---|")
    for name, call, times in cases:
        print(f"| {name} | {median_us(call, times):.1f} |")


if __name__ == "__main__":
    main()
