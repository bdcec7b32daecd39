"""How memory and time grow with claims, pods and prompt length; docs/scaling.md has the results.

Ends the growth before the process would need more than --max-gib of memory.
"""

import argparse
import random
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgpack
from load import BLOCK_SIZE, batch, machine, removals, stored

from kvindex_server._core import Index, Stream, block_keys

PER_MESSAGE = 128
CHAIN_MESSAGES = 16
CHAIN = PER_MESSAGE * CHAIN_MESSAGES
"""Blocks of a chain: 32,768 tokens."""
PODS = 64
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
"""Millions of claims at which a growing index is looked at."""
KEPT = 2000
CALLS = 400
MIB, GIB = 1 << 20, 1 << 30


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Chains:
    """Messages cheap enough to make that making them does not hide the index: only hashes and first tokens change.

    A chain's keys follow from its first token, so that no two chains share a block.
    """

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self.tokens = [self._dice.randrange(1 << 17, 1 << 18) for _ in range(CHAIN * BLOCK_SIZE)]
        self._parts = [self._template(number) for number in range(CHAIN_MESSAGES)]
        self.made = 0

    def _template(self, number: int) -> tuple[bytes, bytes, bytes]:
        """One message cut at its hashes and its parent: (before, between, after)."""
        mark = 0xFFFF_FFFF_FFFF_FFFF
        first = number * PER_MESSAGE * BLOCK_SIZE
        tokens = self.tokens[first : first + PER_MESSAGE * BLOCK_SIZE]
        packed = batch([stored([mark] * PER_MESSAGE, mark if number else None, tokens)])
        hashes = msgpack.packb(mark) * PER_MESSAGE
        before, _, rest = packed.partition(hashes)
        if not number:
            return before, b"", rest
        between, _, after = rest.partition(msgpack.packb(mark))
        return before, between, after

    def chain(self) -> tuple[int, list[bytes], list[int]]:
        """(first token, messages, engine hashes as the last 16 of them)."""
        first_token = (1 << 18) + self.made
        self.made += 1
        messages, parent = [], b""
        for number, (before, between, rest) in enumerate(self._parts):
            raw = self._dice.randbytes(8 * PER_MESSAGE)
            hashes = [b"\xcf" + raw[at : at + 8] for at in range(0, len(raw), 8)]
            after = rest
            if number == 0:
                after = rest.replace(msgpack.packb(self.tokens[0]), b"\xce" + struct.pack(">I", first_token), 1)
            messages.append(b"".join((before, *hashes, between, parent, after)))
            parent = hashes[-1]
        return first_token, messages, [int.from_bytes(each[1:], "big") for each in hashes[-16:]]

    def keys(self, first_token: int, blocks: int) -> bytes:
        """Of the first blocks of that chain."""
        tokens = [first_token, *self.tokens[1 : blocks * BLOCK_SIZE]]
        return block_keys(struct.pack(f"<{len(tokens)}I", *tokens), BLOCK_SIZE)


def microseconds(calls: Iterator[Callable[[], object]]) -> tuple[float, float]:
    """(p50, p99) of these calls."""
    times = []
    for call in calls:
        began = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - began) / 1000)
    times.sort()
    return statistics.median(times), times[int(len(times) * 0.99)]


