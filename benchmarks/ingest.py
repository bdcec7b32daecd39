"""How many blocks and events a CPU-second of decoding and indexing takes in, without sockets."""

import statistics
import time

from load import Chains, machine, removals

from kvindex_server._core import Index


def one_round(per_event: int, blocks: int) -> tuple[float, float]:
    """Blocks stored and hashes removed per CPU-second."""
    index = Index()
    chains = Chains(per_event)
    stream = index.add_stream("pod", 0)
    work = [chains.payloads(2048, per_event) for _ in range(blocks // 2048)]
    begin = time.process_time()
    for messages, _, _ in work:
        stream.apply(messages)
    store = time.process_time() - begin
    assert index.claims == len(work) * 2048
    gone = [removals(hashes[::-1], 16) for _, hashes, _ in work]
    begin = time.process_time()
    for messages in gone:
        stream.apply(messages)
    remove = time.process_time() - begin
    assert index.claims == 0
    return len(work) * 2048 / store, len(work) * 2048 / remove


def main() -> None:
    print(machine())
    print("| case | blocks per CPU-second (median of 5) |\n|---|---|")
    for per_event in (128, 1):
        rounds = [one_round(per_event, 400_000 if per_event > 1 else 100_000) for _ in range(5)]
        print(f"| store, {per_event} blocks per event | {statistics.median(r[0] for r in rounds) / 1e6:.2f} M |")
    print(f"| remove, 1 hash per event, 16 events a message | {statistics.median(r[1] for r in rounds) / 1e6:.2f} M |")


if __name__ == "__main__":
    main()
