"""Publishes a load from a socket per pod, in a process of its own, so that its CPU is not counted.

Told what to do by lines on stdin: `open` (answers with the endpoints), `subscribed` (answers when every socket has
a subscriber), `send PHASE` (answers when all is handed to ZeroMQ), `pace PHASE` (the same, slowly), `close`.
"""

import json
import random
import sys
import time

import zmq
from load import BLOCK_SIZE, Traffic, batch, removals, span_blocks, stored

from contenders.loads import traffic_of

PHASES = (
    "store, 128 blocks an event",
    "remove, 1 hash an event",
    "store, 1 block an event and message",
    "remove once more",
)
SENTINELS = {phase: [200_000 + number] * BLOCK_SIZE for number, phase in enumerate(PHASES)}
"""Ends each phase: a block that every pod stores last."""
PROBES = 10
"""Whole prompts that some pod holds after a store, and none after a removal."""
PACED = 10
"""Messages per 10 ms when paced."""


def phases(traffic: Traffic) -> dict[str, list[tuple[int, bytes]]]:
    """(pod, payload) of each phase, in the order of sending."""
    whole, single = [], []
    for chain in traffic.chains:
        whole.append((chain.pod, batch([stored(chain.hashes, chain.parent, chain.tokens)])))
        parent = chain.parent
        for place, each in enumerate(chain.hashes):
            tokens = chain.tokens[place * BLOCK_SIZE : (place + 1) * BLOCK_SIZE]
            single.append((chain.pod, batch([stored([each], parent, tokens)])))
            parent = each
    queues = [[(pod, payload) for payload in removals(hashes, 16)] for pod, hashes in traffic.removed.items()]
    gone = [each for turn in range(max(map(len, queues))) for queue in queues for each in queue[turn : turn + 1]]
    return dict(zip(PHASES, (whole, gone, single, gone), strict=True))


def main() -> None:
    """Serve stdin."""
    traffic = traffic_of(sys.argv[1:])
    pods = sorted(traffic.removed)
    messages = phases(traffic)
    for number, (phase, tokens) in enumerate(SENTINELS.items()):
        last = batch([stored([2**63 + number], None, tokens)])
        messages[phase] = [*messages[phase], *((pod, last) for pod in pods)]
    probes = [
        [token for span in spans for token in span_blocks(span)[1]]
        for spans in random.Random(2).sample(traffic.prompts, PROBES)
    ]
    print(json.dumps([traffic.blocks, len(pods), probes]), flush=True)
    del traffic  # of ten million blocks 8 GB
    context = zmq.Context()
    sockets: dict[int, zmq.Socket[bytes]] = {}
    sequences: dict[int, int] = {}
    for line in sys.stdin:
        command, _, phase = line.strip().partition(" ")
        if command == "open":
            sequences = dict.fromkeys(pods, 0)
            endpoints = {}
            for pod in pods:
                sockets[pod] = context.socket(zmq.XPUB)
                sockets[pod].set_hwm(0)
                port = sockets[pod].bind_to_random_port("tcp://127.0.0.1")
                endpoints[pod] = f"tcp://127.0.0.1:{port}"
            print(json.dumps(endpoints), flush=True)
        elif command == "subscribed":
            for each in sockets.values():
                assert each.poll(20_000), "nobody subscribed"
            print("{}", flush=True)
        elif command in ("send", "pace"):
            for number, (pod, payload) in enumerate(messages[phase]):
                if command == "pace" and number % PACED == 0:
                    time.sleep(0.01)
                sockets[pod].send_multipart([b"", sequences[pod].to_bytes(8, "big"), payload])
                sequences[pod] += 1
            print(json.dumps(len(messages[phase])), flush=True)
        elif command == "close":
            for each in sockets.values():
                each.close(0)
            sockets = {}
            print("{}", flush=True)


if __name__ == "__main__":
    main()