def growth(most: int, max_bytes: int) -> list[tuple[int, ...]]:
    """One index grows from nothing; 64 pods, no block shared. Rows: (claims, RSS, own account)."""
    print(f"\n### One index grows: {PODS} pods, chains of {CHAIN} blocks of {BLOCK_SIZE} tokens, no block shared\n")
    print("| claims | bytes/claim RSS | own account | per GiB | store, M blocks/CPU-s | match 512 p50, p99 µs |")
    print("|---|---|---|---|---|---|", flush=True)
    index, chains, dice = Index(), Chains(1), random.Random(2)
    streams = [index.add_stream(f"pod-{number}", 0) for number in range(PODS)]
    held = [chains.chain() for _ in range(64)]  # so that the messages' memory is no part of the growth
    empty, rows = resident_bytes(), []
    del held
    kept: list[int] = []
    for step in (each * 1_000_000 for each in STEPS):
        if step > most or (rows and empty + rows[-1][1] / rows[-1][0] * step * 1.15 > max_bytes):
            break
        spent, began = 0.0, index.claims
        while index.claims < step:
            prepared = [(streams[chains.made % PODS], *chains.chain()) for _ in range(64)]
            cpu = time.process_time()
            for stream, _, messages, _ in prepared:
                stream.apply(messages)
            spent += time.process_time() - cpu
            kept.append(prepared[0][1])
        claims = index.claims
        chosen = [chains.keys(token, 512) for token in dice.choices(kept, k=CALLS)]
        match = microseconds(partial(index.score, keys, [], [1.0]) for keys in chosen)
        rss = resident_bytes() - empty
        rows.append((claims, rss, index.bytes))
        print(
            f"| {claims / 1e6:.1f} M | {rss / claims:.1f} | {index.bytes / claims:.1f} "
            f"| {GIB / rss * claims / 1e6:.1f} M | {(claims - began) / spent / 1e6:.2f} "
            f"| {match[0]:.1f}, {match[1]:.1f} |",
            flush=True,
        )
    snapshots(index.claims, streams)
    return rows


