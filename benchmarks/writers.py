"""Simulated pods that publish blocks at a steady rate, in a process of their own: it prints its endpoints, then obeys.

Lines on standard input: `start RATE` (blocks per second over all pods), `stop` (answers with the messages sent so far).
"""

import select
import sys
import time

from load import Chains, batch, stored

from kvindex_server import wire

PER_EVENT = 128
SLOTS = 8


def main() -> None:
    pods = int(sys.argv[1])
    publishers = [wire.publisher("tcp://127.0.0.1:*") for _ in range(pods)]
    sequences = [0] * pods
    messages = [payloads(number) for number in range(pods)]
    print(" ".join(each.endpoint for each in publishers), flush=True)
    rate = count = total = 0
    begun = time.perf_counter()
    while True:
        if select.select([sys.stdin], [], [], 0.002 if rate else 1.0)[0]:
            order = sys.stdin.readline().split()
            if not order:
                return
            if order[0] == "start":
                rate, count, begun = int(order[1]), 0, time.perf_counter()
            else:
                rate = 0
                print(total, flush=True)
        due = int((time.perf_counter() - begun) * rate / PER_EVENT)
        while rate and count < due:
            pod = count % pods
            payload = messages[pod][sequences[pod] % SLOTS]
            publishers[pod].send([b"", sequences[pod].to_bytes(8, "big"), payload])
            sequences[pod] += 1
            count += 1
            total += 1


def payloads(number: int) -> list[bytes]:
    """Each stores one event's blocks and removes those of four messages before."""
    chains = Chains(100 + number)
    events = [(chains.hashes(PER_EVENT), chains.tokens(PER_EVENT)) for _ in range(SLOTS)]
    return [
        batch(
            [
                stored(hashes, None, tokens),
                {"type": "BlockRemoved", "block_hashes": events[(slot + 4) % SLOTS][0], "medium": "GPU"},
            ]
        )
        for slot, (hashes, tokens) in enumerate(events)
    ]


if __name__ == "__main__":
    main()
