"""Calls by the clock, as a process: ADDRESS SHARE OTHERS. Prints `capacity rate`; at a line of input what they came to.

The capacity is what a closed loop of 16 calls reaches in a second, median of three. SHARE of it less OTHERS, the calls
per second of somebody else, is asked for, each second anew: a second in which the server was behind does not grow into
a queue without end. The last line is JSON: calls by their end, each call once: a status code's name, `reset N` for a
stream reset with HTTP/2 error N and no status, `no answer` for one still open ten seconds later; and `again`: streams
that the transport refused before any handler, which were sent again and are among the others by how they ended then.
"""

import json
import select
import statistics
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from raw_load import Grpc, closed_loop, open_loop

from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb

SCORE = "/kvindex.v1.KVIndex/Score"


def main() -> None:
    address, share, others = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    keys = pb.Keys(values=[number * 0x9E3779B97F4A7C15 & (1 << 64) - 1 for number in range(512)])
    message = pb.ScoreRequest(model="m", keys=keys, pods=[f"pod-{number}" for number in range(16)]).SerializeToString()
    ends = Counter[str]()
    rates = []
    for _ in range(3):
        client = Grpc(address, SCORE, message, statuses=True)
        rates.append(closed_loop(client, 16, 1).rate)
        ends += client.ends + Counter({"again": client.again})
        client.close()
    capacity = statistics.median(rates)
    rate = max(1.0, capacity * share - others)
    print(capacity, rate, flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        client = Grpc(address, SCORE, message, statuses=True)
        open_loop(client, rate, 1)
        ends += client.ends
        ends += Counter({"no answer": client.in_flight, "again": client.again})
        client.close()
    print(json.dumps(ends), flush=True)


if __name__ == "__main__":
    main()