def snapshots(claims: int, streams: list[Stream]) -> None:
    """Every stream's state is taken; a quarter of them, or as many as 25 M claims, is given to a new index."""
    size, some = 0, max(1, len(streams) * min(claims // 4, 25_000_000) // claims)
    began, states = time.perf_counter(), []
    for number, stream in enumerate(streams):
        state = stream.snapshot()
        size += len(state)
        if number < some:
            states.append(state)
    taken = time.perf_counter() - began
    other = Index(BLOCK_SIZE)
    unused = [other.add_stream(f"pod-{number}", 0) for number in range(some)]
    began = time.perf_counter()
    for stream, state in zip(unused, states, strict=True):
        if not stream.restore(state):
            raise AssertionError("a snapshot was refused")
    given, restored = time.perf_counter() - began, other.claims
    print(f"\nSnapshot of {claims / 1e6:.1f} M claims: {size / claims:.2f} bytes a claim, {size / MIB:.0f} MiB,")
    print(f"{taken:.1f} s ({taken / claims * 1e9:.0f} ns a claim). Restored: {restored / 1e6:.1f} M claims")
    print(f"in {given:.1f} s ({given / restored * 1e9:.0f} ns a claim).", flush=True)


def pods() -> list[tuple[int, float, float]]:
    """All pods hold the same chain of 512 blocks, or none but one does. Rows: (pods, p50 all, p50 one)."""
    print("\n### Pods: 512 blocks asked, called from Python, the answer's list included\n")
    print("| pods | all hold: p50, p99 µs | one holds: p50, p99 µs | of 16 candidates: p50 µs |")
    print("|---|---|---|---|", flush=True)
    rows = []
    for count in (1, 4, 16, 64, 256, 1024, 4096):
        index, chains = Index(), Chains(3)
        streams = [index.add_stream(f"pod-{number}", 0) for number in range(count)]
        shared, messages, _ = chains.chain()
        for stream in streams:
            stream.apply(messages[:4])
        own, messages, _ = chains.chain()
        streams[-1].apply(messages[:4])
        everywhere, once = chains.keys(shared, 512), chains.keys(own, 512)
        some = [f"pod-{number}" for number in range(min(16, count))]
        calls = CALLS if count <= 256 else CALLS // 4
        shared_time, own_time, some_time = (
            microseconds(partial(index.score, keys, names, [1.0]) for _ in range(calls))
            for keys, names in ((everywhere, []), (once, []), (everywhere, some))
        )
        rows.append((count, shared_time[0], own_time[0]))
        print(
            f"| {count} | {shared_time[0]:.1f}, {shared_time[1]:.1f} "
            f"| {own_time[0]:.1f}, {own_time[1]:.1f} | {some_time[0]:.1f} |",
            flush=True,
        )
    return rows


def sharing() -> None:
    """64 pods, 4 M claims, each chain held by several of them."""
    print("\n### Shared blocks: 4 M claims of 64 pods\n")
    print("| holders of each block | bytes/claim, own account | claims per GiB |\n|---|---|---|", flush=True)
    for holders in (1, 2, 8, 64):
        index, chains = Index(), Chains(5)
        streams = [index.add_stream(f"pod-{number}", 0) for number in range(PODS)]
        while index.claims < 4_000_000:
            first = chains.made * holders
            _, messages, _ = chains.chain()
            for number in range(first, first + holders):
                streams[number % PODS].apply(messages)
        each = index.bytes / index.claims
        print(f"| {holders} | {each:.1f} | {GIB / each / 1e6:.1f} M |", flush=True)


def prompts() -> list[tuple[int, float, float]]:
    """Prompts held whole. Rows: (tokens, p50 with one holder, p50 with 64)."""
    print("\n### Prompt length: hashing and matching of token ids, held whole\n")
    print("| tokens | one holder: p50, p99 µs | 64 holders: p50, p99 µs |\n|---|---|---|", flush=True)
    index, chains = Index(), Chains(4)
    streams = [index.add_stream(f"pod-{number}", 0) for number in range(PODS)]
    asked = []
    for holders in (1, PODS):
        words, hashes, parent = chains.tokens * 4, [], None
        words[0] += holders
        for begin in range(0, 4 * CHAIN, PER_MESSAGE):
            hashes = [random.getrandbits(64) for _ in range(PER_MESSAGE)]
            tokens = words[begin * BLOCK_SIZE : (begin + PER_MESSAGE) * BLOCK_SIZE]
            message = batch([stored(hashes, parent, tokens)])
            for stream in streams[:holders]:
                stream.apply([message])
            parent = hashes[-1]
        asked.append(words)
    rows = []
    for tokens in (128, 512, 2048, 8192, 32_768, 131_072):
        times = []
        for words in asked:
            packed = struct.pack(f"<{tokens}I", *words[:tokens])
            times.append(microseconds(partial(index.score_tokens, packed, [], [1.0]) for _ in range(CALLS)))
        rows.append((tokens, times[0][0], times[1][0]))
        print(f"| {tokens} | {times[0][0]:.1f}, {times[0][1]:.1f} | {times[1][0]:.1f}, {times[1][1]:.1f} |", flush=True)
    return rows


def events() -> None:
    """CPU of one event of each kind, messages made beforehand; median of 5 rounds."""
    print("\n### CPU of one event, message and all\n")
    print("| event | µs of CPU | per block ns |\n|---|---|---|", flush=True)
    costs: dict[str, list[float]] = {"store 128 blocks": [], "store 1 block": [], "remove 1 block": []}
    for seed in range(5):
        index, dice = Index(), random.Random(seed)
        stream, chains = index.add_stream("pod", 0), Chains(seed)
        whole = [message for _ in range(50) for message in chains.chain()[1]]
        hashes = [dice.getrandbits(64) for _ in range(20_000)]
        single = [batch([stored([each], None, dice.choices(range(128_000), k=BLOCK_SIZE))]) for each in hashes]
        for name, messages in (
            ("store 128 blocks", whole),
            ("store 1 block", single),
            ("remove 1 block", removals(hashes, 1)),
        ):
            began = time.process_time()
            stream.apply(messages)
            costs[name].append((time.process_time() - began) / len(messages) * 1e6)
    for name, each in costs.items():
        cost = statistics.median(each)
        print(f"| {name} | {cost:.2f} | {cost * 1000 / int(name.split()[1]):.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", type=int, default=100_000_000, help="at most so many")
    parser.add_argument("--max-gib", type=float, default=6.0)
    parser.add_argument("--plots", type=Path, help="a directory for SVG files")
    given = parser.parse_args()
    began = time.monotonic()
    print(machine())
    by_claims = growth(given.claims, int(given.max_gib * GIB))  # first, while the process has no memory to use again
    sharing()
    by_length, by_pods = prompts(), pods()
    events()
    if given.plots:
        from scaling_plots import draw

        draw(by_claims, by_pods, by_length, given.plots)
    print(f"\n{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
