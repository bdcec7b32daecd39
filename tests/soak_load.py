"""Calls by the clock, as a process: ADDRESS SHARE OTHERS. Prints `capacity rate`; at a line of input `done failed`.

The capacity is what a closed loop of 16 calls reaches in a second, median of three. SHARE of it less OTHERS, the calls
per second of somebody else, is asked for, each second anew: a second in which the server was behind does not grow into
a queue without end.
"""

import select
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from raw_load import Grpc, closed_loop, open_loop

from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb

SCORE = "/kvindex.v1.KVIndex/Score"


def main() -> None:
    address, share, others = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    keys = pb.Keys(values=[number * 0x9E3779B97F4A7C15 & (1 << 64) - 1 for number in range(512)])
    message = pb.ScoreRequest(model="m", keys=keys, pods=[f"pod-{number}" for number in range(16)]).SerializeToString()
    rates = []
    for _ in range(3):
        client = Grpc(address, SCORE, message)
        rates.append(closed_loop(client, 16, 1).rate)
        client.close()
    capacity = statistics.median(rates)
    rate = max(1.0, capacity * share - others)
    print(capacity, rate, flush=True)
    done = failed = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        client = Grpc(address, SCORE, message)
        result = open_loop(client, rate, 1)
        client.close()
        done += result.calls
        failed += result.failed
    print(done, failed, flush=True)


if __name__ == "__main__":
    main()
